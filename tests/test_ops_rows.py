"""The row kernels against their definition, on every instruction set this CPU has."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from ops_helpers import assert_no_worse
from specforge_ext import _C, ops
from specforge_ext.ops import reference

DTYPES = [torch.float32, torch.bfloat16]
# 1; below, at and above a vector (8 or 16 lanes); around a block of 1024; a prime of many.
VOCABS = [1, 7, 8, 16, 17, 1023, 1024, 1025, 5003]


@pytest.fixture(params=_C.available_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    _C.set_isa(request.param)
    yield request.param
    _C.set_isa("auto")


def randn(*shape: int, dtype: torch.dtype, scale: float = 3.0, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * scale).to(dtype)


def check_row_stats(logits: Tensor) -> None:
    lse, argmax = ops.row_stats(logits)
    want_lse, want_argmax = reference.row_stats(logits.double())
    assert torch.equal(argmax, want_argmax)
    assert lse.dtype == torch.float32
    assert_no_worse(lse, want_lse, reference.row_stats(logits.float())[0], slack=2e-7)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", VOCABS)
def test_row_stats_follow_the_definition(isa: str, vocab: int, dtype: torch.dtype) -> None:
    check_row_stats(randn(5, vocab, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_row_stats_of_a_real_vocabulary_and_of_no_rows(isa: str, dtype: torch.dtype) -> None:
    check_row_stats(randn(2, 151936, dtype=dtype))
    check_row_stats(torch.empty(0, 17, dtype=dtype))


def test_row_stats_of_huge_logits(isa: str) -> None:
    logits = randn(3, 1031, dtype=torch.float32, scale=1.0)
    logits[0], logits[1, 5], logits[2] = -1e4, 1e4, 1e4
    check_row_stats(logits)


def test_argmax_is_the_lowest_index_among_equals(isa: str) -> None:
    logits = torch.zeros(4, 3000)
    logits[1, [2999, 2048, 1500]] = 2.0  # the tie spans blocks
    logits[2, [1023, 1024]] = 2.0  # at the border of two
    logits[3, [2998, 2999]] = 2.0  # in the tail
    assert ops.row_stats(logits)[1].tolist() == [0, 1500, 1023, 2998]


def test_exponentials_stay_within_two_ulp(isa: str) -> None:
    """A vocabulary of two, where lse - max = log(1 + e^x) and the gradient is q itself."""
    x = -torch.linspace(0, 87, 20011)
    logits = torch.stack([torch.zeros_like(x), x], dim=1).contiguous()
    teacher = torch.tensor([[0.0, -1e4]])  # p = (1, 0) exactly
    out = ops.loss_rows_(
        logits,
        teacher,
        row_to_teacher=torch.zeros(len(x), dtype=torch.int32),
        weight=torch.ones(len(x)),
        teacher_lse=torch.zeros(1),
    )
    q = torch.sigmoid(x.double())
    # exp: 2 ulp; 1 / sum and the product with it: half an ulp each; slack for the sum.
    assert float(((logits[:, 1].double() - q) / q).abs().max()) < 4 * 2**-23
    assert torch.isfinite(out.loss).all()


def soft_ce_inputs(
    rows: int, teachers: int, vocab: int, dtype: torch.dtype, teacher_dtype: torch.dtype
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    teacher = randn(teachers, vocab, dtype=teacher_dtype, seed=2)
    weight = torch.randn(rows, generator=generator)
    weight[1::4] = 0
    return {
        "logits": randn(rows, vocab, dtype=dtype),
        "teacher": teacher,
        "row_to_teacher": torch.randint(0, max(teachers, 1), (rows,), generator=generator)
        .sort()
        .values.to(torch.int32),
        "weight": weight,
        # 0.5 nats: 39 % of the teacher's mass lies outside the draft's vocabulary.
        "teacher_lse": torch.logsumexp(teacher.double(), dim=-1).float() + 0.5,
    }


def check_soft_ce(inputs: dict[str, Tensor]) -> None:
    def define(dtype: torch.dtype) -> reference.LossRows:
        return reference.loss_rows(
            inputs["logits"].to(dtype),
            inputs["teacher"].to(dtype),
            row_to_teacher=inputs["row_to_teacher"],
            weight=inputs["weight"].to(dtype),
            teacher_lse=inputs["teacher_lse"].to(dtype),
        )

    want, base = define(torch.float64), define(torch.float32)
    logits = inputs["logits"].clone()
    out = ops.loss_rows_(logits, **{k: v for k, v in inputs.items() if k != "logits"})
    assert_no_worse(out.loss, want.loss, base.loss, slack=5e-7)
    assert_no_worse(out.accepted, want.accepted, base.accepted, slack=5e-7)
    assert torch.equal(out.correct, want.correct)
    assert_no_worse(logits, want.gradient, base.gradient.to(logits.dtype), slack=5e-7)
    assert not logits[inputs["weight"] == 0].any()


@pytest.mark.parametrize("teacher_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", VOCABS)
def test_soft_ce_follows_the_definition(
    isa: str, vocab: int, dtype: torch.dtype, teacher_dtype: torch.dtype
) -> None:
    check_soft_ce(soft_ce_inputs(11, 3, vocab, dtype, teacher_dtype))


@pytest.mark.parametrize(
    ("rows", "teachers", "vocab"),
    [
        (0, 3, 17),  # nothing
        (0, 0, 17),  # not even teachers
        (1, 1, 17),  # one row
        (7, 1, 33),  # as many students as a TTT of 7 gives one teacher
        (53, 1, 33),  # more than one thread's share of a teacher
        (3, 11, 33),  # teachers without students
        (2, 2, 151936),  # a real vocabulary
    ],
)
def test_soft_ce_shapes(isa: str, rows: int, teachers: int, vocab: int) -> None:
    check_soft_ce(soft_ce_inputs(rows, teachers, vocab, torch.float32, torch.float32))


def test_soft_ce_rows_need_no_order(isa: str) -> None:
    inputs = soft_ce_inputs(13, 4, 129, torch.float32, torch.float32)
    order = torch.randperm(13, generator=torch.Generator().manual_seed(0))
    for name in ("row_to_teacher", "weight"):
        inputs[name] = inputs[name][order].contiguous()
    check_soft_ce(inputs)


def test_soft_ce_of_huge_logits(isa: str) -> None:
    inputs = soft_ce_inputs(6, 2, 1031, torch.float32, torch.float32)
    inputs["logits"][0, 3] = 1e4
    inputs["logits"][2] -= 1e4
    inputs["logits"][4, 1030] = -1e4
    inputs["teacher"][0, 7] = 1e4
    inputs["teacher_lse"] = torch.logsumexp(inputs["teacher"].double(), dim=-1).float()
    check_soft_ce(inputs)


def test_rows_of_weight_zero_and_their_teachers_are_not_read(isa: str) -> None:
    inputs = soft_ce_inputs(8, 3, 1031, torch.float32, torch.float32)
    inputs["weight"][:] = torch.tensor([1.0, 0, 2, 0, 0, 0, 1, 1])
    inputs["row_to_teacher"][:] = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2])
    inputs["logits"][inputs["weight"] == 0] = float("nan")
    inputs["teacher"][1] = float("nan")
    inputs["teacher_lse"][1] = float("nan")
    check_soft_ce(inputs)


def test_all_rows_of_weight_zero(isa: str) -> None:
    inputs = soft_ce_inputs(8, 3, 33, torch.bfloat16, torch.bfloat16)
    inputs["weight"][:] = 0
    inputs["logits"][:] = float("nan")
    check_soft_ce(inputs)


def test_gradient_of_a_row_sums_to_zero(isa: str) -> None:
    inputs = soft_ce_inputs(9, 3, 5003, torch.float32, torch.float32)
    ops.loss_rows_(**inputs)
    assert float(inputs["logits"].double().sum(dim=-1).abs().max()) < 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_do_not_depend_on_the_number_of_threads(isa: str, dtype: torch.dtype) -> None:
    results = []
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        inputs = soft_ce_inputs(37, 5, 3001, dtype, dtype)
        lse, argmax = ops.row_stats(inputs["logits"])
        out = ops.loss_rows_(**inputs)
        results.append((lse, argmax, out.loss, out.accepted, out.correct, inputs["logits"]))
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_a_row_depends_on_nothing_but_itself(isa: str) -> None:
    inputs = soft_ce_inputs(12, 3, 1031, torch.float32, torch.float32)
    alone = {**inputs, "logits": inputs["logits"][6:7].clone()}
    for name in ("row_to_teacher", "weight"):
        alone[name] = inputs[name][6:7].clone()
    together, single = ops.loss_rows_(**inputs), ops.loss_rows_(**alone)
    assert torch.equal(together.loss[6:7], single.loss)
    assert torch.equal(inputs["logits"][6:7], alone["logits"])


def test_step_sums_follow_the_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    loss, accepted, top_prob, entropy = torch.rand(4, 101, generator=generator).unbind()
    correct = torch.randint(0, 2, (101,), generator=generator, dtype=torch.uint8)
    weight = torch.randn(101, generator=generator)
    weight[::3] = 0
    loss[::3] = float("nan")
    step = torch.randint(0, 6, (101,), generator=generator, dtype=torch.int32)
    sums = torch.full((7, 7), float("nan"), dtype=torch.float64)  # overwritten, not added to
    rows = (loss, accepted, correct, top_prob, entropy, weight, step)
    _C.step_sums(*rows, sums)
    want = reference.step_sums(*rows, 7)
    torch.testing.assert_close(sums, want, rtol=1e-12, atol=1e-12)
    assert not sums[:, 6].any()


def test_ops_pass_torch_opcheck() -> None:
    inputs = soft_ce_inputs(5, 2, 33, torch.float32, torch.float32)
    torch.library.opcheck(torch.ops.specforge_ext.row_stats.default, (inputs["logits"],))
    arguments = (*inputs.values(), None, None, None, "soft_ce", 1.0, 0.5, 0.0, True)
    torch.library.opcheck(torch.ops.specforge_ext.loss_rows_.default, arguments)


@pytest.mark.parametrize(
    ("name", "value", "match"),
    [
        ("weight", torch.ones(5), r"loss_rows: weight must be \[rows=4\] f32, got \[5\] f32"),
        ("weight", torch.ones(4).double(), r"loss_rows: weight must be f32, got \[4\] f64"),
        (
            "teacher",
            torch.ones(2, 8),
            "loss_rows: teacher must have at least as many columns as logits, got 8",
        ),
        (
            "teacher",
            torch.ones(9, 2).T,
            r"teacher must be contiguous, got \[2, 9\] f32 with strides \[1, 2\]",
        ),
        (
            "row_to_teacher",
            torch.tensor([0, 0, 1, 2], dtype=torch.int32),
            r"row_to_teacher must be in \[0, 2\), got 2 at row 3",
        ),
        ("logits", torch.ones(4, 0), r"the vocabulary must be in \[1, 2\^31\), got 0"),
        ("logits", torch.ones(4, 9, dtype=torch.complex64), "complex64 is not supported"),
        ("logits", torch.ones(4, 9, device="meta"), "must be on cpu or cuda, got meta"),
    ],
)
def test_soft_ce_names_what_does_not_fit(name: str, value: Tensor, match: str) -> None:
    inputs = {
        "logits": torch.ones(4, 9),
        "teacher": torch.ones(2, 9),
        "row_to_teacher": torch.zeros(4, dtype=torch.int32),
        "weight": torch.ones(4),
        "teacher_lse": torch.ones(2),
    }
    results = {name: torch.empty(4) for name in ("loss", "accepted", "top_prob", "entropy")}
    with pytest.raises(ValueError, match=match):
        _C.loss_rows(
            **{**inputs, name: value},
            **results,
            correct=torch.empty(4, dtype=torch.uint8),
            kind="soft_ce",
            temperature=1.0,
            beta=0.5,
            hard_weight=0.0,
            writes_gradient=True,
        )


def test_other_messages_name_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match=r"vocab must be in \[1, 2\^31\), got 0"):
        ops.row_stats(torch.ones(3, 0))
    with pytest.raises(ValueError, match=r"row_stats: logits must be f32 or bf16, got \[3, 4\]"):
        ops.row_stats(torch.ones(3, 4, dtype=torch.float16))
    with pytest.raises(ValueError, match="at most 4 dimensions, got 5"):
        ops.row_stats(torch.ones(1, 1, 1, 1, 1))
    ones = torch.ones(2)
    with pytest.raises(ValueError, match=r"step_sums: step must be in \[0, 3\), got 3 at row 1"):
        _C.step_sums(
            ones,
            ones,
            torch.ones(2, dtype=torch.uint8),
            ones,
            ones,
            ones,
            torch.tensor([0, 3], dtype=torch.int32),
            torch.empty(7, 3, dtype=torch.float64),
        )
    with pytest.raises(ValueError, match=r"set_isa: wanted one of auto, plain.*, got neon"):
        _C.set_isa("neon")
