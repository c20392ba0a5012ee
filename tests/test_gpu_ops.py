"""CUDA kernels on a GPU against the CPU kernels and the definitions. Run with `pytest -m gpu`.

Legend: N rows, R teacher rows, V vocabulary, T packed tokens, L TTT steps.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from specforge_ext import ops
from specforge_ext.ops import reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]
DTYPES = [torch.float32, torch.bfloat16]
BF16_ROUNDING = 2.0**-8


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


# 1; below a chunk; unaligned rows; a draft's vocabulary; a target's; the largest, unaligned.
@pytest.mark.parametrize("vocab", [1, 7, 1031, 32000, 151936, 262143])
@pytest.mark.parametrize("dtype", DTYPES)
def test_row_stats(dtype: torch.dtype, vocab: int) -> None:
    logits = (torch.randn(9, vocab) * 4).to(dtype)
    lse, argmax = ops.row_stats(logits.cuda())
    cpu_lse, cpu_argmax = ops.row_stats(logits)
    torch.testing.assert_close(lse.cpu(), cpu_lse, rtol=5e-7, atol=2e-6)
    assert torch.equal(argmax.cpu(), cpu_argmax)


def soft_ce_inputs(
    rows: int, vocab: int, dtype: torch.dtype, teacher_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    teachers = rows // 2 + 1
    teacher = (torch.randn(teachers, vocab) * 3).to(teacher_dtype)
    weight = torch.rand(rows)
    weight[1::3] = 0
    logits = (torch.randn(rows, vocab) * 3).to(dtype)
    logits[1::3] = torch.nan
    map_N = (torch.arange(rows) // 2).to(torch.int32)
    lse = (torch.logsumexp(teacher.double(), -1) + 0.5).float()
    return logits, teacher, map_N, weight, lse


# scalar; one chunk; registers, full and one past (bf16); streamed; the largest.
@pytest.mark.parametrize("vocab", [1, 1031, 2048, 16384, 32000, 32768, 32776, 262144])
@pytest.mark.parametrize("teacher_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_soft_ce_rows(dtype: torch.dtype, teacher_dtype: torch.dtype, vocab: int) -> None:
    logits, *inputs = soft_ce_inputs(7, vocab, dtype, teacher_dtype)
    wanted = reference.soft_ce_rows(
        logits.double(), *(x.double() if x.is_floating_point() else x for x in inputs)
    )
    gradient = logits.cuda()
    teacher, map_N, weight, lse = (x.cuda() for x in inputs)
    rows = ops.soft_ce_rows_(
        gradient, teacher, row_to_teacher=map_N, weight=weight, teacher_lse=lse
    )
    torch.testing.assert_close(rows.loss.cpu().double(), wanted[0], rtol=1e-6, atol=3e-6)
    torch.testing.assert_close(rows.accepted.cpu().double(), wanted[1], rtol=3e-6, atol=3e-6)
    assert torch.equal(rows.correct.cpu(), wanted[2])
    rounding = BF16_ROUNDING if dtype == torch.bfloat16 else 4e-6
    torch.testing.assert_close(gradient.cpu().double(), wanted[3], rtol=rounding, atol=5e-7)


def test_soft_ce_rows_same_bits_every_time() -> None:
    logits, *inputs = soft_ce_inputs(64, 32000, torch.bfloat16, torch.bfloat16)
    teacher, map_N, weight, lse = (x.cuda() for x in inputs)

    def run() -> list[Tensor]:
        z = logits.cuda()
        out = ops.soft_ce_rows_(z, teacher, row_to_teacher=map_N, weight=weight, teacher_lse=lse)
        return [z, out.loss, out.accepted, out.correct]

    first = run()
    assert all(torch.equal(a, b) for _ in range(5) for a, b in zip(first, run(), strict=True))


def test_soft_ce_rows_marks_a_row_without_teacher() -> None:
    logits, teacher = torch.randn(3, 40).cuda(), torch.randn(2, 40).cuda()
    out = ops.soft_ce_rows_(
        logits,
        teacher,
        row_to_teacher=torch.tensor([0, 2, 1], dtype=torch.int32).cuda(),
        weight=torch.ones(3).cuda(),
        teacher_lse=torch.full((2,), 9.0).cuda(),
    )
    assert out.loss.isnan().tolist() == [False, True, False]
    assert (logits[1] == 0).all()


def test_soft_ce_rows_past_2_31_elements() -> None:
    """int64 indexing: the last row of a 4.4 GB tensor."""
    rows, vocab = 2**31 // 32000 + 2, 32000
    if torch.cuda.mem_get_info()[0] < 6 * 2**30:
        pytest.skip("needs 6 GiB of free GPU memory")
    logits = torch.zeros(rows, vocab, dtype=torch.bfloat16, device="cuda")
    weight = torch.zeros(rows, device="cuda")
    weight[-1] = 1.0
    teacher = torch.zeros(1, vocab, dtype=torch.bfloat16, device="cuda")
    teacher[0, 7] = 30.0
    out = ops.soft_ce_rows_(
        logits,
        teacher,
        row_to_teacher=torch.zeros(rows, dtype=torch.int32, device="cuda"),
        weight=weight,
        teacher_lse=torch.logsumexp(teacher.float(), -1),
    )
    assert logits[-1, 7].item() == pytest.approx(-1.0, abs=1e-2)
    assert (logits[-2] == 0).all() and out.loss[-2] == 0


def test_ops_run_on_the_current_stream() -> None:
    stream = torch.cuda.Stream()
    logits = torch.zeros(64, 32000, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # about 50 ms: an op on another stream would overtake it
        logits.fill_(1.0)
        lse, _ = ops.row_stats(logits)
    stream.synchronize()
    wanted = torch.full((64,), 1.0 + torch.tensor(32000.0).log().item())
    torch.testing.assert_close(lse.cpu(), wanted, rtol=1e-6, atol=0)


@pytest.mark.parametrize("lengths", [[1], [5, 0, 2, 0, 3], [1000, 24], [1025], [700] * 40])
@pytest.mark.parametrize(("ttt_length", "density"), [(1, 0.5), (7, 0.4), (64, 0.3)])
def test_ttt_maps(lengths: list[int], ttt_length: int, density: float) -> None:
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    mask = (torch.rand(int(bounds[-1])) < density).to(torch.uint8)
    mask[bounds[1:][torch.tensor(lengths) > 0] - 1] = 0
    cu_seqlens = bounds.to(torch.int32)
    wanted = ops.ttt_maps(mask, cu_seqlens, ttt_length)
    got = ops.ttt_maps(mask.cuda(), cu_seqlens.cuda(), ttt_length)
    for name in ("pair_source", "pair_step", "pair_teacher", "teacher_rows"):
        assert torch.equal(getattr(got, name).cpu(), getattr(wanted, name)), name
    for name in ("active", "parent"):
        pairs = zip(getattr(got, name), getattr(wanted, name), strict=True)
        assert all(torch.equal(a.cpu(), b) for a, b in pairs), name


def test_ttt_maps_refuses_a_scored_last_position() -> None:
    mask, cu_seqlens = torch.ones(4, dtype=torch.uint8), torch.tensor([0, 4], dtype=torch.int32)
    with pytest.raises(ValueError, match="must be 0 at the last position of every sample"):
        ops.ttt_maps(mask.cuda(), cu_seqlens.cuda(), 3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_draft_loss_gradients(dtype: torch.dtype) -> None:
    """Forward and backward of the op against torch's autograd over the definition, float64."""
    rows, teachers, vocab, width, steps = 37, 12, 1024, 64, 3
    hidden, head = torch.randn(rows, width), torch.randn(vocab, width) / 8
    teacher_hidden, teacher_head = torch.randn(teachers, width), torch.randn(vocab, width) / 4
    floats = [x.to(dtype) for x in (hidden, head, teacher_hidden, teacher_head)]
    teacher_lse = torch.logsumexp(floats[2].double() @ floats[3].double().T, -1) + 0.3
    map_N = torch.sort(torch.randint(0, teachers, (rows,))).values.to(torch.int32)
    weight = torch.rand(rows) * (torch.arange(rows) % 5 != 0)
    step = (torch.arange(rows) % steps).to(torch.int32)

    exact = [x.double().requires_grad_(i < 2) for i, x in enumerate(floats)]
    wanted = reference.draft_loss(
        *exact,
        teacher_lse,
        row_to_teacher=map_N,
        row_weight=weight.double(),
        row_step=step,
        num_steps=steps,
    )
    wanted.loss_sum.backward()
    ours = [x.cuda().requires_grad_(i < 2) for i, x in enumerate(floats)]
    got = ops.draft_loss(
        *ours,
        teacher_lse.float().cuda(),
        row_to_teacher=map_N.cuda(),
        row_weight=weight.cuda(),
        row_step=step.cuda(),
        num_steps=steps,
    )
    got.loss_sum.backward()
    tolerance = 3e-2 if dtype == torch.bfloat16 else 1e-4
    assert got.loss_sum.item() == pytest.approx(wanted.loss_sum.item(), rel=tolerance / 3)
    assert torch.equal(got.step_rows.cpu(), wanted.step_rows)
    for mine, true in zip(ours[:2], exact[:2], strict=True):
        assert mine.grad is not None and true.grad is not None
        error = (mine.grad.cpu().double() - true.grad).norm() / true.grad.norm()
        assert error.item() < tolerance
