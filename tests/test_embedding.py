"""docs/embedding.md does what it says, and the ops stand alone."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
PAGE = (HERE.parent / "docs" / "embedding.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)( peer)?\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)


def blocks(language: str, *, peer: bool = False) -> list[str]:
    return [text for name, mark, text in BLOCKS if name == language and bool(mark) == peer]


def run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_python_examples_run() -> None:
    assert len(blocks("python")) == 2
    assert "accepted tensor([0." in run("\n".join(blocks("python")))


@pytest.mark.peer
@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("trl", "speculators")),
    reason="peers are not installed: run `make peers` (benchmarks/peers.txt)",
)
def test_patch_example_runs() -> None:
    (example,) = blocks("python", peer=True)
    said = run(example)
    comment = re.search(r"print\(done\)  # (.*)", example)
    assert comment is not None and said.splitlines()[-1] == comment[1]


def test_cpp_example_is_the_one_that_test_cpp_consumer_builds() -> None:
    built = (HERE / "cpp_consumer" / "main.cpp").read_text(encoding="utf-8")
    (example,) = blocks("cpp")
    assert example in built and "sf::loss_rows(" in example
    project = (HERE / "cpp_consumer" / "CMakeLists.txt").read_text(encoding="utf-8").splitlines()
    (lines,) = blocks("cmake")
    assert set(lines.splitlines()) <= set(project)


def test_ops_import_nothing_else_of_the_package() -> None:
    code = (
        "import sys, torch\n"
        "before = set(sys.modules)\n"
        "import specforge_ext.ops\n"
        "new = set(sys.modules) - before\n"
        "ours = {n.split('.')[1] for n in new if n.startswith('specforge_ext.')}\n"
        "assert ours == {'ops', '_C'}, ours\n"
        "heavy = {'transformers', 'tokenizers', 'safetensors', 'pydantic', 'yaml', 'rich'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    run(code)
