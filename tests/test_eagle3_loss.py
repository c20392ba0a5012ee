"""The losses of an EAGLE-3 step: per row as defined, weighted as configured, SpecForge's LK."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import eagle3_cases as cases
from specforge_ext.config import parse
from specforge_ext.methods.eagle3 import Eagle3Config, Eagle3Method
from specforge_ext.methods.eagle3.model import Eagle3Draft
from specforge_ext.ops import KlSchedule, RowLoss, reference
from specforge_ext.records import PackedBatch, StepLoss, TargetWeights

LENGTHS = (17, 5, 1, 23)
KINDS = [
    RowLoss("soft_ce", temperature=1.7),
    RowLoss("reverse_kl"),
    RowLoss("jsd"),
    RowLoss("l1"),
    RowLoss("lk_alpha"),
    RowLoss("lk_alpha", temperature=0.8),
    RowLoss("lk_lambda"),
]


def run(
    method: Eagle3Method, draft: Eagle3Draft, packed: PackedBatch
) -> tuple[StepLoss, dict[str, Tensor]]:
    draft.zero_grad(set_to_none=True)
    result = method.step(draft, packed, cases.AT)
    result.loss_sum.backward()
    return result, cases.gradients(draft)


def assert_near(got: dict[str, Tensor], expected: dict[str, Tensor], *, tolerance: float) -> None:
    """Largest difference of each tensor against its own largest value."""
    for name, value in expected.items():
        scale = float(value.abs().max()) or 1.0
        error = float((got[name].double() - value.double()).abs().max()) / scale
        assert error <= tolerance, (name, error)


def scored_rows(
    parameters: dict[str, Tensor], draft: Eagle3Draft, weights: TargetWeights, packed: PackedBatch
) -> tuple[Tensor, Tensor, Tensor]:
    """float64 (student [N, Vd], target [N, V] with the draft's words first, step [N])."""
    order = torch.cat([draft.t2d.nonzero()[:, 0], (~draft.t2d).nonzero()[:, 0]])
    student, teacher, steps = [], [], []
    for sample in cases.separate(packed):
        logits = cases.dense_logits(parameters, draft, weights, sample)
        target = sample.features["last"].double() @ weights.lm_head.double().T
        for i in range(draft.config.ttt_length):
            for t in range(sample.num_tokens - 1 - i):
                row = target[t + i + 1]
                if sample.loss_mask[t + i] and draft.t2d[row.argmax()]:
                    student.append(logits[i][t])
                    teacher.append(row[order])
                    steps.append(i)
    return torch.stack(student), torch.stack(teacher), torch.tensor(steps)


def defined_loss(
    loss: RowLoss,
    schedule: KlSchedule,
    rows: tuple[Tensor, Tensor, Tensor],
    *,
    decay: float,
    padded: int | None,
) -> Tensor:
    """The sum over rows; with `padded` positions, acceptance as a mean over the step's rows."""
    student, teacher, step = rows
    one_each = torch.arange(len(step), dtype=torch.int32)
    ones = torch.ones(len(step), dtype=torch.float64)

    def row_loss(loss: RowLoss, kl_weight: Tensor | None = None) -> reference.LossRows:
        return reference.loss_rows(
            student, teacher, loss=loss, row_to_teacher=one_each, weight=ones, kl_weight=kl_weight
        )

    count = torch.bincount(step).double()
    weight = decay ** step.double()
    mean = torch.ones_like(weight) if padded is None else (padded / count)[step]
    if loss.kind == "lk_lambda":
        soft = row_loss(RowLoss("soft_ce", temperature=loss.temperature))
        acceptance = torch.zeros_like(count).index_add_(0, step, soft.accepted.detach()) / count
        w = schedule.weight(acceptance)[step]
        return (weight * (w * soft.loss + (1 - w) * mean * (1 - soft.accepted))).sum()
    if loss.kind != "lk_alpha":
        mean = torch.ones_like(weight)
    return (weight * mean * row_loss(loss).loss).sum()


@pytest.mark.parametrize("denominator", ["scored", "all_positions_mean"])
@pytest.mark.parametrize("loss", KINDS, ids=str)
def test_step_is_the_dense_definition(loss: RowLoss, denominator: str) -> None:
    options: dict[str, Any] = {"kl_scale": 0.9, "kl_decay": 2.5, "denominator": denominator}
    weights = cases.target()
    method, draft, _ = cases.build(
        weights=weights, loss=loss.kind, temperature=loss.temperature, **options
    )
    packed = cases.batch(LENGTHS, seed=3)
    parameters = cases.double_parameters(draft)
    padded = len(LENGTHS) * max(LENGTHS) if denominator == "all_positions_mean" else None
    expected = defined_loss(
        loss,
        KlSchedule(scale=0.9, decay=2.5),
        scored_rows(parameters, draft, weights, packed),
        decay=draft.config.step_decay,
        padded=padded,
    )
    expected.backward()
    result, got = run(method, draft, packed)
    assert result.loss_sum.item() == pytest.approx(expected.item(), rel=5e-6)
    wanted = {name: p.grad for name, p in parameters.items() if p.grad is not None}
    assert_near(got, wanted, tolerance=5e-5)


@pytest.mark.parametrize("options", [{"loss": "lk_alpha"}, {"loss": "lk_lambda", "kl_decay": 0.0}])
def test_packed_is_separate(options: dict[str, object]) -> None:
    """Where no weight of a row depends on the others."""
    method, draft, _ = cases.build(**options, kl_scale=0.6)
    packed = cases.batch((19, 1, 8, 33))
    whole, got = run(method, draft, packed)
    parts = [run(method, draft, sample) for sample in cases.separate(packed)]
    loss = sum(part.loss_sum.item() for part, _ in parts)
    assert whole.loss_sum.item() == pytest.approx(loss, rel=1e-6)
    summed = {name: torch.stack([g[name] for _, g in parts]).sum(0) for name in got}
    assert_near(got, summed, tolerance=3e-6)


@pytest.mark.parametrize("kind", ["lk_alpha", "lk_lambda"])
@pytest.mark.parametrize("denominator", ["scored", "all_positions_mean"])
def test_nothing_scored_is_zero(kind: str, denominator: str) -> None:
    method, draft, _ = cases.build(loss=kind, denominator=denominator)
    result, got = run(method, draft, cases.batch((7, 5), density=0.0))
    assert result.loss_sum.item() == 0
    assert all((g == 0).all() for g in got.values())


def specforge_losses(
    kind: str,
    parameters: dict[str, Tensor],
    draft: Eagle3Draft,
    weights: TargetWeights,
    packed: PackedBatch,
) -> Tensor:
    """SpecForge's own functions over the padded batch, summed over steps with their decay."""
    lk = pytest.importorskip("specforge.core.lk_loss", reason="`make peers` installs SpecForge")
    compute_loss = pytest.importorskip("specforge.core.loss")._compute_loss
    config, samples = draft.config, cases.separate(packed)
    shape = (len(samples), max(packed.lengths))
    target_p, on_draft = (torch.zeros(*shape, int(draft.t2d.sum())).double() for _ in range(2))
    mask = torch.zeros(*shape, 1).double()
    logits = [torch.zeros_like(target_p) for _ in range(config.ttt_length)]
    for b, sample in enumerate(samples):
        n = sample.num_tokens
        for i, rows in enumerate(cases.dense_logits(parameters, draft, weights, sample)):
            logits[i] = torch.index_put(logits[i], (torch.full((n,), b), torch.arange(n)), rows)
        # Row u is scored against the target's row u + 1.
        target = sample.features["last"].double()[1:] @ weights.lm_head.double().T
        target_p[b, : n - 1] = torch.softmax(target[:, draft.t2d], -1)
        on_draft[b, : n - 1] = torch.softmax(target, -1)[:, draft.t2d]
        in_draft = draft.t2d[target.argmax(-1)]
        mask[b, : n - 1, 0] = (sample.loss_mask[:-1].bool() & in_draft).double()
    total = torch.zeros((), dtype=torch.float64)

    def ahead(x: Tensor, i: int) -> Tensor:
        return torch.cat([x[:, i:], torch.zeros_like(x[:, :i])], 1)

    for i in range(config.ttt_length):
        p, on, m = (ahead(x, i) for x in (target_p, on_draft, mask))
        kl = compute_loss(logits[i], p, m)
        rate, log_rate = lk.compute_acceptance_rate(
            logits=logits[i], target_probs=on, position_mask=m
        )
        loss = lk.compute_lk_loss(
            kl_loss=kl,
            acceptance_rate=rate,
            log_acceptance_rate=log_rate,
            lk_loss_type=kind,
            kl_scale=config.kl_scale,
            kl_decay=config.kl_decay,
        )
        total = total + config.step_decay**i * loss
    return total


@pytest.mark.peer
@pytest.mark.parametrize("kind", ["alpha", "lambda"])
def test_lk_is_that_of_specforge(kind: str) -> None:
    method, draft, weights = cases.build(
        loss=f"lk_{kind}", denominator="all_positions_mean", kl_decay=2.0
    )
    packed = cases.batch((21, 9, 16), seed=4)
    parameters = cases.double_parameters(draft)
    with torch.compiler.set_stance("force_eager"):
        expected = specforge_losses(kind, parameters, draft, weights, packed)
    expected.backward()
    result, got = run(method, draft, packed)
    loss = result.loss_sum.item() / result.weight_sum.item()
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    wanted = {
        name: p.grad * result.weight_sum.double()
        for name, p in parameters.items()
        if p.grad is not None
    }
    assert_near(got, wanted, tolerance=1e-4)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"loss": "hard_ce"}, "loss.*soft_ce.*lk_lambda"),
        ({"kl_scale": 1.5}, "kl_scale.*less than or equal to 1"),
        ({"kl_decay": -1}, "kl_decay.*greater than or equal to 0"),
        ({"temperature": 0}, "temperature.*greater than 0"),
    ],
)
def test_config_refuses(options: dict[str, object], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        parse(Eagle3Config, options, where="eagle3")
