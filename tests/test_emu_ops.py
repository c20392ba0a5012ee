"""CUDA kernels, run by the emulator, against ops/reference.py in float64.

Legend: N rows, R teacher rows, V vocabulary, T packed tokens, L TTT steps.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import emulated
from specforge_ext.ops import reference

REASON = emulated.unavailable_reason()
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

DTYPES = [torch.float32, torch.bfloat16]
BF16_ROUNDING = 2.0**-8


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
    emulated.set_order("forward")


# 1; a prime below a chunk of 8; one chunk and its neighbours; two batches of one warp and a chunk;
# odd and long, so that every row starts unaligned; a real vocabulary.
@pytest.mark.parametrize("vocab", [1, 7, 8, 9, 520, 4099, 32000])
@pytest.mark.parametrize("dtype", DTYPES)
def test_row_stats(dtype: torch.dtype, vocab: int) -> None:
    logits = (torch.randn(5, vocab) * 4).to(dtype)
    lse, argmax = emulated.row_stats(logits)
    wanted_lse, wanted_argmax = reference.row_stats(logits.double())
    torch.testing.assert_close(lse.double(), wanted_lse, rtol=5e-7, atol=1e-6)
    assert torch.equal(argmax, wanted_argmax)


@pytest.mark.parametrize("dtype", DTYPES)
def test_row_stats_extremes_and_ties(dtype: torch.dtype) -> None:
    logits = torch.full((6, 4099), -1e4).to(dtype)
    logits[1] = 1e4
    logits[2, 4098] = 1e4  # in the tail
    logits[3, [17, 2049, 4098]] = 3.0
    logits[4, [0, 4098]] = 5.0
    logits[5] = -torch.inf  # outside the contract; the index must still be one of the row
    lse, argmax = emulated.row_stats(logits)
    wanted, _ = reference.row_stats(logits.double())
    torch.testing.assert_close(lse.double(), wanted, rtol=1e-6, atol=0)
    assert argmax.tolist() == [0, 0, 4098, 17, 0, 0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_row_stats_of_a_misaligned_view(dtype: torch.dtype) -> None:
    for offset in range(1, 8):
        memory = torch.randn(offset + 2 * 40).to(dtype)
        logits = memory[offset:].view(2, 40)
        lse, argmax = emulated.row_stats(logits)
        wanted_lse, wanted_argmax = reference.row_stats(logits.double())
        torch.testing.assert_close(lse.double(), wanted_lse, rtol=5e-7, atol=1e-6)
        assert torch.equal(argmax, wanted_argmax)


def test_nan_in_a_row_is_not_hidden_and_stays_in_its_row() -> None:
    logits = torch.randn(3, 100)
    logits[1, 60] = torch.nan
    lse, argmax = emulated.row_stats(logits)
    assert lse.isnan().tolist() == [False, True, False]
    assert ((argmax >= 0) & (argmax < 100)).all()


def check_soft_ce(
    logits: Tensor, teacher: Tensor, map_N: Tensor, weight: Tensor, *, rest: float = 1.0
) -> None:
    """rest: mass of the teacher outside the draft's vocabulary, in nats of its normaliser."""
    # Only teachers of scored rows are read, so the others may hold NaN.
    lse = (torch.logsumexp(teacher.double(), -1) + rest).float()
    inputs = (map_N, weight, lse)
    wanted = reference.soft_ce_rows(
        logits.double(),
        teacher.double(),
        *(x.double() if x.is_floating_point() else x for x in inputs),
    )
    gradient = logits.clone()
    loss, accepted, correct = emulated.soft_ce_rows_(gradient, teacher, *inputs)
    torch.testing.assert_close(loss.double(), wanted[0], rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(accepted.double(), wanted[1], rtol=2e-6, atol=2e-6)
    assert torch.equal(correct, wanted[2])
    scale = float(weight.abs().max())
    rounding = BF16_ROUNDING if logits.dtype == torch.bfloat16 else 2e-6
    torch.testing.assert_close(gradient.double(), wanted[3], rtol=rounding, atol=4e-7 * scale)
    assert (gradient[weight == 0] == 0).all()


# 1; scalar (not a multiple of 8); one chunk; several chunks per thread, one ragged; a real draft
# vocabulary: in registers as bf16, streamed as float32.
@pytest.mark.parametrize("vocab", [1, 7, 8, 1031, 1032, 4104, 32000])
@pytest.mark.parametrize("teacher_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_soft_ce_rows(dtype: torch.dtype, teacher_dtype: torch.dtype, vocab: int) -> None:
    rows = 3 if vocab == 32000 else 6
    logits = (torch.randn(rows, vocab) * 3).to(dtype)
    teacher = (torch.randn(4, vocab) * 3).to(teacher_dtype)
    map_N = torch.tensor([0, 3, 3, 1, 0, 2][:rows], dtype=torch.int32)
    weight = torch.tensor([1.0, 0.0, -0.3, 2.5, 1e-3, 0.8][:rows])
    check_soft_ce(logits, teacher, map_N, weight)


# The last vocabulary that registers hold, and the first that they do not.
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 16384), (torch.bfloat16, 32768)])
@pytest.mark.parametrize("extra", [0, 8])
def test_soft_ce_rows_at_the_limit_of_registers(dtype: torch.dtype, limit: int, extra: int) -> None:
    logits = torch.randn(1, limit + extra).to(dtype)
    teacher = torch.randn(1, limit + extra).to(dtype)
    check_soft_ce(logits, teacher, torch.zeros(1, dtype=torch.int32), torch.ones(1))


