"""The family of row losses against its definition, on every instruction set this CPU has."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from ops_helpers import assert_no_worse
from specforge_ext import _C, ops
from specforge_ext.ops import RowLoss, reference
from specforge_ext.ops.results import LossRowsResult

DTYPES = [torch.float32, torch.bfloat16]
KINDS = ["hard_ce", "soft_ce", "reverse_kl", "jsd", "l1", "lk_alpha", "lk_lambda"]
RESULTS = ("loss", "accepted", "top_prob", "entropy")


@pytest.fixture(params=_C.available_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    _C.set_isa(request.param)
    yield request.param
    _C.set_isa("auto")


@dataclass(frozen=True)
class Case:
    """Inputs of one call."""

    spec: RowLoss
    logits: Tensor
    teacher: Tensor | None
    sides: dict[str, Tensor] = field(default_factory=dict)

    def run(self, *, writes_gradient: bool = True) -> tuple[LossRowsResult, Tensor]:
        """(results, the logits after the call)."""
        logits = self.logits.clone()
        out = ops.loss_rows_(
            logits, self.teacher, loss=self.spec, writes_gradient=writes_gradient, **self.sides
        )
        return out, logits

    def define(self, dtype: torch.dtype) -> reference.LossRows:
        sides = {k: v.to(dtype) if v.is_floating_point() else v for k, v in self.sides.items()}
        teacher = None if self.teacher is None else self.teacher.to(dtype)
        return reference.loss_rows(self.logits.to(dtype), teacher, loss=self.spec, **sides)

    def rows(self, index: Any) -> Case:
        per_row = {
            name: side[index].contiguous() if name in PER_ROW else side
            for name, side in self.sides.items()
        }
        return replace(self, logits=self.logits[index].clone(), sides=per_row)


PER_ROW = ("row_to_teacher", "weight", "kl_weight")


def make(
    kind: str,
    rows: int = 11,
    teachers: int = 3,
    vocab: int = 33,
    *,
    extra: int = 0,
    lse: bool = False,
    dtype: torch.dtype = torch.float32,
    teacher_dtype: torch.dtype = torch.float32,
    temperature: float = 1.0,
    beta: float = 0.5,
    hard_weight: float = 0.0,
    seed: int = 0,
) -> Case:
    """extra: columns of the teacher past vocab. lse: with teacher_lse, from all of its columns."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * 3

    weight = torch.randn(rows, generator=generator)
    weight[1::4] = 0
    logits = randn(rows, vocab).to(dtype)
    teacher = randn(teachers, vocab + extra).to(teacher_dtype) if kind != "hard_ce" else None
    index = torch.randint(0, max(teachers, 1), (rows,), generator=generator).sort().values
    sides = {"row_to_teacher": index.to(torch.int32), "weight": weight}
    if kind == "hard_ce" or hard_weight:
        sides["label"] = torch.randint(0, vocab, (teachers,), generator=generator).to(torch.int32)
    if kind == "lk_lambda":
        sides["kl_weight"] = torch.rand(rows, generator=generator)
    if lse and teacher is not None:
        sides["teacher_lse"] = torch.logsumexp(teacher.double() / temperature, dim=-1).float()
        sides["teacher_argmax"] = reference.lowest_argmax(teacher)
    return Case(RowLoss(kind, temperature, beta, hard_weight), logits, teacher, sides)


# The gradients of these two are differences of logarithms and of their mean.
ROUNDED_LOGS = {"reverse_kl": 1.5e-6, "jsd": 1.5e-6}


def check(case: Case, *, slack: float = 5e-7) -> None:
    slack = max(slack, ROUNDED_LOGS.get(case.spec.kind, 0))
    want, base = case.define(torch.float64), case.define(torch.float32)
    out, gradient = case.run()
    for name in RESULTS:
        assert_no_worse(getattr(out, name), getattr(want, name), getattr(base, name), slack=slack)
    assert torch.equal(out.correct, want.correct)
    assert_no_worse(gradient, want.gradient, base.gradient.to(gradient.dtype), slack=slack)
    assert not gradient[case.sides["weight"] == 0].any()


# ---- the definition itself ----------------------------------------------------------------------


