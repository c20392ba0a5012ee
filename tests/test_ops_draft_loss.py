"""draft_loss and teacher_stats: values and gradients against the definition, and their promises."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from ops_helpers import LossCase, assert_no_worse, loss_case
from specforge_ext import ops
from specforge_ext.ops import DraftLoss, _matmul, reference

DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(params=["multiplies bf16", "emulates bf16"])
def hardware(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Both ways of computing bf16 logits, whatever this CPU is; blocks of 100 words."""
    fast = request.param == "multiplies bf16"
    monkeypatch.setattr(_matmul._C, "has_fast_bf16", lambda: fast)
    monkeypatch.setattr(_matmul, "_BLOCK_BYTES", 4 * 24 * 100)
    yield request.param


def run(case: LossCase, **options: int) -> tuple[DraftLoss, Tensor, Tensor]:
    """The op's result and its gradients in hidden and head."""
    out = ops.draft_loss(*case.inputs, **case.keywords, **options)
    grads = torch.autograd.grad(out.loss_sum, (case.hidden, case.head))
    return out, *grads


def define(case: LossCase) -> tuple[DraftLoss, Tensor, Tensor]:
    out = reference.draft_loss(*case.inputs, **case.keywords)
    grads = torch.autograd.grad(out.loss_sum, (case.hidden, case.head))
    return out, *grads


def check(case: LossCase, *, slack: float = 2e-6, **options: int) -> None:
    dtype = case.hidden.dtype
    if dtype == torch.bfloat16:
        slack = 2**-8  # half an ulp: which way each of a few logits rounds is luck
    out, *grads = run(case, **options)
    want, *want_grads = define(case.to(torch.float64, torch.float64))
    base, *base_grads = define(case)
    names = ("loss_sum", "step_loss", "step_accepted")
    for name in names:
        values = (getattr(result, name).detach() for result in (out, want, base))
        assert_no_worse(*values, slack=slack)
    assert torch.equal(out.step_rows, want.step_rows)
    if dtype == torch.float32:  # bf16 logits tie where float64 ones do not
        assert torch.equal(out.step_correct, want.step_correct)
    for got, truth, baseline in zip(grads, want_grads, base_grads, strict=True):
        assert got.dtype == dtype
        assert_no_worse(got, truth, baseline, slack=slack)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "teachers", "vocab"),
    [
        (1, 1, 33),  # one row
        (23, 11, 997),  # primes: nothing divides a vector, a block, or a chunk
        (28, 4, 512),  # 7 students a teacher, as TTT gives
        (5, 5, 64),  # one student a teacher
        (3, 9, 64),  # teachers without students
    ],
)
def test_values_and_gradients_follow_the_definition(
    hardware: str, rows: int, teachers: int, vocab: int, dtype: torch.dtype
) -> None:
    case = loss_case(rows, teachers, vocab, dtype=dtype)
    check(case)
    check(case, workspace_bytes=5 * vocab * 4)  # many chunks


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_real_vocabulary(dtype: torch.dtype) -> None:
    check(loss_case(3, 2, 151936, dtype=dtype, width=8, teacher_width=8))


def test_huge_logits() -> None:
    case = loss_case(12, 4, 301)
    with torch.no_grad():
        case.hidden.mul_(3e3)
        case.teacher_hidden.mul_(3e3)
        logits = case.teacher_hidden.double() @ case.teacher_head.double().T
        case.teacher_lse.copy_(torch.logsumexp(logits, dim=-1))
    assert float((case.hidden @ case.head.T).detach().abs().max()) > 1e4
    # float32 products of this size are off by 1e-3 nats, and a softmax turns nats into ratios.
    check(case, slack=1e-4)


def test_teacher_of_another_dtype() -> None:
    case = loss_case(9, 4, 101)
    case = dataclasses.replace(
        case,
        teacher_hidden=case.teacher_hidden.bfloat16(),
        teacher_head=case.teacher_head.bfloat16(),
    )
    exact = dataclasses.replace(
        case, teacher_hidden=case.teacher_hidden.float(), teacher_head=case.teacher_head.float()
    )
    out, want = run(case)[0], run(exact)[0]
    torch.testing.assert_close(out.step_loss, want.step_loss, rtol=1e-2, atol=1e-2)


def test_the_definition_passes_gradcheck() -> None:
    case = loss_case(6, 3, 13, width=4).to(torch.float64, torch.float64)

    def loss(hidden: Tensor, head: Tensor) -> Tensor:
        return reference.draft_loss(hidden, head, *case.inputs[2:], **case.keywords).loss_sum

    assert torch.autograd.gradcheck(loss, (case.hidden, case.head))


