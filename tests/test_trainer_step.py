"""One rank: what a step computes, against plain torch; and what it refuses."""

from __future__ import annotations

import copy
import functools
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import trainer_toy as toy
from specforge_ext.config import parse
from specforge_ext.records import StepContext, StepLoss
from specforge_ext.trainer.config import TrainerConfig
from specforge_ext.trainer.distributed import World, open_world
from specforge_ext.trainer.loop import Trainer, TrainResult
from specforge_ext.trainer.schedule import learning_rate
from specforge_ext.trainer.step import NonFiniteError
from specforge_ext.trainer.sums import MetricSums, report

State = dict[str, Tensor]


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with open_world(device="cpu", timeout_s=30) as world:
        yield world


def train(
    world: World,
    folder: Path,
    *,
    layout: toy.Layout = toy.ONE_RANK,
    steps: int = 5,
    dropout: float = 0.0,
    method: toy.ToyMethod | None = None,
    masked_steps: tuple[int, ...] = (),
    **settings: Any,
) -> tuple[State, Trainer, TrainResult]:
    trainer = Trainer(
        toy.config(**settings),
        method or toy.ToyMethod(),
        toy.make_draft(dropout=dropout),
        toy.ToySource(steps, layout, masked_steps=masked_steps),
        output_dir=folder,
        world=world,
    )
    result = trainer.fit()
    return trainer.full_state_dict(), trainer, result


def plain_torch(config: TrainerConfig, steps: int) -> State:
    """The same training, written out."""
    draft = toy.make_draft()
    adam = torch.optim.AdamW(
        draft.parameters(), betas=config.betas, weight_decay=config.weight_decay
    )
    for step in range(steps):
        at = StepContext(step=step, total_steps=steps, seed=0)
        loss = toy.ToyMethod().step(draft, toy.make_batch(step, range(toy.SAMPLES_PER_STEP)), at)
        adam.zero_grad()
        (loss.loss_sum / loss.weight_sum).backward()
        if config.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(draft.parameters(), config.clip_norm)
        adam.param_groups[0]["lr"] = learning_rate(config, step, steps)
        adam.step()
    return draft.state_dict()


def distance(a: State, b: State) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name].detach() - b[name].detach()).abs().max()) for name in a)


@pytest.mark.parametrize("clip_norm", [None, 0.5, 1e9])
@pytest.mark.parametrize("units", [True, False])
def test_equals_plain_torch(
    world: World, tmp_path: Path, clip_norm: float | None, units: bool
) -> None:
    settings = {"clip_norm": clip_norm, "weight_decay": 0.1}
    state, _, _ = train(world, tmp_path, method=toy.ToyMethod(units=units), **settings)
    wanted = plain_torch(toy.config(**settings), 5)
    assert distance(state, wanted) < 1e-6
    assert distance(state, toy.make_draft().state_dict()) > 1e-3


def test_accumulation_equals_one_batch(world: World, tmp_path: Path) -> None:
    whole, _, _ = train(world, tmp_path / "whole")
    cut, _, result = train(world, tmp_path / "cut", layout=[[[0], [1, 2, 3, 4, 5], [6, 7]]])
    assert distance(whole, cut) < 1e-6
    assert result.samples_trained == 5 * toy.SAMPLES_PER_STEP


def test_same_seed_same_bits(world: World, tmp_path: Path) -> None:
    states = [
        train(world, tmp_path / str(i), dropout=0.3, seed=seed)[0]
        for i, seed in enumerate((1, 1, 2))
    ]
    assert distance(states[0], states[1]) == 0
    assert distance(states[0], states[2]) > 1e-4


def test_activation_checkpointing_changes_no_bit(world: World, tmp_path: Path) -> None:
    plain, before, _ = train(world, tmp_path / "plain", dropout=0.3)
    checkpointed, after, _ = train(
        world, tmp_path / "checkpointed", dropout=0.3, activation_checkpointing=True
    )
    assert distance(plain, checkpointed) == 0
    calls = [trainer._shards.draft.block.calls for trainer in (before, after)]
    assert calls[1] == 2 * calls[0] == 2 * 5 * toy.DEPTH


def test_activation_checkpointing_wants_units(world: World, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="wanted a method with recompute units"):
        train(world, tmp_path, method=toy.ToyMethod(units=False), activation_checkpointing=True)


def test_bfloat16(world: World, tmp_path: Path) -> None:
    seen: list[tuple[torch.dtype, torch.dtype]] = []
    draft = toy.make_draft()
    draft.block.register_forward_hook(
        lambda block, _args, out: seen.append((block.up.weight.dtype, block.up(out).dtype))
    )
    cut: toy.Layout = [[[0, 1, 2], [3, 4, 5, 6, 7]]]
    settings: dict[str, Any] = {"lr": 1e-3, "precision": "bfloat16"}
    trainer = Trainer(
        toy.config(**settings), toy.ToyMethod(), draft, toy.ToySource(5, cut),
        output_dir=tmp_path / "half", world=world,
    )  # fmt: skip
    trainer.fit()
    half = trainer.full_state_dict()
    full, _, _ = train(world, tmp_path / "full", lr=1e-3, layout=cut)
    assert set(seen) == {(torch.bfloat16, torch.bfloat16)}
    assert {t.dtype for t in half.values()} == {torch.float32}
    moved = distance(full, toy.make_draft().state_dict())
    assert 0 < distance(half, full) < 0.5 * moved