@pytest.mark.parametrize("vocab", [63, 64])
@pytest.mark.parametrize("dtype", DTYPES)
def test_soft_ce_rows_far_logits(dtype: torch.dtype, vocab: int) -> None:
    """+-1e4: exponentials of anything but the maximum are 0, and none overflows."""
    logits, teacher = (torch.full((4, vocab), -1e4).to(dtype) for _ in range(2))
    logits[0, 5], teacher[0, 5] = 1e4, 1e4
    logits[1, 5], teacher[1, 6] = 1e4, 1e4
    logits[2], teacher[2] = 1e4, 1e4  # flat
    check_soft_ce(logits, teacher, torch.arange(4, dtype=torch.int32), torch.ones(4), rest=0.0)


@pytest.mark.parametrize("vocab", [60, 64, 16392])
@pytest.mark.parametrize("dtype", DTYPES)
def test_soft_ce_rows_of_weight_zero_are_not_read(dtype: torch.dtype, vocab: int) -> None:
    logits, teacher = torch.randn(3, vocab).to(dtype), torch.randn(2, vocab).to(dtype)
    logits[1], teacher[1] = torch.nan, torch.nan
    map_N = torch.tensor([0, 1, 0], dtype=torch.int32)
    check_soft_ce(logits, teacher, map_N, torch.tensor([1.0, 0.0, 2.0]))


@pytest.mark.parametrize("bad", [-1, 2, 2**31 - 1])
def test_soft_ce_rows_marks_a_row_without_teacher(bad: int) -> None:
    logits, teacher = torch.randn(3, 40), torch.randn(2, 40)
    map_N = torch.tensor([0, bad, 1], dtype=torch.int32)
    lse = torch.full((2,), 9.0)
    loss, accepted, correct = emulated.soft_ce_rows_(logits, teacher, map_N, torch.ones(3), lse)
    assert loss.isnan().tolist() == [False, True, False]
    assert accepted[1] == 0 and correct[1] == 0 and (logits[1] == 0).all()


def test_soft_ce_rows_correct_takes_the_lowest_index_on_ties() -> None:
    logits, teacher = torch.zeros(3, 4096), torch.zeros(3, 4096)
    logits[0, [9, 4000]] = 1.0
    teacher[0, [9, 3000]] = 1.0  # lowest: 9 and 9
    logits[1, [10, 4000]] = 1.0
    teacher[1, 4000] = 1.0  # 10 and 4000
    *_, correct = emulated.soft_ce_rows_(
        logits, teacher, torch.arange(3, dtype=torch.int32), torch.ones(3), torch.full((3,), 9.0)
    )
    assert correct.tolist() == [1, 0, 1]


def test_soft_ce_rows_writes_nothing_outside_its_rows() -> None:
    memory = torch.full((4, 48), 77.0)
    emulated.soft_ce_rows_(
        memory[1:3],
        torch.randn(1, 48),
        torch.zeros(2, dtype=torch.int32),
        torch.tensor([1.0, 0.0]),
        torch.full((1,), 9.0),
    )
    assert (memory[[0, 3]] == 77.0).all() and (memory[2] == 0).all()


