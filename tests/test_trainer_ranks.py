"""Two ranks under torchrun, over gloo. One job runs many cases, because a start costs seconds."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import trainer_toy as toy
from specforge_ext.trainer.distributed import World, open_world
from specforge_ext.trainer.loop import Trainer

STEPS = 8
# The norms lie between 9 and 18: some steps are clipped, others show the gradient's true size.
EVERY_2: dict[str, Any] = {"checkpoint": {"every_steps": 2, "keep_last": 9}, "clip_norm": 12.0}
EVEN: toy.Layout = [[[0, 1], [2, 3]], [[4, 5], [6, 7]]]
LAYOUTS: dict[str, toy.Layout] = {
    "even": EVEN,
    "uneven": [[[0]], [[1, 2, 3], [4, 5], [6, 7]]],  # other weights, other numbers of batches
    "idle": [[], [[0, 1, 2, 3], [4, 5, 6, 7]]],  # rank 0 has no metrics of its own either
}


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with open_world(device="cpu", timeout_s=30) as world:
        yield world


@dataclass
class Outcome:
    folder: Path
    output: str
    kill: dict[int, dict[int, str]]

    def load(self, name: str) -> dict[str, Any]:
        file = self.folder / name / f"{name}.pt"
        assert file.exists(), self.output
        return dict(torch.load(file, weights_only=True))

    def errors(self, name: str) -> list[str]:
        files = [self.folder / name / f"{name}.error{rank}" for rank in (0, 1)]
        assert all(file.exists() for file in files), self.output
        return [file.read_text() for file in files]


def one_rank(
    world: World, folder: Path, *, stop_after: int | None = None, resume: str = "auto"
) -> Trainer:
    return Trainer(
        toy.config(**{**EVERY_2, "checkpoint": {**EVERY_2["checkpoint"], "resume": resume}}),
        toy.ToyMethod(),
        toy.make_draft(),
        toy.ToySource(STEPS, faults={stop_after - 1: "term"} if stop_after else {}),
        output_dir=folder,
        world=world,
    )


@pytest.fixture(scope="module")
def one(world: World, tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    """What one rank makes of the same global batches."""
    trainer = one_rank(world, tmp_path_factory.mktemp("one"))
    trainer.fit()
    return trainer


@pytest.fixture(scope="module")
def job(world: World, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """Every case but those that go on after a stop. In the last one a rank kills itself."""
    folder = tmp_path_factory.mktemp("job")
    # Three steps of one rank, for two ranks to go on from.
    one_rank(world, folder / "grow", stop_after=3).fit()
    # Random, so that every run of the suite tries another one.
    kill = {random.randrange(2): {random.randrange(1, STEPS): "kill"}}
    specs = [
        *(spec(folder, name, layout=layout) for name, layout in LAYOUTS.items()),
        spec(folder, "grow"),
        spec(folder, "masked", masked_steps=[1], layout=LAYOUTS["uneven"]),
        spec(folder, "calm", dropout=0.3),
        spec(folder, "half", config={"precision": "bfloat16"}, layout=LAYOUTS["idle"]),
        spec(folder, "term", dropout=0.3, faults={1: {4: "term"}}),
        spec(folder, "poison", poison={"s3.5": float("inf")}, expect="NonFiniteError"),
        spec(folder, "differ", draft_seed=[0, 1], expect="ValueError"),
        spec(
            folder,
            "stuck",
            config={"collective_timeout_s": 1.5},
            faults={1: {3: "sleep:4"}},
            expect="CollectiveError",
        ),
        spec(folder, "kill", dropout=0.3, faults=kill, expect="CollectiveError"),
    ]
    output = toy.torchrun(specs, folder)
    return Outcome(folder, output, kill)


@pytest.fixture(scope="module")
def again(job: Outcome) -> Outcome:
    """What was killed or stopped in `job`, resumed."""
    specs = [spec(job.folder, name, dropout=0.3) for name in ("kill", "term")]
    output = toy.torchrun(specs, job.folder)
    assert output.endswith("exit code 0"), output
    return Outcome(job.folder, output, job.kill)


def spec(folder: Path, name: str, **more: Any) -> dict[str, Any]:
    base = {"total_steps": STEPS, "layout": EVEN, "config": EVERY_2}
    return {"name": name, "output_dir": str(folder / name), **base, **more}


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def steps_in(folder: Path) -> list[int]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["step"] for line in lines]


@pytest.mark.parametrize("name", [*LAYOUTS, "grow"])
def test_two_ranks_equal_one(job: Outcome, one: Trainer, name: str) -> None:
    two = job.load(name)
    assert distance(two["draft"], one.full_state_dict()) < 1e-6
    assert distance(two["draft"], toy.make_draft().state_dict()) > 1e-3
    moments = {k: v.full_tensor() for k, v in one._optimizer.state().items()}
    assert distance(two["moments"], moments) < 1e-6
    assert two["result"]["samples_trained"] == STEPS * toy.SAMPLES_PER_STEP
    assert two["result"]["resumed_step"] == (3 if name == "grow" else 0)


@pytest.mark.parametrize("name", LAYOUTS)
def test_metrics_are_of_all_ranks(job: Outcome, one: Trainer, name: str) -> None:
    mine = (one._output_dir / "metrics.jsonl").read_text().splitlines()
    theirs = (job.folder / name / "metrics.jsonl").read_text().splitlines()
    assert len(mine) == len(theirs) == STEPS
    for a, b in zip(map(json.loads, mine), map(json.loads, theirs), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-5)
        for key in ("step", "lr", "weight", "samples", "tokens", "metrics"):
            assert a[key] == b[key]


def test_one_rank_reads_two(job: Outcome, world: World, tmp_path: Path) -> None:
    """Another number of ranks: the same bits."""
    trainer = one_rank(world, tmp_path)
    trainer._checkpointer.load(
        job.folder / "uneven" / "checkpoints" / f"step_{STEPS:08d}", trainer._tensors()
    )
    two = job.load("uneven")
    assert distance(trainer.full_state_dict(), two["draft"]) == 0
    moments = {k: v.full_tensor() for k, v in trainer._optimizer.state().items()}
    assert distance(moments, two["moments"]) == 0


def test_one_rank_goes_on_from_two(
    job: Outcome, one: Trainer, world: World, tmp_path: Path
) -> None:
    start = job.folder / "even" / "checkpoints" / "step_00000004"
    trainer = one_rank(world, tmp_path, resume=str(start))
    assert trainer.fit().resumed_step == 4
    assert distance(trainer.full_state_dict(), one.full_state_dict()) < 1e-6


def test_step_without_weight(job: Outcome) -> None:
    result = job.load("masked")["result"]
    assert result["samples_trained"] == (STEPS - 1) * toy.SAMPLES_PER_STEP
    line = json.loads((job.folder / "masked" / "metrics.jsonl").read_text().splitlines()[1])
    assert (line["loss"], line["weight"]) == (None, 0)
    assert job.output.count("step 1 skipped: no rank has a scored token") == 1


def test_bfloat16_with_an_idle_rank(job: Outcome, one: Trainer) -> None:
    half = job.load("half")["draft"]
    whole = one.full_state_dict()
    moved = distance(whole, toy.make_draft().state_dict())
    assert 0 < distance(half, whole) < 0.5 * moved


def test_non_finite_loss_is_named_on_every_rank(job: Outcome) -> None:
    wanted = "step 3: loss or weight is not finite: rank 1 micro-batch 0 (loss inf, weight "
    for text in job.errors("poison"):
        assert text.startswith(wanted)
        assert text.endswith("samples s3.4, s3.5")


def test_drafts_that_differ_are_refused(job: Outcome) -> None:
    for text in job.errors("differ"):
        assert "draft: wanted the same tensors on every rank, but 'block.down.weight'" in text
        assert "(4 differ in all)" in text


def test_stuck_rank_is_an_error_within_the_deadline(job: Outcome) -> None:
    first, _ = job.errors("stuck")
    assert first.startswith("rank 0 of 2: ")
    assert "no answer from another rank (deadline 1.5 s)" in first


def test_sigterm_to_one_rank_stops_all(job: Outcome, again: Outcome) -> None:
    """Only rank 1 was signalled; the worker went on to the next case, so no error came of it."""
    first = torch.load(job.folder / "term" / "term.stopped.pt", weights_only=True)["result"]
    assert (first["stopped_by_signal"], first["steps"]) == (True, 5)
    assert_resumed(again, "term", 5)


def test_kill_at_a_random_step_then_resume(job: Outcome, again: Outcome) -> None:
    """SIGKILL of one rank: the other fails with a clear error; nothing is lost or doubled."""
    [(rank, fault)] = job.kill.items()
    assert not job.output.endswith("exit code 0"), job.output
    error = (job.folder / "kill" / f"kill.error{1 - rank}").read_text()
    assert f"rank {1 - rank} of 2: " in error and "it died or is stuck" in error
    assert_resumed(again, "kill", next(iter(fault)) // 2 * 2)


def assert_resumed(again: Outcome, name: str, start: int) -> None:
    """It went on at `start`, and ended with the bits of the run that nothing disturbed."""
    state, calm = again.load(name), again.load("calm")
    assert state["result"]["resumed_step"] == start, again.kill
    assert state["result"]["samples_trained"] == STEPS * toy.SAMPLES_PER_STEP
    assert distance(state["draft"], calm["draft"]) == 0, again.kill
    assert distance(state["moments"], calm["moments"]) == 0, again.kill
    assert steps_in(again.folder / name) == list(range(1, STEPS + 1)), again.kill
