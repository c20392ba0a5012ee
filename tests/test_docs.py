"""The pages name what is there: links, files, recipes, keys and commands."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from specforge_ext import cli
from specforge_ext.config import override, read_yaml
from specforge_ext.engines import ENGINES
from specforge_ext.loader import OrderConfig, StreamConfig
from specforge_ext.methods import METHODS
from specforge_ext.runs.data import DataConfig
from specforge_ext.runs.recipe import (
    EvaluateConfig,
    ExportConfig,
    RunConfig,
    find,
    shipped,
    split_arguments,
)
from specforge_ext.store import STORES
from specforge_ext.trainer import TrainerConfig

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
LINK = re.compile(r"\]\(([^)#]+)\)")
QUOTED = re.compile(r"`([^`\n]+)`")
PLACE = re.compile(r"[A-Za-z0-9_.]+(?:/[A-Za-z0-9_.*-]+)+/?")
SUFFIXES = (".py", ".sh", ".md", ".h", ".cuh", ".cpp", ".cu", ".yaml", ".txt", ".toml", ".png")
FOLDERS = (ROOT, ROOT / "python", ROOT / "python" / "specforge_ext", ROOT / "csrc")
SECTIONS = {
    "run": [RunConfig],
    "engine": [ENGINES.get(name).Config for name in ENGINES],
    "data": [DataConfig],
    "method": [METHODS.get(name).Config for name in METHODS],
    "store": [STORES.get(name).Config for name in STORES],
    "order": [OrderConfig],
    "stream": [StreamConfig],
    "trainer": [TrainerConfig],
    "evaluate": [EvaluateConfig],
    "export": [ExportConfig],
}
KEY = re.compile(rf"\b({'|'.join(SECTIONS)})\.([a-z_]+)(?![\w(/])")


def pages() -> list[object]:
    return [pytest.param(path, id=path.name) for path in PAGES]


def commands(text: str) -> list[str]:
    """Of the blocks without a language; a line that ends with a backslash goes on."""
    blocks = re.findall(r"^(?:```\n(.*?)^```$|((?: {4}\S.*\n)+))", text, re.DOTALL | re.MULTILINE)
    lines = "\n".join("".join(pair) for pair in blocks).replace("\\\n", " ").splitlines()
    return [line.strip() for line in lines]


@pytest.mark.parametrize("page", pages())
def test_links_lead_somewhere(page: Path) -> None:
    links = [link for link in LINK.findall(page.read_text()) if "://" not in link]
    missing = [link for link in links if not (page.parent / link).exists()]
    assert not missing


@pytest.mark.parametrize("page", pages())
def test_named_files_are_there(page: Path) -> None:
    words = " ".join(QUOTED.findall(page.read_text())).split()
    words += " ".join(commands(page.read_text())).split()
    named = [w for w in words if PLACE.fullmatch(w) and (w.endswith(SUFFIXES) or "/test" in w)]
    missing = [w for w in named if not any(list(folder.glob(w)) for folder in FOLDERS)]
    assert not missing


@pytest.mark.parametrize("page", pages())
def test_named_keys_are_keys_of_recipes(page: Path) -> None:
    """Modules are named alike: loader/order.py is `order`."""
    unknown = [
        f"{section}.{key}"
        for section, key in KEY.findall(" ".join(QUOTED.findall(page.read_text())))
        if key not in {"kind", "py"}
        and not any(key in model.model_fields for model in SECTIONS[section])
        and not (ROOT / "python/specforge_ext" / section).is_dir()
    ]
    assert not unknown


@pytest.mark.parametrize("page", pages())
def test_commands_name_recipes_that_are_there(page: Path) -> None:
    """What a page tells a reader to run gets past reading its recipe."""
    for command in commands(page.read_text()):
        if "specforge_ext.train" in command:
            words = shlex.split(command.partition("specforge_ext.train")[2], comments=True)
        elif "specforge-ext train" in command or "specforge-ext check" in command:
            words = shlex.split(command.partition("specforge-ext ")[2], comments=True)[1:]
        else:
            continue
        words = [word for word in words if "..." not in word and "[key" not in word]
        recipe, assignments = split_arguments(words)
        if recipe is None or recipe.isupper():
            continue
        override(read_yaml(find(recipe)), [a for a in assignments if "=" in a])


def test_the_table_of_recipes_has_all() -> None:
    text = (ROOT / "docs" / "recipes.md").read_text()
    assert set(shipped()) <= set(QUOTED.findall(text))


def test_options_may_stand_between_assignments(capsys: pytest.CaptureFixture[str]) -> None:
    """As docs/recipes.md has it."""
    words = ["check", "demo", "--ranks", "2", "trainer.lr=1e-4"]
    assert cli.main(words) == 0
    assert "demo, 2 rank(s)" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        cli.main([*words, "--rnks=3"])
    assert "unrecognized arguments: --rnks=3" in capsys.readouterr().err
