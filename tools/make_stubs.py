"""Writes python/specforge_ext/_C.pyi from the module that was built: `make build stubs`.

With --check nothing is written, and the exit status says whether the file is up to date.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from pybind11_stubgen import main as stubgen

ROOT = Path(__file__).resolve().parent.parent
STUB = ROOT / "python" / "specforge_ext" / "_C.pyi"


def generate() -> str:
    """The stub's text, formatted as the rest of the project."""
    with tempfile.TemporaryDirectory() as folder:
        with contextlib.redirect_stdout(io.StringIO()):
            stubgen(["specforge_ext._C", "--output-dir", folder, "--exit-code"])
        text = (Path(folder) / "specforge_ext" / "_C.pyi").read_text()
    # Values that depend on how the module was built are no part of its interface.
    text = re.sub(r"^(__\w+__: str|cuda_compiled: bool) = .*$", r"\1", text, flags=re.M)
    for command in (["check", "--fix", "--quiet", "--exit-zero"], ["format", "--quiet"]):
        text = subprocess.run(
            ["ruff", *command, "--stdin-filename", str(STUB), "-"],
            input=text,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    check: bool = parser.parse_args().check
    text = generate()
    if check:
        if STUB.read_text() == text:
            return 0
        print(f"{STUB} is not that of the built module: run `make stubs`", file=sys.stderr)
        return 1
    STUB.write_text(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