@pytest.mark.parametrize("lse", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_definitions_gradient_is_that_of_its_value(kind: str, lse: bool) -> None:
    hard_weight = 0.0 if kind == "hard_ce" else 0.7
    case = make(kind, extra=5, lse=lse, temperature=1.7, beta=0.3, hard_weight=hard_weight)
    logits = case.logits.double().requires_grad_()
    sides = {k: v.double() if v.is_floating_point() else v for k, v in case.sides.items()}
    teacher = None if case.teacher is None else case.teacher.double()
    out = reference.loss_rows(logits, teacher, loss=case.spec, **sides)
    (wanted,) = torch.autograd.grad((sides["weight"] * out.loss).sum(), logits)
    assert wanted.abs().max() > 1e-3
    torch.testing.assert_close(out.gradient.detach(), wanted, rtol=1e-10, atol=1e-12)


def test_the_definition_on_rows_one_can_check_by_hand() -> None:
    p, q = torch.tensor([0.5, 0.5], dtype=torch.float64), torch.tensor([0.25, 0.75]).double()
    m = (p + q) / 2
    values = {
        "soft_ce": -(p * q.log()).sum(),
        "reverse_kl": (q * (q / p).log()).sum(),
        "jsd": ((p * (p / m).log()).sum() + (q * (q / m).log()).sum()) / 2,
        "l1": torch.tensor(0.5).double(),
        "lk_alpha": -torch.tensor(0.75).double().log(),
        "lk_lambda": 0.2 * -(p * q.log()).sum() + 0.8 * 0.25,
    }
    for kind, value in values.items():
        kl_weight = {"kl_weight": torch.tensor([0.2]).double()} if kind == "lk_lambda" else {}
        out = reference.loss_rows(
            q.log()[None] + 7,
            p.log()[None] - 3,
            loss=kind,
            row_to_teacher=torch.tensor([0]),
            weight=torch.ones(1).double(),
            **kl_weight,
        )
        torch.testing.assert_close(out.loss[0], value, rtol=1e-7, atol=0)
        torch.testing.assert_close(float(out.accepted), 0.75)


# ---- the kernel against it ----------------------------------------------------------------------


# 1; a vector of 4, 8 or 16 and one more; a block of 1024 and one more; a prime of many.
@pytest.mark.parametrize("vocab", [1, 17, 1025, 5003])
@pytest.mark.parametrize("teacher_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_rows_follow_the_definition(
    isa: str, kind: str, dtype: torch.dtype, teacher_dtype: torch.dtype, vocab: int
) -> None:
    check(make(kind, vocab=vocab, dtype=dtype, teacher_dtype=teacher_dtype))


@pytest.mark.parametrize("vocab", [7, 8, 16, 1023, 1024])
@pytest.mark.parametrize("kind", KINDS)
def test_vocabularies_around_a_vector_and_a_block(isa: str, kind: str, vocab: int) -> None:
    check(make(kind, vocab=vocab))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [0.25, 2.5])
@pytest.mark.parametrize("kind", KINDS)
def test_temperature_beta_and_hard_weight(
    isa: str, kind: str, temperature: float, dtype: torch.dtype
) -> None:
    hard_weight = 0.0 if kind == "hard_ce" else 0.3
    case = make(
        kind,
        vocab=1031,
        dtype=dtype,
        temperature=temperature,
        beta=0.2,
        hard_weight=hard_weight,
        extra=40,
    )
    check(case, slack=1e-6)


