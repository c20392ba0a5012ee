#!/usr/bin/env bash
# install.sh VENV: real SGLang for CPUs, into a fresh virtual environment. Called by tests/rigs/build.py.
# PyPI has CUDA builds only of sgl_kernel, whose stand-in is found through PYTHONPATH, and of torchvision, which is
# given the two operators that it wants to know when it is imported.
set -euo pipefail
venv=$1 here=$(cd "$(dirname "$0")" && pwd)
pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }

pip install -q --no-compile -r "$here/requirements.txt"
# --no-deps: theirs are CUDA kernels, and SGLang pins a torch that has no build for CPUs on PyPI.
pip install -q --no-compile --no-deps -r "$here/requirements_alone.txt"

site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
if ! "$venv/bin/python" -c 'import torchvision' 2> /dev/null; then
  cat "$here/torchvision_operators.py" "$site/torchvision/__init__.py" > "$site/torchvision/.fresh"
  mv "$site/torchvision/.fresh" "$site/torchvision/__init__.py"
fi

SGLANG_USE_CPU_ENGINE=1 PYTHONPATH="$here/stand_ins" "$venv/bin/python" -c 'import sglang.srt.entrypoints.http_server, sglang; print("sglang", sglang.__version__)'
