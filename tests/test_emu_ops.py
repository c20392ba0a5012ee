"""CUDA kernels, run by the emulator, against ops/reference in float64.

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


@pytest.mark.parametrize("rows", [0, 1, 31, 257, 1500])
def test_step_sums(rows: int) -> None:
    loss, accepted, top_prob, entropy = (torch.randn(rows) for _ in range(4))
    correct = torch.randint(0, 2, (rows,), dtype=torch.uint8)
    weight = torch.randn(rows) * torch.randint(0, 2, (rows,))
    loss[weight == 0] = torch.nan
    step = torch.randint(0, 7, (rows,), dtype=torch.int32)
    sums = emulated.step_sums(loss, accepted, correct, top_prob, entropy, weight, step, 7)
    columns = (loss, correct, accepted, torch.ones(rows), weight.double() * loss, top_prob, entropy)
    is_step_LN = (step == torch.arange(7)[:, None]) & (weight != 0)
    wanted = torch.stack(
        [torch.where(is_step_LN, column.double(), 0.0).sum(-1) for column in columns]
    )
    torch.testing.assert_close(sums, wanted, rtol=1e-12, atol=1e-12)


def test_step_sums_leaves_out_rows_of_no_step() -> None:
    ones = torch.ones(4)
    step = torch.tensor([0, -1, 2, 1], dtype=torch.int32)
    sums = emulated.step_sums(ones, ones, ones.to(torch.uint8), ones, ones, ones, step, 2)
    assert torch.equal(sums, torch.ones(7, 2, dtype=torch.float64))


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
    logits = torch.randn(4, 3000)
    forward = emulated.row_stats(logits)
    emulated.set_order(order)
    again = emulated.row_stats(logits)
    assert all(torch.equal(a, b) for a, b in zip(forward, again, strict=True))