@pytest.mark.parametrize("rows", [0, 1, 31, 257, 1500])
def test_step_sums(rows: int) -> None:
    loss, accepted = torch.randn(rows), torch.rand(rows)
    correct = torch.randint(0, 2, (rows,), dtype=torch.uint8)
    weight = torch.randn(rows) * torch.randint(0, 2, (rows,))
    loss[weight == 0] = torch.nan
    step = torch.randint(0, 7, (rows,), dtype=torch.int32)
    sums = emulated.step_sums(loss, accepted, correct, weight, step, 7)
    wanted = reference.step_sums(loss, accepted, correct, weight, step, 7)
    torch.testing.assert_close(sums, wanted, rtol=1e-12, atol=1e-12)


def test_step_sums_leaves_out_rows_of_no_step() -> None:
    ones = torch.ones(4)
    step = torch.tensor([0, -1, 2, 1], dtype=torch.int32)
    sums = emulated.step_sums(ones, ones, ones.to(torch.uint8), ones, step, 2)
    assert torch.equal(sums, torch.ones(5, 2, dtype=torch.float64))


def masked(lengths: list[int], density: float) -> tuple[Tensor, Tensor]:
    """(mask [T] uint8 with 0 at every sample's end, cu_seqlens)."""
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    mask = (torch.rand(int(bounds[-1])) < density).to(torch.uint8)
    mask[bounds[1:][torch.tensor(lengths) > 0] - 1] = 0
    return mask, bounds.to(torch.int32)


# one token; samples shorter than L, and empty ones; a warp and its neighbours; a tile of 1024, the
# next; many tiny samples.
@pytest.mark.parametrize(
    "lengths", [[1], [5, 0, 2, 0, 0, 3], [31, 1, 1], [32], [33], [1000, 24], [1025], [2] * 300]
)
@pytest.mark.parametrize(("ttt_length", "density"), [(1, 0.5), (7, 0.4), (7, 0.02), (64, 1.0)])
def test_ttt_maps(lengths: list[int], ttt_length: int, density: float) -> None:
    if ttt_length == 64 and sum(lengths) > 100:
        lengths = [66, 34]  # the definition is quadratic
    mask, cu_seqlens = masked(lengths, density)
    wanted = reference.ttt_maps(mask, cu_seqlens, ttt_length)
    counts = emulated.ttt_counts(mask, cu_seqlens, ttt_length)
    sizes = [wanted.pair_source.numel(), wanted.teacher_rows.numel(), -1]
    assert counts.tolist() == [*wanted.num_active, *sizes]
    if mask.sum() == 0:
        return
    active, parent, *pairs = emulated.ttt_fill(mask, cu_seqlens, counts)
    assert torch.equal(active, torch.cat(wanted.active))
    assert torch.equal(parent, torch.cat([active[:0], *wanted.parent[1:]]))
    names = ("pair_source", "pair_step", "pair_teacher", "teacher_rows")
    for name, got in zip(names, pairs, strict=True):
        assert torch.equal(got, getattr(wanted, name)), name


@pytest.mark.parametrize("order", emulated.ORDERS)
def test_ttt_counts_names_the_lowest_misplaced_position(order: str) -> None:
    emulated.set_order(order)
    mask, cu_seqlens = masked([40, 30, 0, 30], 0.5)
    mask[[69, 99]] = 1
    assert emulated.ttt_counts(mask, cu_seqlens, 3)[-1] == 69


def test_ttt_counts_of_nothing() -> None:
    empty, start = torch.zeros(0, dtype=torch.uint8), torch.zeros(1, dtype=torch.int32)
    assert emulated.ttt_counts(empty, start, 4).tolist() == [0] * 6 + [-1]


@pytest.mark.parametrize("order", ["reverse", "random"])
def test_values_do_not_depend_on_the_order_of_threads(order: str) -> None:
    logits, teacher = torch.randn(4, 3000), torch.randn(2, 3000)
    arguments = (
        torch.tensor([0, 1, 1, 0], dtype=torch.int32),
        torch.tensor([1.0, 0.0, 2.0, 3.0]),
        torch.full((2,), 12.0),
    )

    def run() -> list[Tensor]:
        gradient = logits.clone()
        rows = emulated.soft_ce_rows_(gradient, teacher, *arguments)
        return [gradient, *rows, *emulated.row_stats(logits)]

    forward = run()
    emulated.set_order(order)
    assert all(torch.equal(a, b) for a, b in zip(forward, run(), strict=True))