@pytest.mark.parametrize("units", [True, False])
def test_compiled_graphs_are_what_runs(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, units: bool
) -> None:
    """With a backend that counts, because the real one takes 15 s; its graphs run eagerly."""
    runs: list[int] = []

    def counting(graph: torch.fx.GraphModule, _inputs: list[Tensor]) -> Any:
        def run(*args: Any) -> Any:
            runs.append(1)
            return graph.forward(*args)

        return run

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counting))
    method = toy.ToyMethod(units=units)
    compiled, _, _ = train(world, tmp_path / "compiled", method=method, compile=True)
    plain, _, _ = train(world, tmp_path / "plain", method=method)
    assert len(runs) == 5 * (toy.DEPTH if units else 1)
    assert distance(compiled, plain) < 1e-6


def test_step_without_weight_is_skipped(
    world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "specforge_ext.trainer")
    # Weight decay and Adam's momentum would move parameters even where the gradient is 0.
    source = toy.ToySource(2, masked_steps=(1,))
    trainer = Trainer(
        toy.config(weight_decay=0.1), toy.ToyMethod(), toy.make_draft(), source,
        output_dir=tmp_path, world=world,
    )  # fmt: skip
    data = list(source.iterate(0))
    trainer._step.run(data[0])
    before = trainer.full_state_dict()
    report = trainer._step.run(data[1])
    assert (report.skipped, report.loss, report.weight, report.grad_norm) == (True, None, 0, 0)
    assert distance(before, trainer.full_state_dict()) == 0
    assert trainer._optimizer.updates == 1
    assert "step 1 skipped: no rank has a scored token (weight 0)" in caplog.text


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_non_finite_loss(world: World, tmp_path: Path, value: float) -> None:
    method = toy.ToyMethod(poison={"s0.5": value})
    wanted = r"step 0: loss or weight is not finite: rank 0 micro-batch 1 .*: samples s0\.4, s0\.5$"
    with pytest.raises(NonFiniteError, match=wanted):
        train(world, tmp_path, layout=[[[0, 1], [4, 5], [6]]], method=method)


def test_non_finite_gradient_leaves_the_parameters(world: World, tmp_path: Path) -> None:
    class Kink(toy.ToyMethod):
        def step(self, draft: Any, batch: Any, at: StepContext) -> StepLoss:
            loss = super().step(draft, batch, at)
            kink = (draft.scale * 0).sqrt().sum()  # value 0, slope 0 * inf
            return StepLoss(loss.loss_sum + kink, loss.weight_sum)

    trainer = Trainer(
        toy.config(), Kink(), toy.make_draft(), toy.ToySource(1, [[[3, 4]]]),
        output_dir=tmp_path, world=world,
    )  # fmt: skip
    with pytest.raises(
        NonFiniteError, match=r"step 0: loss is finite, its gradient is not: .*s0\.3"
    ):
        trainer.fit()
    assert distance(trainer.full_state_dict(), toy.make_draft().state_dict()) == 0


def test_headline_must_be_a_ratio(world: World, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"headline_metric: wanted one of .*correct, got 'nope'"):
        train(world, tmp_path, headline_metric="nope")


def test_data_must_be_the_steps_in_order(world: World, tmp_path: Path) -> None:
    class Broken(toy.ToySource):
        first = 0

        def iterate(self, start_step: int) -> Any:
            yield from list(super().iterate(start_step))[self.first :][:2]

    def fit(first: int) -> None:
        source = Broken(5)
        source.first = first
        Trainer(
            toy.config(), toy.ToyMethod(), toy.make_draft(), source,
            output_dir=tmp_path, world=world,
        ).fit()  # fmt: skip

    with pytest.raises(ValueError, match="wanted step 0, got 1"):
        fit(1)
    with pytest.raises(ValueError, match="wanted 5 steps, but the data ended after 2"):
        fit(0)


def test_draft_must_have_something_to_train(world: World, tmp_path: Path) -> None:
    draft = toy.make_draft().requires_grad_(False)
    with pytest.raises(ValueError, match="draft: wanted a parameter that requires a gradient"):
        Trainer(
            toy.config(), toy.ToyMethod(), draft, toy.ToySource(1),
            output_dir=tmp_path, world=world,
        )  # fmt: skip


