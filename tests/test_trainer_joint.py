"""Several drafts from one stream: each has the bits that it would have had alone."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import trainer_toy as toy
from specforge_ext.loader import StepData, unite, view
from specforge_ext.records import FeatureLayout, FeatureSpec
from specforge_ext.trainer import JointTrainer, Lane, NonFiniteError, Trainer
from specforge_ext.trainer.distributed import World, open_world

STEPS = 8
EVERY = {"every_steps": 2, "keep_last": 9}
DRAFTS: dict[str, dict[str, Any]] = {
    "first": {"lr": 1e-2, "seed": 0},
    "second": {"lr": 3e-3, "seed": 5, "checkpoint": {"every_steps": 3, "keep_last": 9}},
    "short": {"lr": 1e-2, "seed": 1, "max_steps": 5},
}
"""Dropout draws from random states, which a draft must not share with another."""


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with open_world(device="cpu", timeout_s=30) as world:
        yield world


def trainer(world: World, folder: Path, name: str, source: toy.ToySource, **more: Any) -> Trainer:
    settings = {"checkpoint": EVERY, **DRAFTS[name]}
    return Trainer(
        toy.config(**settings),
        more.pop("method", toy.ToyMethod()),
        toy.make_draft(seed=len(name), dropout=0.3),
        source,
        output_dir=folder / name,
        world=world,
        label=name,
    )


def joint(
    world: World, folder: Path, *, faults: Any = None, **more: Any
) -> tuple[dict[str, Trainer], JointTrainer]:
    source = toy.ToySource(STEPS, faults=faults or {})
    trainers = {name: trainer(world, folder, name, source, **more) for name in DRAFTS}
    lanes = [Lane(name, one, lambda data: data) for name, one in trainers.items()]
    return trainers, JointTrainer(lanes, source)


def everything(one: Trainer) -> dict[str, Tensor]:
    """Parameters, buffers and moments, whole."""
    return {n: t.full_tensor() if hasattr(t, "full_tensor") else t
            for n, t in one._tensors().items()}  # fmt: skip


def assert_same(trainers: dict[str, Trainer], wanted: dict[str, dict[str, Tensor]]) -> None:
    for name, one in trainers.items():
        mine = everything(one)
        assert mine.keys() == wanted[name].keys()
        for key, tensor in mine.items():
            assert torch.equal(tensor, wanted[name][key]), (name, key)


def losses(folder: Path, name: str) -> list[tuple[int, float]]:
    lines = (folder / name / "metrics.jsonl").read_text().splitlines()
    return [(line["step"], line["loss"]) for line in map(json.loads, lines)]


@pytest.fixture(scope="module")
def alone(world: World, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Tensor]]:
    folder = tmp_path_factory.mktemp("alone")
    out = {}
    for name in DRAFTS:
        one = trainer(world, folder, name, toy.ToySource(STEPS))
        one.fit()
        out[name] = everything(one)
    return out


def test_each_is_as_if_alone(
    world: World, tmp_path: Path, alone: dict[str, dict[str, Tensor]]
) -> None:
    trainers, both = joint(world, tmp_path)
    results = both.fit()
    assert {n: (r.steps, r.total_steps, r.stopped_by_signal) for n, r in results.items()} == {
        "first": (8, 8, False), "second": (8, 8, False), "short": (5, 5, False),
    }  # fmt: skip
    assert_same(trainers, alone)
    for name, wanted in (("first", 8), ("short", 5)):
        steps = [step for step, _ in losses(tmp_path, name)]
        assert steps[-1] == wanted
        assert (tmp_path / name / "checkpoints" / f"step_{wanted:08d}").is_dir()
    assert losses(tmp_path, "first") != losses(tmp_path, "second")


@pytest.mark.parametrize("step", [1, 4, 6])
def test_sigterm_saves_all_and_resume_goes_on_to_the_same_bits(
    world: World, tmp_path: Path, alone: dict[str, dict[str, Tensor]], step: int
) -> None:
    _, cut = joint(world, tmp_path, faults={step: "term"})
    results = cut.fit()
    assert {r.steps for n, r in results.items() if n != "short"} == {step + 1}
    assert results["short"].steps == min(step + 1, 5)
    assert results["first"].stopped_by_signal
    trainers, again = joint(world, tmp_path)
    after = again.fit()
    assert {n: r.resumed_step for n, r in after.items()} == {n: r.steps for n, r in results.items()}
    assert_same(trainers, alone)


def test_a_draft_that_is_behind_is_waited_for(
    world: World, tmp_path: Path, alone: dict[str, dict[str, Tensor]]
) -> None:
    """As after a kill between the checkpoints of two drafts."""
    joint(world, tmp_path, faults={5: "term"})[1].fit()
    for name, kept in (("first", 4), ("second", 3), ("short", 2)):
        for path in (tmp_path / name / "checkpoints").iterdir():
            if int(path.name[5:]) > kept:
                shutil.rmtree(path)
    trainers, again = joint(world, tmp_path)
    results = again.fit()
    assert {n: r.resumed_step for n, r in results.items()} == {"first": 4, "second": 3, "short": 2}
    assert_same(trainers, alone)
    assert [step for step, _ in losses(tmp_path, "first")] == list(range(1, 9))


def test_nothing_left_to_do(world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    joint(world, tmp_path)[1].fit()
    with caplog.at_level(logging.INFO):
        results = joint(world, tmp_path)[1].fit()
    assert "nothing to do: every draft has done its last step" in caplog.text
    assert [r.steps for r in results.values()] == [8, 8, 5]


def test_errors_name_the_draft(world: World, tmp_path: Path) -> None:
    poisoned = toy.ToyMethod(poison={"s2.3": float("nan")})
    with pytest.raises(NonFiniteError, match=r"draft first: step 2: .*s2\.3"):
        joint(world, tmp_path / "nan", method=poisoned)[1].fit()
    source = toy.ToySource(STEPS)
    lane = Lane("first", trainer(world, tmp_path, "first", source), lambda data: data)
    with pytest.raises(ValueError, match=r"data ended before the drafts were done: first after 0"):
        JointTrainer([lane], toy.ToySource(0)).fit()


# Layouts.

AUX = FeatureSpec("aux", (2, 4, 5), 12, "float32")
LAST = FeatureSpec("last", (8,), 4, "float32", final_norm=True)


def test_one_layout_stays_as_it_is() -> None:
    layout = FeatureLayout((AUX, LAST))
    union = unite({"": layout})
    assert union.layout.hash == layout.hash
    assert union.names == {"": {"aux": "aux", "last": "last"}}


def test_a_source_is_stored_once_and_names_do_not_clash() -> None:
    others = FeatureLayout(
        (
            FeatureSpec("hidden", (2, 4, 5), 12, "float32"),  # aux of another name
            FeatureSpec("aux", (1,), 4, "float32"),  # another aux
            FeatureSpec("raw", (8,), 4, "float32"),  # last without the final norm
            FeatureSpec("half", (2, 4, 5), 12, "bfloat16"),
        )
    )
    union = unite({"a": FeatureLayout((AUX, LAST)), "b": others})
    assert [spec.name for spec in union.layout.features] == ["aux", "last", "b.aux", "raw", "half"]
    assert union.names["b"] == {"hidden": "aux", "aux": "b.aux", "raw": "raw", "half": "half"}
    for name, layout in (("a", FeatureLayout((AUX, LAST))), ("b", others)):
        for spec in layout.features:
            shared = {s.name: s for s in union.layout.features}[union.names[name][spec.name]]
            assert (shared.layer_ids, shared.dtype, shared.final_norm, shared.width) == (
                spec.layer_ids, spec.dtype, spec.final_norm, spec.width,
            )  # fmt: skip


def test_a_view_copies_nothing() -> None:
    batch = toy.make_batch(0, range(3))
    data = StepData(
        step=0, micro_batches=(batch,), wait_s=1.0, samples=3, tokens=batch.num_tokens,
        upcoming=lambda: batch,
    )  # fmt: skip
    seen = view(data, {"mine": "x"})
    assert seen.micro_batches[0].features.keys() == {"mine"}
    assert seen.micro_batches[0].features["mine"] is batch.features["x"]
    assert seen.micro_batches[0].input_ids is batch.input_ids
    assert seen.upcoming() is None and (seen.wait_s, seen.samples) == (1.0, 3)
