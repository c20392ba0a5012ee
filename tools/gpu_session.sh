#!/usr/bin/env bash
# Everything that needs a GPU, in one go: build with CUDA, test, look for races and stray accesses,
# measure. From the repository root, with torch for CUDA installed:  tools/gpu_session.sh [OUT_DIR]
# Exit status: 0 only if all parts passed; each part's output is in OUT_DIR.
set -uo pipefail
out=${1:-build/gpu_session}
mkdir -p "$out"
export PYTHONPATH="$PWD/python${PYTHONPATH:+:$PYTHONPATH}"
failed=()

# Without a GPU every test below would be skipped, and the session would look like a success.
if ! python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "gpu_session: torch sees no CUDA device" >&2
  exit 2
fi

part() {  # part NAME SECONDS COMMAND...: runs it, keeps its output, remembers a failure
  local name=$1 limit=$2
  shift 2
  echo "== $name"
  if timeout "$limit" "$@" >"$out/$name.log" 2>&1; then
    tail -n 3 "$out/$name.log"
  else
    failed+=("$name ($?)")
    tail -n 40 "$out/$name.log"
  fi
}

{
  nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
  nvcc --version | tail -n 2
  git rev-parse HEAD 2>/dev/null || echo "no git"
} | tee "$out/machine.txt"

part build 300 make build CUDA=ON BUILD=build/gpu
part gates 200 python tools/cuda_gates.py --json "$out/gates.json"
part pytest 500 python -m pytest -q -m gpu --junitxml "$out/pytest.xml"

part info 60 python -m specforge_ext.cli info
part stores 500 python -m pytest -q tests/test_store_contract.py -k "cuda_ipc or /gpu"

sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null)
if [ -n "$sanitizer" ]; then
  # 65544: the smallest vocabulary that takes a cluster of 4
  small='test_gpu_ops and (1031 or 2048 or 65544 or ttt_maps) and not 32000 and not 262144'
  for tool in memcheck racecheck synccheck; do
    part "$tool" 400 "$sanitizer" --tool "$tool" --error-exitcode 9 \
      python -m pytest -q -m gpu -k "$small" -p no:cacheprovider
  done
else
  failed+=("compute-sanitizer is not installed")
fi

part rows_bandwidth 200 python tools/rows_bandwidth.py --json "$out/rows_bandwidth.json"

for bench in benchmarks/*.py; do
  [ -e "$bench" ] || continue
  name=$(basename "$bench" .py)
  part "bench_$name" 300 python "$bench" --quick --json "$out/$name.json"
done

if [ ${#failed[@]} -gt 0 ]; then
  printf 'FAILED %s\n' "${failed[@]}"
  exit 1
fi
echo "all parts passed, results in $out"