def test_frozen_parameters_stay(world: World, tmp_path: Path) -> None:
    draft = toy.make_draft()
    draft.scale.requires_grad_(False)
    trainer = Trainer(
        toy.config(), toy.ToyMethod(), draft, toy.ToySource(3), output_dir=tmp_path, world=world
    )
    trainer.fit()
    state, fresh = trainer.full_state_dict(), toy.make_draft().state_dict()
    assert torch.equal(state["scale"], fresh["scale"])
    assert not torch.equal(state["block.up.weight"], fresh["block.up.weight"])


def test_max_steps_is_the_end_of_the_schedule(world: World, tmp_path: Path) -> None:
    short, _, result = train(world, tmp_path / "short", steps=3)
    cut, _, _ = train(world, tmp_path / "cut", steps=5, max_steps=3)
    assert result.steps == 3
    assert distance(short, cut) == 0


@pytest.mark.parametrize(
    ("schedule", "wanted"),
    [
        ("constant", [0.5, 1, 1, 1, 1, 1]),
        ("linear", [0.5, 1, 1, 0.75, 0.5, 0.25]),
        ("cosine", [0.5, 1, 1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2]),
    ],
)
def test_schedule(schedule: str, wanted: list[float]) -> None:
    config = toy.config(lr=0.2, warmup_ratio=0.3, schedule=schedule)
    rates = [learning_rate(config, step, 6) / 0.2 for step in range(6)]
    assert rates == pytest.approx(wanted)
    assert learning_rate(config, 6, 6) == pytest.approx(0.2 if schedule == "constant" else 0)


def test_schedule_without_warmup_starts_at_the_top() -> None:
    assert learning_rate(toy.config(lr=0.2, warmup_ratio=0), 0, 6) == 0.2
    assert learning_rate(toy.config(lr=0.2, warmup_ratio=1), 5, 6) == 0.2


def test_ratios_and_plain_sums() -> None:
    sums = {
        "right": torch.tensor([1.0, 3.0]),
        "seen": torch.tensor([4.0, 0.0]),
        "half": torch.tensor(1.0),
        "all": torch.tensor(2.0),
        "rows": torch.tensor(7.0),
    }
    out = report(sums, {"right": "seen", "half": "all"})
    assert out == {"right": [0.25, None], "half": 0.5, "rows": 7.0}


@pytest.mark.parametrize(
    ("metrics", "ratios", "message"),
    [
        (
            {"x": [1.0, 2.0]},
            {"x": "y"},
            r"StepLoss.ratios\['x'\]: wanted one of the metrics old, x, got 'y'",
        ),
        (
            {"x": [[1.0]]},
            {},
            r"StepLoss.metrics\['x'\] of rank 0: wanted \[\] or \[K\], got \[1, 1\]",
        ),
        ({"old": [1.0]}, {}, r"StepLoss.metrics\['old'\] of rank 0: wanted \[2\], got \[1\]"),
    ],
)
def test_contradictory_metrics(
    world: World, metrics: dict[str, Any], ratios: dict[str, str], message: str
) -> None:
    def loss(values: dict[str, Any], ratios: dict[str, str]) -> StepLoss:
        tensors = {name: torch.tensor(value) for name, value in values.items()}
        return StepLoss(torch.zeros(()), torch.zeros(()), tensors, ratios)

    sums = MetricSums(world)
    sums.add(loss({"old": [1.0, 2.0]}, {}))
    assert sums.is_unknown()
    sums.agree()
    assert not sums.is_unknown()
    assert sums.reduce()["old"].tolist() == [1.0, 2.0]
    sums.add(loss(metrics, ratios))
    assert sums.is_unknown()
    with pytest.raises(ValueError, match=message):
        sums.agree()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"lrr": 1}, "trainer.lrr: unknown key 'lrr', did you mean 'lr'"),
        ({"lr": 0}, "trainer.lr: .*greater than 0, got 0"),
        ({"precision": "fp8"}, "trainer.precision: .*'float32' or 'bfloat16', got 'fp8'"),
        ({"checkpoint": {"keep_best": True}}, "checkpoint.keep_best wants headline_metric"),
    ],
)
def test_config_errors(data: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(TrainerConfig, data, where="trainer")


def test_half_of_torchrun_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    wanted = r"wanted all of RANK, .*got none of WORLD_SIZE"
    with pytest.raises(ValueError, match=wanted), open_world(device="cpu"):
        pass


def test_unknown_device_is_refused() -> None:
    wanted = "device: wanted auto, cpu or cuda, got 'tpu'"
    with pytest.raises(ValueError, match=wanted), open_world(device="tpu"):
        pass


def test_the_draft_is_not_copied(world: World, tmp_path: Path) -> None:
    """The caller's draft is the one that is trained, whole again after a gather."""
    draft = toy.make_draft()
    fresh = copy.deepcopy(draft.state_dict())
    trainer = Trainer(
        toy.config(), toy.ToyMethod(), draft, toy.ToySource(2), output_dir=tmp_path, world=world
    )
    trainer.fit()
    assert trainer._shards.draft is draft
    assert distance(trainer.full_state_dict(), fresh) > 1e-3
