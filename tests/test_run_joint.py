"""A recipe of several drafts, end to end on the demo target: equal to the drafts' own runs."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from specforge_ext.config import override, read_yaml
from specforge_ext.runs.local import run
from specforge_ext.runs.recipe import build, find, load

TINY = (
    "run.num_threads=1",
    "data.train.num_prompts=24",
    "data.train.prefix_tokens=16",
    "data.heldout.num_prompts=4",
    "data.heldout.prefix_tokens=16",
    "data.generate.max_new_tokens=24",
    "order.batch_tokens=320",
    "order.epochs=3",
    "trainer.log_every_steps=1",
    "trainer.tensorboard=false",
    "trainer.checkpoint={every_steps: 2, keep_last: 2}",
    "evaluate.num_prompts=4",
    "evaluate.max_new_tokens=8",
    "evaluate.temperatures=[0]",
    "evaluate.baselines=false",
)
PER_STEP = ("step", "loss", "grad_norm", "lr", "weight", "samples", "tokens", "metrics")
RESULTS = ("steps", "samples_trained", "tokens_trained", "parameters_sha256", "acceptance")


def recipe(folder: Path, *more: str) -> dict[str, Any]:
    return override(read_yaml(find("demo-joint")), [*TINY, *more, f"output_dir={folder}"])


def alone(data: dict[str, Any], index: int, folder: Path) -> dict[str, Any]:
    """The recipe that a user would write for one of the drafts."""
    entry = data["drafts"][index]
    own = {key: value for key, value in data.items() if key != "drafts"}
    trainer = {**data["trainer"], **entry["trainer"]}
    return {
        **own, "name": "alone", "output_dir": str(folder), "method": entry["method"],
        "trainer": trainer,
    }  # fmt: skip


@dataclass(frozen=True)
class Runs:
    joint: Path
    summary: dict[str, Any]
    alone: dict[str, Path]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    together = tmp_path_factory.mktemp("together")
    data = recipe(together)
    summary = run(build(data))
    assert summary is not None
    folders = {}
    for index, name in enumerate(("eagle3", "dflash")):
        folders[name] = tmp_path_factory.mktemp(name)
        shutil.copytree(together / "data", folders[name] / "data")  # need not be written again
        run(build(alone(data, index, folders[name])))
    return Runs(together, summary, folders)


def read(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "summary.json").read_text()))


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", ["eagle3", "dflash"])
def test_each_draft_equals_its_own_run_bit_for_bit(runs: Runs, name: str) -> None:
    mine, wanted = read(runs.joint / name), read(runs.alone[name])
    assert mine["steps"] > 3
    for key in RESULTS:
        assert mine[key] == wanted[key], key
    assert mine["lossless"] is True and mine["export_check"] is True
    assert [{k: line[k] for k in PER_STEP} for line in lines(runs.joint / name)] == [
        {k: line[k] for k in PER_STEP} for line in lines(runs.alone[name])
    ]
    ours, theirs = (Path(s["export"]) / "model.safetensors" for s in (mine, wanted))
    assert ours.is_relative_to(runs.joint / name / "export")
    assert ours.read_bytes() == theirs.read_bytes()


def test_one_stream_for_both(runs: Runs) -> None:
    """DFlash reads the layers that EAGLE-3 fuses: nothing more is delivered for it."""
    log = (runs.joint / "producer.log").read_text()
    assert not (runs.joint / "eagle3" / "producer.log").exists(), log
    delivered = {
        name: sum(line["transfer/bytes_delivered"] for line in lines(folder))
        for name, folder in {"joint": runs.joint / "dflash", **runs.alone}.items()
    }
    assert delivered["joint"] == delivered["eagle3"] > delivered["dflash"]


def test_summary_of_all(runs: Runs) -> None:
    assert runs.summary["recipe"] == "demo-joint"
    written = read(runs.joint)
    assert json.loads(json.dumps(runs.summary)) == written
    assert written["drafts"] == {n: read(runs.joint / n) for n in ("eagle3", "dflash")}


def test_the_same_command_again_changes_nothing(
    runs: Runs, capfd: pytest.CaptureFixture[str]
) -> None:
    again = run(build(recipe(runs.joint, "evaluate.num_prompts=0")))
    assert again is not None
    for name in ("eagle3", "dflash"):
        mine, before = again["drafts"][name], runs.summary["drafts"][name]
        assert mine["parameters_sha256"] == before["parameters_sha256"]
        assert mine["steps"] == before["steps"]
    assert "written by the target" not in capfd.readouterr().out


def test_another_recipe_of_one_draft_is_refused_with_its_key(runs: Runs) -> None:
    data = recipe(runs.joint)
    data["drafts"][1]["method"]["gamma"] = 3.0
    with pytest.raises(ValueError, match=r"dflash.*another run: wanted method\.gamma = 3.0, got 2"):
        run(build(data))


def test_parts_are_recipes_of_their_own() -> None:
    joint = load("demo-joint", ["output_dir=/o", "trainer.lr=1", "evaluate.depth=3"])
    assert list(joint.parts) == ["eagle3", "dflash"]
    assert [part.output_dir for part in joint.parts.values()] == [
        Path("/o/eagle3"),
        Path("/o/dflash"),
    ]
    assert [part.trainer.lr for part in joint.parts.values()] == [
        8e-3,
        4e-3,
    ]  # the draft's own wins
    assert {part.evaluate.depth for part in joint.parts.values()} == {3}
    assert joint.output_dir == Path("/o")
    single = load("demo", [])
    assert single.parts == {"": single}


E3 = {"kind": "eagle3"}
WRONG: list[tuple[Any, str]] = [
    ([], r"drafts: wanted a list of \{name, method, \.\.\.\}, got \[\]"),
    ({"a": 1}, r"drafts: wanted a list"),
    ([3], r"drafts\.0: wanted a section, got 3"),
    ([{"method": E3}], r"drafts\.0\.name: wanted letters.*got None"),
    ([{"name": "a/b", "method": E3}], r"drafts\.0\.name: wanted letters.*got 'a/b'"),
    ([{"name": "data", "method": E3}], r"drafts\.0\.name: .*none of data.*got 'data'"),
    (
        [{"name": "a", "method": E3}, {"name": "a", "method": E3}],
        r"drafts\.1\.name: wanted a name of its own, got 'a' again",
    ),
    ([{"name": "a", "metod": E3}], r"drafts\.0: unknown key 'metod', did you mean 'method'\?"),
    ([{"name": "a"}], r"drafts\.0 \(a\): method\.kind: wanted one of .*, got None"),
    (
        [{"name": "a", "method": {**E3, "ttt": 1}}],
        r"drafts\.0 \(a\): method\.ttt: unknown key 'ttt'",
    ),
    (
        [{"name": "a", "method": {"kind": "dflash", "block_size": 4}}],
        r"drafts\.0 \(a\): evaluate\.depth: wanted at most 3",
    ),
]


@pytest.mark.parametrize(("drafts", "wanted"), WRONG)
def test_what_is_wrong_is_named(drafts: Any, wanted: str) -> None:
    data = read_yaml(find("demo-joint"))
    with pytest.raises(ValueError, match=wanted):
        build({**data, "drafts": drafts})
    with pytest.raises(ValueError, match=r"method: wanted none beside drafts"):
        build({**data, "method": E3})
