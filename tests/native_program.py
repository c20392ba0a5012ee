"""Builds the programs of tests/native with the arena's sources, and runs them."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLAGS = ["-std=c++20", "-O1", "-g", "-Wall", "-Wextra", "-fno-sanitize-recover=all", "-pthread"]


def build(program: str, sanitizers: str, *defines: str) -> Path:
    """Compile a program of tests/native with the arena's sources; what is built stays in build/.

    sanitizers: of g++ -fsanitize, "" for none.
    """
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ to compile the sanitized arena with")
    command = [compiler, *FLAGS, f"-I{ROOT / 'csrc'}"]
    if sanitizers:
        command.append(f"-fsanitize={sanitizers}")
    core = sorted((ROOT / "csrc/core").glob("crc32c*.cpp"))
    arena = [*sorted((ROOT / "csrc/transport").glob("*.cpp")), *core]
    main = ROOT / "tests/native" / f"{program}.cpp"
    folder = ROOT / "build/sanitized" / digest_of(command, [*arena, *ROOT.glob("csrc/*/*.h")])
    if not folder.exists():
        # Renamed when complete, so that two runs at once cannot see half of it.
        fresh = folder.with_suffix(f".{os.getpid()}")
        fresh.mkdir(parents=True)
        compile_all([*command, "-c", *map(str, arena)], fresh)
        fresh.rename(folder)
    command += [f"-D{name}" for name in defines]  # the arena itself is the same for all
    binary = folder / f"{program}-{digest_of(command, [main])}"
    if not binary.exists():
        fresh = binary.with_suffix(f".{os.getpid()}")
        objects = map(str, sorted(folder.glob("*.o")))
        compile_all([*command, str(main), *objects, "-o", str(fresh)], folder)
        fresh.rename(binary)
    return binary


def digest_of(command: list[str], sources: list[Path]) -> str:
    digest = hashlib.sha256(" ".join(command).encode())
    for path in sorted(sources):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def compile_all(command: list[str], folder: Path) -> None:
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr


def run(binary: Path, *arguments: str, timeout_s: float = 240) -> str:
    """What it prints. The program says "ok" last and exits 0, or it failed."""
    done = run_anyhow(binary, *arguments, timeout_s=timeout_s)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert done.stdout.endswith("ok\n")
    return done.stdout


def run_anyhow(
    binary: Path, *arguments: str, timeout_s: float = 240
) -> subprocess.CompletedProcess[str]:
    # ThreadSanitizer of g++ 12 cannot place its shadow where new kernels randomise addresses.
    setarch = shutil.which("setarch")
    prefix = [setarch, "-R"] if setarch else []
    command = [*prefix, str(binary), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