@pytest.mark.parametrize("workspace_rows", [2, 3, 7, 1000])
def test_chunks_do_not_change_rows(workspace_rows: int) -> None:
    """Up to the order in which the head's gradient is summed."""
    case = loss_case(28, 5, 257)
    out, hidden_grad, head_grad = run(case)
    other = run(case, workspace_bytes=workspace_rows * 257 * 4)
    torch.testing.assert_close(other[0].step_loss, out.step_loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(other[1], hidden_grad, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(other[2], head_grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_inputs_same_bits(dtype: torch.dtype) -> None:
    case = loss_case(40, 9, 1000, dtype=dtype)
    first, second = run(case, workspace_bytes=1 << 15), run(case, workspace_bytes=1 << 15)
    assert torch.equal(first[0].loss_sum, second[0].loss_sum)
    assert torch.equal(first[0].step_loss, second[0].step_loss)
    assert torch.equal(first[1], second[1])
    assert torch.equal(first[2], second[2])


def test_rows_of_weight_zero_may_hold_nan(hardware: str) -> None:
    for dtype in DTYPES:
        case = loss_case(20, 20, 101, dtype=dtype)
        case = dataclasses.replace(case, row_to_teacher=torch.arange(20, dtype=torch.int32))
        clean = run(case)
        dead = case.row_weight == 0
        assert 0 < int(dead.sum()) < 20
        with torch.no_grad():
            case.hidden[dead] = float("nan")
            case.teacher_hidden[dead] = float("inf")
            case.teacher_lse[dead] = float("nan")
        poisoned = run(case)
        assert torch.equal(clean[0].loss_sum, poisoned[0].loss_sum)
        assert torch.equal(clean[0].step_accepted, poisoned[0].step_accepted)
        assert torch.equal(clean[1], poisoned[1])
        assert torch.equal(clean[2], poisoned[2])
        assert not clean[1][dead].any()


def test_all_rows_of_weight_zero_and_no_rows() -> None:
    case = loss_case(6, 2, 33)
    case.row_weight.zero_()
    for empty in (case, loss_case(0, 2, 33), loss_case(0, 0, 33)):
        out, hidden_grad, head_grad = run(empty)
        assert out.loss_sum.item() == 0
        assert not hidden_grad.any() and not head_grad.any()
        for sums in (out.step_loss, out.step_correct, out.step_accepted, out.step_rows):
            assert sums.shape == (7,) and not sums.any()


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_backward_scales_and_can_be_repeated(scale: float) -> None:
    """Whoever holds a gradient may change it in place; the next backward pass must not see that."""
    case = loss_case(9, 3, 65)
    _, hidden_grad, head_grad = run(case)
    out = ops.draft_loss(*case.inputs, **case.keywords)
    for last in (False, False, True):
        (scale * out.loss_sum).backward(retain_graph=not last)
        assert case.hidden.grad is not None and case.head.grad is not None
        torch.testing.assert_close(case.hidden.grad, scale * hidden_grad)
        torch.testing.assert_close(case.head.grad, scale * head_grad)
        case.hidden.grad.mul_(-7)
        case.head.grad.mul_(-7)
        if not last:
            case.hidden.grad = case.head.grad = None
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        out.loss_sum.backward()


def test_gradients_accumulate_over_micro_batches() -> None:
    first, second = loss_case(9, 3, 65), loss_case(14, 5, 65, seed=1)
    second = dataclasses.replace(second, head=first.head)
    expected = run(first)[2] + run(second)[2] / 4
    for case, scale in ((first, 1.0), (second, 0.25)):
        (ops.draft_loss(*case.inputs, **case.keywords).loss_sum * scale).backward()
    assert first.head.grad is not None
    torch.testing.assert_close(first.head.grad, expected)


def test_a_shared_head_gets_both_losses_of_one_graph() -> None:
    """Two nodes of one graph, one of them scaled, end in one parameter."""
    first, second = loss_case(9, 3, 65), loss_case(14, 5, 65, seed=1)
    second = dataclasses.replace(second, head=first.head)
    expected = run(first)[2] + 2 * run(second)[2]
    losses = [ops.draft_loss(*c.inputs, **c.keywords).loss_sum for c in (first, second)]
    (grad,) = torch.autograd.grad(losses[0] + 2 * losses[1], first.head)
    torch.testing.assert_close(grad, expected)


def test_second_derivatives_are_refused() -> None:
    case = loss_case(4, 2, 17)
    loss = ops.draft_loss(*case.inputs, **case.keywords).loss_sum
    with pytest.raises(RuntimeError, match="second derivatives are not available"):
        torch.autograd.grad(loss, case.hidden, create_graph=True)


def test_only_wanted_gradients_exist() -> None:
    case = loss_case(9, 3, 65)
    _, hidden_grad, head_grad = run(case)
    case.head.requires_grad_(False)
    (alone,) = torch.autograd.grad(
        ops.draft_loss(*case.inputs, **case.keywords).loss_sum, case.hidden
    )
    assert torch.equal(alone, hidden_grad)
    case.head.requires_grad_(True)
    case.hidden.requires_grad_(False)
    (alone,) = torch.autograd.grad(
        ops.draft_loss(*case.inputs, **case.keywords).loss_sum, case.head
    )
    assert torch.equal(alone, head_grad)
    with torch.no_grad():
        assert not ops.draft_loss(*case.inputs, **case.keywords).loss_sum.requires_grad


def test_metrics_carry_no_gradient() -> None:
    case = loss_case(9, 3, 65)
    out = ops.draft_loss(*case.inputs, **case.keywords)
    for sums in (out.step_loss, out.step_correct, out.step_accepted, out.step_rows):
        assert not sums.requires_grad and sums.dtype == torch.float64


def test_autocast_casts_hidden_and_head() -> None:
    case = loss_case(9, 3, 65)
    half = case.to(torch.bfloat16)
    half = dataclasses.replace(
        half, teacher_hidden=case.teacher_hidden, teacher_head=case.teacher_head
    )
    with torch.autocast("cpu", torch.bfloat16):
        out, hidden_grad, head_grad = run(case)
    want, want_hidden, want_head = run(half)
    assert torch.equal(out.loss_sum, want.loss_sum)
    assert torch.equal(hidden_grad, want_hidden.float())
    assert torch.equal(head_grad, want_head.float())


def op_arguments(case: LossCase) -> tuple[object, ...]:
    index = (case.row_to_teacher, case.row_weight, case.row_step)
    sizes = (case.teacher_hidden.shape[0], case.num_steps)
    return (
        *case.inputs,
        None,
        None,
        None,
        *index,
        *sizes,
        "jsd",
        1.0,
        0.5,
        0.0,
        0,
        1.0,
        1 << 20,
        True,
        True,
    )


def test_ops_pass_torch_opcheck() -> None:
    case = loss_case(6, 3, 33)
    torch.library.opcheck(torch.ops.specforge_ext.draft_loss.default, op_arguments(case))
    torch.library.opcheck(
        torch.ops.specforge_ext.teacher_stats.default,
        (case.teacher_hidden, case.teacher_head, 1.5, 1 << 20),
    )


def test_compiled_equals_eager() -> None:
    case = loss_case(6, 3, 33)

    def loss(hidden: Tensor, head: Tensor) -> Tensor:
        return ops.draft_loss(hidden * 2, head, *case.inputs[2:], **case.keywords).loss_sum * 3

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    eager_grads = torch.autograd.grad(loss(case.hidden, case.head), (case.hidden, case.head))
    grads = torch.autograd.grad(compiled(case.hidden, case.head), (case.hidden, case.head))
    assert all(torch.equal(a, b) for a, b in zip(eager_grads, grads, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [0, 1, 13])
def test_teacher_stats_follow_the_definition(hardware: str, rows: int, dtype: torch.dtype) -> None:
    case = loss_case(1, rows, 1009, dtype=dtype)
    hidden, head = case.teacher_hidden, case.teacher_head
    want_lse, want_argmax = reference.teacher_stats(hidden.double(), head.double())
    base_lse, _ = reference.teacher_stats(hidden, head)
    for workspace in (1 << 20, 2 * 1009 * 4):
        lse, argmax = ops.teacher_stats(hidden, head, workspace_bytes=workspace)
        assert_no_worse(lse, want_lse, base_lse, slack=1e-6)
        assert argmax.dtype == torch.int64
        if dtype == torch.float32:
            assert torch.equal(argmax, want_argmax)


def test_teacher_stats_at_a_temperature() -> None:
    case = loss_case(1, 9, 1009)
    hidden, head = case.teacher_hidden, case.teacher_head
    lse, argmax = ops.teacher_stats(hidden, head, temperature=1.7)
    want_lse, want_argmax = reference.teacher_stats(hidden.double() / 1.7, head.double())
    torch.testing.assert_close(lse.double(), want_lse, rtol=1e-6, atol=1e-6)
    assert torch.equal(argmax, want_argmax)
    with pytest.raises(ValueError, match="teacher_stats: temperature must be above 0, got 0"):
        ops.teacher_stats(hidden, head, temperature=0)


PEAK_SCRIPT = """
import sys
sys.path.insert(0, "tests")
import torch
from ops_helpers import loss_case
from specforge_ext import ops
torch.set_num_threads(1)
def run(case):
    out = ops.draft_loss(*case.inputs, **case.keywords, workspace_bytes=4 << 20)
    return out, torch.autograd.grad(out.loss_sum, (case.hidden, case.head))
run(loss_case(8, 2, 64))  # what libraries allocate at their first use
rows, teachers, vocab = map(int, sys.argv[1:])
case = loss_case(rows, teachers, vocab, width=32)
def status(key):  # not getrusage: its maximum survives exec, and so holds what the parent held
    return next(int(x.split()[1]) << 10 for x in open("/proc/self/status") if x.startswith(key))
open("/proc/self/clear_refs", "w").write("5")  # the high-water mark becomes what is held now
resident = status("VmRSS")
run(case)
print(status("VmHWM") - resident)
"""


def peak_bytes(rows: int, teachers: int, vocab: int) -> int:
    command = [sys.executable, "-c", PEAK_SCRIPT, *map(str, (rows, teachers, vocab))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return int(done.stdout)


def test_peak_memory_is_workspace_and_outputs() -> None:
    """All logits at once: 1420 * 16000 * 4 = 91 MB; workspace: 4 MiB; outputs: 2.2 MB."""
    assert peak_bytes(1400, 20, 16000) < 16 << 20


def test_peak_memory_does_not_grow_with_the_rows() -> None:
    """Beyond a hidden state's gradient, 128 bytes a row, and the row's own numbers."""
    few, many = (peak_bytes(rows, rows // 7, 4000) for rows in (700, 7000))
    assert many - few < 4 << 20  # the logits of 6300 more rows would be 100 MB


@pytest.mark.parametrize(
    ("name", "value", "match"),
    [
        ("head", torch.ones(33, 23), r"head must be \[33, 24\] float32, got \[33, 23\] float32"),
        (
            "head",
            torch.ones(33, 24).bfloat16(),
            r"head must be \[33, 24\] float32, .*bfloat16",
        ),
        ("hidden", torch.ones(6, 24).double(), r"hidden must be .* float32 or bfloat16, got .*64"),
        ("teacher_head", torch.ones(32, 16), r"teacher_head must be \[33, 16\] float32, got \[32"),
        ("teacher_lse", torch.ones(4), r"teacher_lse must be \[3\] float32, got \[4\]"),
        ("row_weight", torch.ones(5), r"row_weight must be \[6\] float32, got \[5\]"),
        ("row_step", torch.zeros(6), r"row_step must be \[6\] int32, got \[6\] float32"),
        (
            "row_step",
            torch.full((6,), 7, dtype=torch.int32),
            r"step must be in \[0, 7\), got 7 at row 0",
        ),
        (
            "row_to_teacher",
            torch.tensor([0, 0, 1, 2, 3, 3], dtype=torch.int32),
            r"row_to_teacher must lie in \[0, 3\), got 0 to 3",
        ),
        (
            "row_to_teacher",
            torch.tensor([0, 0, 2, 1, 2, 2], dtype=torch.int32),
            r"row_to_teacher must not fall, got 2 then 1 at row 3",
        ),
    ],
)
def test_draft_loss_names_what_does_not_fit(name: str, value: Tensor, match: str) -> None:
    case = dataclasses.replace(loss_case(6, 3, 33), **{name: value})
    with pytest.raises(ValueError, match=match):
        ops.draft_loss(*case.inputs, **case.keywords)


def test_a_workspace_too_small_is_refused() -> None:
    case = loss_case(6, 3, 33)
    with pytest.raises(ValueError, match=r"must hold the logits of a student's row .* 264 bytes"):
        ops.draft_loss(*case.inputs, **case.keywords, workspace_bytes=263)
    ops.draft_loss(*case.inputs, **case.keywords, workspace_bytes=264)
    with pytest.raises(ValueError, match="workspace_bytes must hold one row of logits, 132 bytes"):
        ops.teacher_stats(case.teacher_hidden, case.teacher_head, workspace_bytes=131)
    with pytest.raises(ValueError, match=r"teacher_stats: head must be \[33, 16\] float32"):
        ops.teacher_stats(case.teacher_hidden, torch.ones(33, 15))