@pytest.mark.parametrize(
    ("rows", "teachers"),
    [
        (0, 3),  # nothing
        (0, 0),  # not even teachers
        (1, 1),  # one row
        (7, 1),  # as many students as a TTT of 7 gives one teacher
        (53, 1),  # more than one thread's share of a teacher
        (3, 11),  # teachers without students
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_numbers_of_rows(kind: str, rows: int, teachers: int) -> None:
    check(make(kind, rows, teachers))


@pytest.mark.parametrize("kind", KINDS)
def test_a_teacher_of_its_own_for_every_row_in_any_order(isa: str, kind: str) -> None:
    case = make(kind, rows=6, teachers=6)
    case.sides["row_to_teacher"][:] = torch.tensor([4, 0, 5, 1, 3, 2])
    check(case)


@pytest.mark.parametrize("kind", KINDS)
def test_a_real_vocabulary(kind: str) -> None:
    check(make(kind, rows=2, teachers=1, vocab=151936, dtype=torch.bfloat16))


def test_a_vocabulary_of_2_to_the_18_beside_a_larger_one() -> None:
    case = make("jsd", 1, 1, 262144, extra=1000, teacher_dtype=torch.bfloat16, hard_weight=0.1)
    check(case)


# ---- mass of the teacher outside of the draft's vocabulary --------------------------------------


@pytest.mark.parametrize("extra", [1, 16, 1500])
@pytest.mark.parametrize("kind", KINDS[1:])
def test_teachers_with_a_larger_vocabulary(isa: str, kind: str, extra: int) -> None:
    case = make(kind, vocab=1031, extra=extra)
    assert case.teacher is not None
    case.teacher[1, -1] = 20  # its first choice, and nearly all of its mass
    check(case)
    assert not case.run()[0].correct[case.sides["row_to_teacher"] == 1].any()


@pytest.mark.parametrize("kind", KINDS[1:])
def test_statistics_that_are_given_replace_the_other_columns(isa: str, kind: str) -> None:
    case = make(kind, vocab=1031, extra=1200, lse=True, temperature=1.3)
    check(case, slack=1e-6)
    assert case.teacher is not None
    without = {k: v for k, v in case.sides.items() if k not in ("teacher_lse", "teacher_argmax")}
    alone, _ = replace(case, sides=without).run()
    case.teacher[:, 1031:] = torch.nan  # not read any more
    given, gradient = case.run()
    for name in RESULTS:
        torch.testing.assert_close(getattr(given, name), getattr(alone, name), rtol=1e-6, atol=1e-7)
    assert torch.equal(given.correct, alone.correct)
    assert torch.isfinite(gradient).all()


def test_the_argmax_that_is_given_decides_what_is_correct(isa: str) -> None:
    case = make("soft_ce", 4, 4, lse=True)
    case.sides["weight"][:] = 1
    case.sides["row_to_teacher"][:] = torch.arange(4)
    first = case.logits.argmax(dim=-1)
    case.sides["teacher_argmax"][:] = torch.stack(
        [first[0], first[1] + 1, first[2] * 0 - 1, first[3]]
    )
    assert case.run()[0].correct.tolist() == [1, 0, 0, 1]
    case.sides["teacher_argmax"][3] += 1_000_000
    assert case.run()[0].correct.tolist() == [1, 0, 0, 0]
    del case.sides["teacher_argmax"]
    assert case.teacher is not None
    case.logits[2] = case.teacher[2]
    assert case.run()[0].correct[2] == 1


# ---- properties ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_huge_logits(isa: str, kind: str) -> None:
    case = make(kind, 6, 2, 2051)
    case.sides["weight"][:] = 1
    case.logits[0, 3] = 1e4
    case.logits[2] -= 1e4
    case.logits[4, 2050] = -1e4
    if case.teacher is not None:
        case.teacher[0, 7] = 1e4
        case.teacher[1] += 1e4
    # log(q / p) is 1e4 here, and the last bit of such a float 1e-3.
    check(case, slack={"reverse_kl": 3e-4, "jsd": 5e-5}.get(kind, 2e-6))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("step", [0.1, 50.0])
@pytest.mark.parametrize("kind", KINDS)
def test_a_maximum_that_rises_from_block_to_block(
    isa: str, kind: str, step: float, dtype: torch.dtype
) -> None:
    stairs = step * (torch.arange(5003) // 700)
    case = make(kind, 6, 2, 5003)
    case.logits[:3] += stairs
    case.logits[3:] += stairs.flip(0)
    if case.teacher is not None:
        case.teacher[0] += stairs
    check(replace(case, logits=case.logits.to(dtype)), slack=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_weight_zero_and_what_belongs_to_them_are_not_read(isa: str, kind: str) -> None:
    case = make(kind, 8, 3, 1031, lse=True, hard_weight=0.0 if kind == "hard_ce" else 0.5)
    case.sides["weight"][:] = torch.tensor([1.0, 0, 2, 0, 0, 0, 1, 1])
    case.sides["row_to_teacher"][:] = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2])
    want, want_gradient = case.run()
    off = case.sides["weight"] == 0
    case.logits[off] = torch.nan
    case.sides["label"][1] = -100
    if "kl_weight" in case.sides:
        case.sides["kl_weight"][off] = torch.nan
    if case.teacher is not None:
        case.teacher[1] = torch.nan
        case.sides["teacher_lse"][1] = torch.nan
    out, gradient = case.run()
    assert torch.equal(gradient, want_gradient)
    assert not gradient[off].any()
    for name in (*RESULTS, "correct"):
        assert torch.equal(getattr(out, name), getattr(want, name))
        assert not getattr(out, name)[off].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_all_rows_of_weight_zero(isa: str, kind: str, dtype: torch.dtype) -> None:
    case = make(kind, 8, 3, dtype=dtype)
    case.sides["weight"][:] = 0
    case.logits[:] = torch.nan
    out, gradient = case.run()
    assert not gradient.any()
    assert not any(getattr(out, name).any() for name in (*RESULTS, "correct"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_without_a_gradient_the_logits_stay_and_the_results_too(
    isa: str, kind: str, dtype: torch.dtype
) -> None:
    case = make(kind, vocab=1031, dtype=dtype)
    case.logits[case.sides["weight"] == 0] = 5.0
    want, _ = case.run()
    out, logits = case.run(writes_gradient=False)
    assert torch.equal(logits, case.logits)
    for name in (*RESULTS, "correct"):
        assert torch.equal(getattr(out, name), getattr(want, name))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS[1:])
def test_a_student_that_is_its_teacher_has_no_gradient(
    isa: str, kind: str, dtype: torch.dtype
) -> None:
    case = make(kind, 3, 3, 5003, dtype=dtype, teacher_dtype=dtype, temperature=1.3)
    case.sides["weight"][:] = 1
    case.sides["row_to_teacher"][:] = torch.arange(3)
    assert case.teacher is not None
    case.logits[:] = case.teacher
    out, gradient = case.run()
    assert not gradient.any()
    torch.testing.assert_close(out.accepted, torch.ones(3), rtol=0, atol=1e-6)
    assert out.correct.all()
    w = case.sides.get("kl_weight", torch.ones(3)) if kind in ("soft_ce", "lk_lambda") else 0
    torch.testing.assert_close(out.loss, w * out.entropy, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_of_a_row_sums_to_zero(isa: str, kind: str) -> None:
    gradient = (
        make(kind, vocab=5003, extra=7).run()[1] if kind != "hard_ce" else make(kind).run()[1]
    )
    assert gradient.abs().max() > 1e-3
    sums, sizes = gradient.double().sum(dim=-1).abs(), gradient.double().abs().sum(dim=-1)
    assert bool((sums <= 2e-6 * sizes).all())


def test_lk_alpha_leaves_rows_alone_that_share_nothing_with_their_teacher(isa: str) -> None:
    for hard_weight in (0.0, 0.5):
        case = make("lk_alpha", 2, 2, 33, hard_weight=hard_weight)
        case.sides["weight"][:] = 3
        case.sides["row_to_teacher"][:] = torch.tensor([0, 1])
        assert case.teacher is not None
        case.logits[0, 16:] = -1e4
        case.teacher[0, :16] = -1e4
        check(case)
        out, gradient = case.run()
        assert out.accepted[0] == 0
        assert bool(gradient[0].any()) == bool(hard_weight)


def test_lk_alpha_of_a_hardly_shared_vocabulary_stays_finite(isa: str) -> None:
    """a of about 1e-37: 1 / a is a float, but a weight times it is not."""
    case = make("lk_alpha", 1, 1, 2)
    case.sides["weight"][:] = 1e3
    assert case.teacher is not None
    case.logits[:], case.teacher[:] = torch.tensor([0.0, -85.0]), torch.tensor([-85.0, 0.0])
    check(case, slack=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_bits_do_not_depend_on_the_number_of_threads(
    isa: str, kind: str, dtype: torch.dtype
) -> None:
    case = make(kind, 37, 5, 1501, dtype=dtype)
    results = []
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(case.run())
    torch.set_num_threads(before)
    for out, gradient in results[1:]:
        assert torch.equal(gradient, results[0][1])
        assert torch.equal(out.loss, results[0][0].loss)


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_depends_on_nothing_but_itself(isa: str, kind: str) -> None:
    case = make(kind, 12, 3, 1031)
    (together, gradient), (single, alone) = case.run(), case.rows(slice(6, 7)).run()
    assert torch.equal(gradient[6:7], alone)
    for name in (*RESULTS, "correct"):
        assert torch.equal(getattr(together, name)[6:7], getattr(single, name))
    shuffled = case.rows(torch.randperm(12, generator=torch.Generator().manual_seed(0)))
    check(shuffled)


@pytest.mark.parametrize("kind", KINDS)
def test_opcheck(kind: str) -> None:
    case = make(kind, 5, 2)
    sides = {name: case.sides.get(name) for name in SIDES}
    spec = (case.spec.kind, case.spec.temperature, case.spec.beta, case.spec.hard_weight)
    torch.library.opcheck(
        torch.ops.specforge_ext.loss_rows_.default,
        (case.logits, case.teacher, *sides.values(), *spec, True),
    )


SIDES = ("row_to_teacher", "weight", "teacher_lse", "teacher_argmax", "label", "kl_weight")
