#!/usr/bin/env bash
# Within the guest: makes the soft-RoCE device rxe0 and runs the stores' tests over it.
# guest.sh REPO PYTHON SLOWDOWN OUT TEST...: OUT gets `ready`, `junit.xml` and `exit`, pytest's code.
set -euo pipefail
repo=$1 python=$2 slowdown=$3 out=$4
shift 4
trap 'echo $? > "$out/exit"' EXIT

ulimit -l unlimited # registered memory is locked
ip link set lo up
ip link add rdma0 mtu 4500 type dummy # room for RDMA's largest packet: 4096 bytes
ip address add 10.9.9.1/24 dev rdma0
ip link set rdma0 up
rdma link add rxe0 type rxe netdev rdma0

port=/sys/class/infiniband/rxe0/ports/1
usable() { grep -q ACTIVE $port/state && grep -q 0a09:0901 $port/gids/*; } # GID: 10.9.9.1
for _ in $(seq 300); do
  if usable; then break; fi
  sleep 0.1
done
usable || { echo "guest: rxe0 is not usable after 30 s" >&2; rdma link; exit 1; }
cut -d ' ' -f 1 /proc/uptime > "$out/ready"

cd "$repo"
export PYTHONPATH=$repo/python PYTHONDONTWRITEBYTECODE=1 OMP_NUM_THREADS=1
export SPECFORGE_EXT_CI=1 # what is skipped has failed
export SPECFORGE_EXT_TEST_PROTOCOL=rdma SPECFORGE_EXT_TEST_DEVICES=rxe0
export SPECFORGE_EXT_TEST_SLOWDOWN=$slowdown
# One-sided reads need no running producer: over_rdma.py has what is promised instead.
export PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 # importing takes long in here
"$python" -m pytest -p pytest_timeout -p no:cacheprovider -v --color=no --tb=short --timeout 600 \
  --durations=8 --junitxml "$out/junit.xml" "$@" \
  --deselect tests/test_store_mooncake.py::test_a_read_has_a_deadline
