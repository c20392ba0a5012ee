"""The C++ package: installed without Python, found by CMake, linked into another program."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CONSUMER = Path(__file__).resolve().parent / "cpp_consumer"


def command(*args: str | Path) -> str:
    done = subprocess.run(
        [str(arg) for arg in args], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, f"{args}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.skipif(shutil.which("cmake") is None, reason="cmake is not installed")
def test_a_cmake_project_finds_and_links_the_core(tmp_path: Path) -> None:
    generator = ("-G", "Ninja") if shutil.which("ninja") else ()
    options = ("-DSPECFORGE_EXT_PYTHON=OFF", "-DSPECFORGE_EXT_CUDA=OFF")
    build, prefix, consumer = tmp_path / "build", tmp_path / "prefix", tmp_path / "consumer"
    command("cmake", "-S", ROOT, "-B", build, *generator, *options)
    command("cmake", "--build", build)
    command("cmake", "--install", build, "--prefix", prefix, "--component", "core")
    installed = sorted(path.relative_to(prefix) for path in prefix.rglob("*.h"))
    assert Path("include/specforge_ext/loss/loss_rows.h") in installed
    command("cmake", "-S", CONSUMER, "-B", consumer, *generator, f"-DCMAKE_PREFIX_PATH={prefix}")
    command("cmake", "--build", consumer)
    assert "got [3] f32" in command(consumer / "consumer")
