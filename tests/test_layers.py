"""A module imports only from layers to its left; equals are strangers; csrc knows no Python."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "python" / "specforge_ext"
LAYERS = [
    {"records", "config", "registry", "copies"},
    {"ops", "assets"},
    {"nn", "prompts", "engines", "store"},
    {"loader", "methods"},
    {"trainer", "evaluate", "export"},
    {"runs", "integrations"},
    {"train", "cli"},
]
RANK = {name: i for i, layer in enumerate(LAYERS) for name in layer}
MODULES = sorted(p for p in PACKAGE.rglob("*.py") if p.parent != PACKAGE or p.stem != "__init__")


def _unit(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def _imports(path: Path) -> set[str]:
    """Units of the package that a module imports, lazily or at the top."""
    units: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        units |= {n.split(".")[1] for n in names if n.startswith("specforge_ext.")}
    return units - {"__version__", "_C"}


def violations(unit: str, imported: set[str]) -> set[str]:
    return {
        other
        for other in imported - {unit}
        if other not in RANK or RANK[other] > RANK[unit] or (RANK[other] == RANK[unit] != 0)
    }


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_left(path: Path) -> None:
    unit = _unit(path)
    if unit == "recipes":
        return
    assert unit in RANK, f"{unit} has no layer: add it to tests/test_layers.py and the docs"
    bad = violations(unit, _imports(path))
    assert not bad, f"{path.name} ({unit}) imports {sorted(bad)}"


def test_a_violation_is_seen() -> None:
    assert violations("methods", {"trainer"}) == {"trainer"}
    assert violations("methods", {"loader"}) == {"loader"}
    assert violations("trainer", {"methods", "records"}) == set()


def test_no_relative_imports() -> None:
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            assert not (isinstance(node, ast.ImportFrom) and node.level), path


def test_trainer_names_no_method() -> None:
    names = [p.name for p in (PACKAGE / "methods").iterdir() if p.is_dir() and p.name[0] != "_"]
    for path in (PACKAGE / "trainer").rglob("*.py"):
        text = path.read_text(encoding="utf-8").lower()
        assert not [n for n in names if n in text], path


def test_csrc_knows_neither_python_nor_torch_and_families_keep_their_order() -> None:
    families = {"loss", "pack", "attention", "transport", "wire"}
    below = {"pack": {"wire"}}  # the collate decodes what the wire encodes
    for path in (ROOT / "csrc").rglob("*"):
        if path.suffix not in {".h", ".cpp", ".cu", ".cuh"}:
            continue
        family = path.relative_to(ROOT / "csrc").parts[0]
        for line in path.read_text(encoding="utf-8").splitlines():
            if not line.startswith("#include"):
                continue
            assert "Python.h" not in line and "torch" not in line and "pybind" not in line, path
            other = line.split('"')[1].split("/")[0] if '"' in line else ""
            if family in families:
                strangers = families - {family} - below.get(family, set())
                assert other not in strangers, f"{path}: {line}"
