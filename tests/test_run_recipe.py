"""Recipes: what is wrong is named, with the nearest right name, before anything starts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from specforge_ext import _C, __version__, cli
from specforge_ext.config import Config
from specforge_ext.engines import ENGINES
from specforge_ext.methods import METHODS
from specforge_ext.registry import Registry
from specforge_ext.runs import recipe as run_recipe
from specforge_ext.runs.local import main, threads_each
from specforge_ext.runs.recipe import RECIPES, load
from specforge_ext.store import STORES
from specforge_ext.trainer import open_world

WRONG = {
    "trainr.lr=1": r"unknown key 'trainr', did you mean 'trainer'\?",
    "trainer.learning_rate=1": r"trainer\.learning_rate: unknown key 'learning_rate'.* Known: .*lr",
    "trainer.checkpoint.every_step=1": (
        r"trainer\.checkpoint\.every_step: unknown key 'every_step', did you mean 'every_steps'\?"
    ),
    "method.tt_length=1": r"method\.tt_length: unknown key .*did you mean 'ttt_length'\?",
    "engine.max_batch_token=1": r"engine\.max_batch_token: .*did you mean 'max_batch_tokens'\?",
    "store.capacity=1": r"store\.capacity: .*did you mean 'capacity_bytes'\?",
    "store.encoding=fp8": r"store\.encoding: .*'none' or 'fp8_e4m3_row', got 'fp8'",
    "data.trian.kind=1": r"data\.trian: unknown key 'trian', did you mean 'train'\?",
    "data.train.num_promts=1": r"data\.train\.num_promts: .*did you mean 'num_prompts'\?",
    "data.heldout.kind=python_stdli": r"'python_stdli', did you mean 'python_stdlib'\?",
    "data.heldout.kind=": r"data\.heldout\.kind: wanted one of .*python_stdlib.*, got None",
    "method.kind=eagle": r"unknown method 'eagle', did you mean 'eagle3'\?",
    "engine.kind=[1]": r"engine\.kind: wanted one of hf, got \[1\]",
    "stream=3": r"stream: wanted a section, got 3",
    "trainer.lr=fast": r"trainer\.lr: Input should be a valid number.*, got 'fast'",
    "order.epochs=0": r"order\.epochs: Input should be greater than or equal to 1, got 0",
    "stream.prefetch_steps=0": r"stream\.prefetch_steps: .*greater than or equal to 1, got 0",
    "run.num_threads=0": r"run\.num_threads: .*greater than or equal to 1, got 0",
    "evaluate.depth=0": r"evaluate\.depth: .*greater than or equal to 1, got 0",
    "evaluate.temperatures=[0, -1]": r"evaluate\.temperatures\.1: .*equal to 0, got -1",
    "evaluate.max_new_tokens=5": r"evaluate: .*wanted at least depth \+ 2 = 6, got 5$",
    "export.dtype=float64": r"export\.dtype: .*'float32' or 'bfloat16', got 'float64'",
    "engine.device=gpu": r"^engine\.device: wanted auto, cpu or cuda\[:index\], got 'gpu'$",
    "trainer.betas=[2, 3]": r"trainer\.betas\.0: Input should be less than 1, got 2;",
    "run.seed=-1": r"run\.seed: .*greater than or equal to 0, got -1",
    "output_dir=5": r"output_dir: wanted the path of a folder, got 5",
    "name=": r"name: wanted the name of the recipe, got None",
    "nonsense": r"override 'nonsense': wanted key\.sub=value",
    "=1": r"override '=1': wanted key\.sub=value",
    "name.sub=1": r"override 'name\.sub=1': 'name' is a value, not a section",
    "trainer.lr=[": r"override 'trainer\.lr=\[': not valid YAML",
}


@pytest.mark.parametrize("assignment", WRONG)
def test_what_is_wrong_is_named(assignment: str) -> None:
    with pytest.raises(ValueError, match=WRONG[assignment]):
        load(None, [assignment])


def test_unknown_recipe() -> None:
    with pytest.raises(ValueError, match=r"dem: no such file, and unknown recipe 'dem', did you"):
        load("dem", [])


def test_recipe_files(tmp_path: Path) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_text("a: [")
    with pytest.raises(ValueError, match=r"bad\.yaml: not valid YAML"):
        load(str(bad), [])
    bad.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"bad\.yaml: wanted YAML in UTF-8: .*byte 0xff"):
        load(str(bad), [])
    bad.write_text("a:\n  b: 1\n  c: 2\n  b: 3\n")
    with pytest.raises(ValueError, match=r"bad\.yaml: .*the key 'b' is given twice.* line 4"):
        load(str(bad), [])
    with pytest.raises(ValueError, match="wanted a recipe's YAML file, got a directory"):
        load(str(tmp_path), [])
    with pytest.raises(ValueError, match=r"x/dmeo\.yaml: no such file, .* did you mean 'demo'"):
        load("x/dmeo.yaml", [])
    bad.write_text("- 1")
    with pytest.raises(ValueError, match=r"bad\.yaml: wanted a mapping at the top, got list"):
        load(str(bad), [])
    bad.write_text("name: x\nengine: {kind: hf, model: demo}\nmethod: {kind: eagle3}\n")
    with pytest.raises(ValueError, match=r"data\.train: required, but not given"):
        load(str(bad), [])


def test_exit_code_and_a_single_line() -> None:
    """As a process: no traceback."""
    done = subprocess.run(
        [sys.executable, "-m", "specforge_ext.train", "demo", "method.tt_length=3"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    [line] = done.stderr.splitlines()
    assert line.startswith("specforge_ext: method.tt_length: unknown key 'tt_length', did you mean")


@pytest.mark.parametrize("arguments", [["demon"], ["demo", "x"], ["x.y=1"]])
def test_main_refuses(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert capsys.readouterr().err.startswith("specforge_ext: ")


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_recipes_are_valid(path: Path) -> None:
    recipe = load(path.stem, [])
    assert recipe.name == path.stem
    assert recipe.output_dir == Path("runs") / recipe.name
    assert recipe.source == yaml.safe_load(path.read_text())


def test_overrides_reach_their_section() -> None:
    recipe = load("demo.yaml", ["trainer.lr=5e-4", "order.max_steps=7", "output_dir=/o"])
    assert (recipe.trainer.lr, recipe.order.max_steps) == (5e-4, 7)
    assert recipe.output_dir == Path("/o")
    assert recipe.text_temperature == 0.8
    assert load(None, ["data.generate.temperature=0"]).text_temperature == 1.0


def test_threads_of_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 7)
    with open_world(device="cpu", timeout_s=30) as world:
        assert threads_each(load(None, []), world) == 3  # as many for the producer
        assert threads_each(load(None, ["run.num_threads=5"]), world) == 5
        monkeypatch.setattr("os.cpu_count", lambda: 1)
        assert threads_each(load(None, []), world) == 1


def test_info_lists_everything_with_reasons(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = {name.strip(): text for name, _, text in (line.partition("  ") for line in lines)}
    assert rows["specforge_ext"].strip() == f"{__version__}, commit {_C.__commit__}"
    assert _C.isa() in rows["kernels cpu"]
    names = {f"engine {e}" for e in ENGINES} | {f"store {s}" for s in STORES}
    names |= {f"method {m}" for m in METHODS} | {"kernels cuda", "cpu", "torch", "python"}
    assert names | {"engine vllm", "engine sglang", "store mooncake_store"} <= rows.keys()
    assert all(text.strip() for text in rows.values())
    for text in rows.values():
        if "not available" in text:
            assert text.partition("not available: ")[2]
    assert "cuda" in rows or "cuda:0" in rows


def test_cli_passes_on_to_train(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "demo", "trainr.lr=1"]) == 2
    assert "did you mean 'trainer'?" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        cli.main(["fly"])


class StoreWithoutEncoding:
    Config = Config


def test_config_of_a_store_is_a_store_config(monkeypatch: pytest.MonkeyPatch) -> None:
    stores = Registry("store")
    stores.add("shm", f"{__name__}:StoreWithoutEncoding")
    monkeypatch.setattr(run_recipe, "STORES", stores)
    with pytest.raises(TypeError, match=r"store.kind shm: wanted a StoreConfig, got Config"):
        load("demo", [])
