"""CUDA kernels on a GPU against the CPU kernels and the definitions. Run with `pytest -m gpu`.

Legend: N rows, R teacher rows, V vocabulary, T packed tokens, L TTT steps.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from emulated import LOSS_KINDS, RowResults
from loss_rows_cases import Case, check, make_case, without_gradient
from specforge_ext import ops
from specforge_ext.ops import reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]
DTYPES = [torch.float32, torch.bfloat16]


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


def run_rows(case: Case) -> tuple[RowResults, Tensor]:
    """`ops.loss_rows_` on the GPU: (results, what the logits became), back on the CPU."""
    logits = case.logits.cuda()
    out = ops.loss_rows_(
        logits,
        None if case.teacher is None else case.teacher.cuda(),
        loss=ops.RowLoss(
            case.kind,
            temperature=case.temperature,
            beta=case.beta,
            hard_weight=case.hard_weight,
        ),
        row_to_teacher=case.row_to_teacher.cuda(),
        weight=case.weight.cuda(),
        writes_gradient=case.writes_gradient,
        **{name: tensor.cuda() for name, tensor in case.options.items()},
    )
    results = (out.loss, out.accepted, out.correct, out.top_prob, out.entropy)
    return RowResults(*(x.cpu() for x in results)), logits.cpu()


# scalar; one chunk; registers of one block, full and one chunk past; clusters of 2, 4 and 8 (on
# compute capability 9.0 and up); past every cluster.
@pytest.mark.parametrize(
    "vocab", [1, 1031, 2048, 16384, 32000, 32768, 32776, 65544, 151936, 262144, 262152]
)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", LOSS_KINDS)
def test_loss_rows(kind: str, dtype: torch.dtype, vocab: int) -> None:
    case = make_case(kind, 6, vocab, dtype=dtype, gives_lse=True, temperature=1.3)
    check(case, *run_rows(case))


@pytest.mark.parametrize("vocab", [1031, 32000])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", [kind for kind in LOSS_KINDS if kind != "hard_ce"])
def test_loss_rows_whole_teacher_and_label(kind: str, dtype: torch.dtype, vocab: int) -> None:
    other = DTYPES[dtype == torch.float32]
    for teacher_dtype in (dtype, other):
        case = make_case(
            *(kind, 6, vocab),
            dtype=dtype,
            teacher_dtype=teacher_dtype,
            rest=2048,
            hard_weight=0.4,
        )
        check(case, *run_rows(case))


@pytest.mark.parametrize("vocab", [1031, 32000, 151936])
@pytest.mark.parametrize("kind", LOSS_KINDS)
def test_loss_rows_metrics_only(kind: str, vocab: int) -> None:
    case = without_gradient(make_case(kind, 6, vocab, dtype=torch.bfloat16))
    check(case, *run_rows(case))


@pytest.mark.parametrize("vocab", [32000, 151936])
@pytest.mark.parametrize("kind", ["soft_ce", "jsd", "lk_lambda"])
def test_loss_rows_same_bits_every_time(kind: str, vocab: int) -> None:
    case = make_case(kind, 64, vocab, dtype=torch.bfloat16, gives_lse=True)
    results, gradient = run_rows(case)
    for _ in range(5):
        again, other = run_rows(case)
        assert torch.equal(gradient, other)
        assert all(torch.equal(a, b) for a, b in zip(results, again, strict=True))


@pytest.mark.parametrize("vocab", [40, 65544])
def test_loss_rows_marks_a_row_without_teacher(vocab: int) -> None:
    case = make_case("soft_ce", 3, vocab, dtype=torch.bfloat16, teachers=2)
    case.weight.fill_(1.0)
    case.logits.fill_(0.5)
    case.row_to_teacher.copy_(torch.tensor([0, 2, 1]))
    results, gradient = run_rows(case)
    assert results.loss.isnan().tolist() == [False, True, False]
    assert (gradient[1] == 0).all()


@pytest.mark.parametrize("vocab", [32000, 151936])
def test_loss_rows_in_a_cuda_graph(vocab: int) -> None:
    """Captured once, replayed on new logits: the launch neither allocates nor synchronises."""
    case = make_case("jsd", 6, vocab, dtype=torch.bfloat16, gives_lse=True)
    assert case.teacher is not None
    teacher, weight = case.teacher.cuda(), case.weight.cuda()
    index, lse = case.row_to_teacher.cuda(), case.options["teacher_lse"].cuda()
    logits = case.logits.cuda()

    def call() -> Tensor:
        loss = ops.RowLoss("jsd", beta=case.beta)
        return ops.loss_rows_(
            logits, teacher, loss=loss, row_to_teacher=index, weight=weight, teacher_lse=lse
        ).loss

    call()  # before the capture, as torch asks
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = call()
    logits.copy_(case.logits)
    graph.replay()
    torch.cuda.synchronize()
    wanted, gradient = run_rows(case)
    assert torch.equal(loss.cpu(), wanted.loss) and torch.equal(logits.cpu(), gradient)


def test_loss_rows_past_2_31_elements() -> None:
    """int64 indexing: the last row of a 4.4 GB tensor."""
    rows, vocab = 2**31 // 32000 + 2, 32000
    if torch.cuda.mem_get_info()[0] < 6 * 2**30:
        pytest.skip("needs 6 GiB of free GPU memory")
    logits = torch.zeros(rows, vocab, dtype=torch.bfloat16, device="cuda")
    weight = torch.zeros(rows, device="cuda")
    weight[-1] = 1.0
    teacher = torch.zeros(1, vocab, dtype=torch.bfloat16, device="cuda")
    teacher[0, 7] = 30.0
    out = ops.loss_rows_(
        logits,
        teacher,
        loss="soft_ce",
        row_to_teacher=torch.zeros(rows, dtype=torch.int32, device="cuda"),
        weight=weight,
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
