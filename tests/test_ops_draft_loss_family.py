"""draft_loss for every kind of loss, every source of the target's statistics, and its schedule."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from ops_helpers import assert_no_worse, loss_case
from specforge_ext import ops
from specforge_ext.ops import DraftLoss, KlSchedule, RowLoss, reference

KINDS = [
    RowLoss("hard_ce"),
    RowLoss("soft_ce"),
    RowLoss("soft_ce", temperature=1.6, hard_weight=0.4),
    RowLoss("reverse_kl", temperature=0.7),
    RowLoss("jsd", beta=0.3),
    RowLoss("l1"),
    RowLoss("lk_alpha"),
    RowLoss("lk_alpha", temperature=1.3, hard_weight=0.2),
    RowLoss("lk_lambda"),
]
SOURCES = ["full head", "shipped lse", "shipped lse and argmax"]
STATISTICS = ("step_loss", "step_accepted", "step_top_prob", "step_entropy")


@dataclass(frozen=True)
class Case:
    """Arguments of draft_loss: float32 as they are, or all floats in another dtype."""

    tensors: tuple[Tensor | None, ...]
    keywords: dict[str, Any]

    def to(self, dtype: torch.dtype) -> Case:
        def cast(value: Any) -> Any:
            if not isinstance(value, Tensor) or not value.is_floating_point():
                return value
            return value.detach().to(dtype, copy=True).requires_grad_(value.requires_grad)

        keywords = {name: cast(value) for name, value in self.keywords.items()}
        return Case(tuple(cast(tensor) for tensor in self.tensors), keywords)

    def run(self, module: Any, **options: Any) -> tuple[DraftLoss, Tensor, Tensor]:
        out = module.draft_loss(*self.tensors, **self.keywords, **options)
        hidden, head = self.tensors[:2]
        assert hidden is not None and head is not None
        return out, *torch.autograd.grad(out.loss_sum, (hidden, head))


def family_case(
    loss: RowLoss, source: str, *, rows: int = 41, teachers: int = 13, vocab: int = 301
) -> Case:
    """A target of vocab + 40 words, of which the draft has the first ones."""
    base, wide = loss_case(rows, teachers, vocab), loss_case(1, 1, vocab + 40, seed=5)
    generator = torch.Generator().manual_seed(3)
    label = torch.randint(0, vocab, (teachers,), generator=generator).int()
    keywords: dict[str, Any] = {**base.keywords, "loss": loss}
    if loss.kind == "hard_ce" or loss.hard_weight:
        keywords["label"] = label
    if loss.kind == "hard_ce":
        return Case((base.hidden, base.head, None, None, None), keywords)
    lse, argmax = ops.teacher_stats(
        base.teacher_hidden, wide.teacher_head, temperature=loss.temperature
    )
    given = source != "full head"
    if source == "shipped lse and argmax":
        keywords["teacher_argmax"] = argmax
    teacher_head = wide.teacher_head[:vocab] if given else wide.teacher_head
    tensors = (base.hidden, base.head, base.teacher_hidden, teacher_head, lse if given else None)
    return Case(tensors, keywords)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("loss", KINDS, ids=str)
def test_every_kind_follows_the_definition(loss: RowLoss, source: str) -> None:
    case = family_case(loss, source)
    want, *want_grads = case.to(torch.float64).run(reference)
    base, *base_grads = case.run(reference)
    for options in ({}, {"workspace_bytes": 9 * 341 * 4}):
        out, *grads = case.run(ops, **options)
        for name in STATISTICS:
            values = (getattr(result, name) for result in (out, want, base))
            assert_no_worse(*values, slack=3e-6)
        assert_no_worse(
            out.loss_sum.detach(), want.loss_sum.detach(), base.loss_sum.detach(), slack=3e-6
        )
        assert torch.equal(out.step_rows, want.step_rows)
        assert torch.equal(out.step_correct, want.step_correct)
        for got, truth, baseline in zip(grads, want_grads, base_grads, strict=True):
            assert_no_worse(got, truth, baseline, slack=3e-6)


@pytest.mark.parametrize("loss", KINDS, ids=str)
def test_bfloat16_is_no_worse_than_torch(loss: RowLoss) -> None:
    case = family_case(loss, "full head").to(torch.bfloat16)
    keywords = {
        name: value.float() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in case.keywords.items()
    }
    case = Case(case.tensors, keywords)
    want, *want_grads = case.to(torch.float64).run(reference)
    base, *base_grads = case.run(reference)
    out, *grads = case.run(ops)
    assert_no_worse(out.step_loss, want.step_loss, base.step_loss, slack=2**-8)
    for got, truth, baseline in zip(grads, want_grads, base_grads, strict=True):
        assert got.dtype == torch.bfloat16
        # Norms: l1 and lk_* have steps in q, and which single words rounding moves across is luck.
        error, allowed = (float((x.double() - truth).norm()) for x in (got, baseline))
        assert error <= 1.2 * allowed + 2**-8 * float(truth.norm())


@pytest.mark.parametrize("kind", ["hard_ce", "soft_ce", "reverse_kl", "jsd"])
def test_gradients_are_finite_differences_of_the_definition(kind: str) -> None:
    """Of the smooth kinds: the definition's own gradient, which the op is held to, is checked."""
    case = family_case(RowLoss(kind), "full head", rows=5, teachers=2, vocab=11).to(torch.float64)

    def loss(hidden: Tensor, head: Tensor) -> Tensor:
        rest = case.tensors[2:]
        return reference.draft_loss(hidden, head, *rest, **case.keywords).loss_sum

    assert torch.autograd.gradcheck(loss, case.tensors[:2])


@pytest.mark.parametrize("loss", KINDS, ids=str)
def test_chunks_and_repeats_change_no_row(loss: RowLoss) -> None:
    case = family_case(loss, "full head")
    out, hidden_grad, head_grad = case.run(ops)
    again = case.run(ops)
    assert torch.equal(again[1], hidden_grad) and torch.equal(again[2], head_grad)
    for rows in (2, 7):
        other = case.run(ops, workspace_bytes=rows * 341 * 4)
        torch.testing.assert_close(other[0].step_loss, out.step_loss, rtol=1e-6, atol=1e-6)
        for got, want in zip(other[1:], (hidden_grad, head_grad), strict=True):
            atol = 2e-6 * float(want.abs().max())
            torch.testing.assert_close(got, want, rtol=1e-5, atol=atol)


def test_the_full_head_and_its_statistics_say_the_same() -> None:
    results = [family_case(RowLoss("lk_alpha"), source).run(ops) for source in SOURCES[::2]]
    (full, *full_grads), (shipped, *shipped_grads) = results
    torch.testing.assert_close(full.step_accepted, shipped.step_accepted, rtol=1e-6, atol=0)
    assert torch.equal(full.step_correct, shipped.step_correct)
    for a, b in zip(full_grads, shipped_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_rows_of_the_head_past_the_draft_are_not_read_beside_lse() -> None:
    case = family_case(RowLoss("soft_ce"), "shipped lse")
    hidden, head, teacher_hidden, teacher_head, lse = case.tensors
    assert teacher_head is not None
    poison = torch.full((7, teacher_head.shape[1]), float("nan"))
    longer = dataclasses.replace(
        case, tensors=(hidden, head, teacher_hidden, torch.cat([teacher_head, poison]), lse)
    )
    assert torch.equal(case.run(ops)[1], longer.run(ops)[1])


@pytest.mark.parametrize("loss", KINDS, ids=str)
def test_rows_of_weight_zero_may_hold_nan(loss: RowLoss) -> None:
    case = family_case(loss, "full head")
    clean = case.run(ops)
    hidden = case.tensors[0]
    assert hidden is not None
    dead = case.keywords["row_weight"] == 0
    assert dead.any()
    with torch.no_grad():
        hidden[dead] = float("nan")
    poisoned = case.run(ops)
    assert torch.equal(clean[0].loss_sum, poisoned[0].loss_sum)
    assert torch.equal(clean[1], poisoned[1]) and not poisoned[1][dead].any()
    assert torch.equal(clean[2], poisoned[2])


def test_lk_lambda_phases() -> None:
    """The schedule measured in a first pass, given, and given as weights, are one loss."""
    case = family_case(RowLoss("lk_lambda"), "full head")
    schedule = KlSchedule(scale=0.9, decay=3.0)
    measured = case.run(ops, kl_schedule=schedule)
    acceptance = measured[0].step_accepted / measured[0].step_rows.clamp_min(1)
    given = case.run(ops, kl_schedule=schedule, step_acceptance=acceptance)
    weights = case.run(ops, step_kl_weight=0.9 * torch.exp(-3.0 * acceptance))
    for other in (given, weights):
        torch.testing.assert_close(other[1], measured[1], rtol=1e-6, atol=1e-8)
    soft = dataclasses.replace(case, keywords={**case.keywords, "loss": "soft_ce"}).run(ops)
    only_kl = case.run(ops, step_kl_weight=torch.ones(7))
    torch.testing.assert_close(only_kl[1], soft[1])
    other = case.run(ops, step_acceptance=torch.zeros(7), kl_schedule=KlSchedule(decay=9.0))
    torch.testing.assert_close(other[1], soft[1])
    assert not torch.allclose(measured[1], soft[1])


def test_without_gradients_there_are_only_statistics() -> None:
    case = family_case(RowLoss("jsd"), "full head")
    out, _, _ = case.run(ops)
    with torch.no_grad():
        quiet = ops.draft_loss(*case.tensors, **case.keywords)
    assert torch.equal(quiet.loss_sum, out.loss_sum) and not quiet.loss_sum.requires_grad
    assert torch.equal(quiet.step_entropy, out.step_entropy)


def test_lk_lambda_compiles() -> None:
    case = family_case(RowLoss("lk_lambda"), "full head")
    hidden, head, *rest = case.tensors

    def loss(hidden: Tensor, head: Tensor) -> Tensor:
        return ops.draft_loss(hidden * 2, head, *rest, **case.keywords).loss_sum

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert hidden is not None and head is not None
    eager = torch.autograd.grad(loss(hidden, head), (hidden, head))
    grads = torch.autograd.grad(compiled(hidden, head), (hidden, head))
    assert all(torch.equal(a, b) for a, b in zip(eager, grads, strict=True))


def test_draft_first_permutation() -> None:
    t2d = torch.tensor([False, True, False, False, True])
    assert ops.draft_first_permutation(t2d).tolist() == [1, 4, 0, 2, 3]


@pytest.mark.parametrize(
    ("loss", "changes", "match"),
    [
        ("soft_ce", {"teacher_hidden": None}, "teacher_hidden must be given with RowLoss.*soft_ce"),
        ("soft_ce", {"teacher_head": None}, "teacher_head must be given with"),
        ("soft_ce", {"label": torch.zeros(13).int()}, "label must be None with"),
        ("hard_ce", {"label": None}, "label must be given with RowLoss.*hard_ce"),
        ("hard_ce", {"teacher_hidden": torch.ones(13, 16)}, "teacher_hidden must be None with"),
        ("hard_ce", {"teacher_lse": torch.ones(13)}, "teacher_lse must be None with"),
        ("hard_ce", {"label": torch.zeros(13)}, r"label must be \[13\] int32, got \[13\] float32"),
        (
            "jsd",
            {"teacher_argmax": torch.zeros(13).int()},
            "teacher_argmax must be None without teacher_lse",
        ),
        (
            "soft_ce",
            {"teacher_head": torch.ones(300, 16)},
            r"teacher_head must be \[301, 16\] float32, got \[300, 16\]",
        ),
        ("soft_ce", {"kl_schedule": KlSchedule()}, "are for lk_lambda, got one with .*soft_ce"),
        ("lk_alpha", {"step_kl_weight": torch.ones(7)}, "are for lk_lambda, got one with .*alpha"),
        ("lk_lambda", {"step_kl_weight": torch.ones(6)}, r"step_kl_weight must be \[7\] float32"),
        ("lk_lambda", {"step_acceptance": torch.ones(6)}, r"step_acceptance must be \[7\] float32"),
        (RowLoss("jsd", beta=1.0), {}, "beta must be between 0 and 1, got 1"),
        (RowLoss("jsd", temperature=0.0), {}, "temperature must be finite and above 0, got 0"),
        ("kl", {}, "loss_rows: kind must be .*kl"),
    ],
)
def test_what_does_not_fit_is_named(
    loss: RowLoss | str, changes: dict[str, Any], match: str
) -> None:
    spec = RowLoss(loss) if isinstance(loss, str) else loss
    case = family_case(spec, "full head") if spec.kind == "hard_ce" else None
    case = case or family_case(RowLoss("soft_ce"), "full head")
    names = ("hidden", "head", "teacher_hidden", "teacher_head", "teacher_lse")
    tensors = [changes.get(name, value) for name, value in zip(names, case.tensors, strict=True)]
    rest = {name: value for name, value in changes.items() if name not in names}
    with pytest.raises(ValueError, match=match):
        ops.draft_loss(*tensors, **{**case.keywords, "loss": loss, **rest})
