"""The loss of all rows of a draft at once, from hidden states; logits exist one chunk at a time.

Per chunk: two matrix products give the logits of its students and of their teachers, one native
kernel turns the students' logits into their gradient, two more products turn that into the
gradients of hidden and head. So the forward pass does all the work, and backward only scales.
Legend: N student rows, R teacher rows, H and G widths of draft and target, V the draft's
vocabulary, L steps.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from specforge_ext import _C
from specforge_ext.ops._chunks import Chunk, cut, default_workspace_bytes
from specforge_ext.ops._matmul import (
    HeadGrad,
    empty_buffer,
    hidden_grad_into,
    logits_dtype,
    logits_into,
)
from specforge_ext.ops._native import check, stream_of
from specforge_ext.ops.results import DraftLoss

_FLOATS = (torch.float32, torch.bfloat16)


def draft_loss(
    hidden_NH: Tensor,
    head_VH: Tensor,
    teacher_hidden_RG: Tensor,
    teacher_head_VG: Tensor,
    teacher_lse_R: Tensor,
    *,
    row_to_teacher: Tensor,
    row_weight: Tensor,
    row_step: Tensor,
    num_steps: int,
    workspace_bytes: int | None = None,
) -> DraftLoss:
    """Soft cross entropy of draft rows against the target restricted to the draft's vocabulary.

    hidden: [N, H], what the draft's head multiplies. head: [V, H]. Both float32 or both bfloat16;
        under autocast they are cast to its dtype first. Gradients flow to these two, each only
        where wanted.
    teacher_hidden: [R, G] after the target's final norm. teacher_head: [V, G], its rows of the
        draft's vocabulary. float32 or bfloat16, the same.
    teacher_lse: [R] float32, logsumexp of the target's logits over its FULL vocabulary
        (`teacher_stats`).
    row_to_teacher: [N] int32, non-decreasing: each teacher is then computed once for all its
        students.
    row_weight: [N] float32; rows of weight 0 may hold anything, NaN too, and get a gradient of
        exactly 0.
    row_step: [N] int32 in [0, num_steps).
    workspace_bytes: bound on the logits that exist at a time, students and teachers together. None:
        what the matrix products need for full speed: 384 float32 rows on the CPU, 2560 bf16 ones
        on CUDA, whatever N is.

    Beyond outputs and workspace it may take float32 [V, H] for the head's gradient when that is
    bfloat16. On CUDA it synchronises once, to read row_to_teacher. Deterministic. Differentiable
    once. ValueError if a tensor does not fit, row_to_teacher falls or leaves [0, R), or a student
    row and its teacher do not fit the workspace. Formula and source: csrc/loss/loss_rows.h.
    """
    if torch.is_autocast_enabled(hidden_NH.device.type):
        dtype = torch.get_autocast_dtype(hidden_NH.device.type)
        hidden_NH, head_VH = hidden_NH.to(dtype), head_VH.to(dtype)
    num_rows, width = hidden_NH.shape[0], hidden_NH.shape[-1]
    vocab, num_teachers = head_VH.shape[0], teacher_hidden_RG.shape[0]
    teacher_dtype, teacher_width = teacher_hidden_RG.dtype, teacher_hidden_RG.shape[-1]
    for name, tensor, shape, dtypes in (
        ("hidden", hidden_NH, (num_rows, width), _FLOATS),
        ("head", head_VH, (vocab, width), (hidden_NH.dtype,)),
        ("teacher_hidden", teacher_hidden_RG, (num_teachers, teacher_width), _FLOATS),
        ("teacher_head", teacher_head_VG, (vocab, teacher_width), (teacher_dtype,)),
        ("teacher_lse", teacher_lse_R, (num_teachers,), (torch.float32,)),
        ("row_to_teacher", row_to_teacher, (num_rows,), (torch.int32,)),
        ("row_weight", row_weight, (num_rows,), (torch.float32,)),
        ("row_step", row_step, (num_rows,), (torch.int32,)),
    ):
        check("draft_loss", name, tensor, shape, *dtypes)
    if workspace_bytes is None:
        workspace_bytes = default_workspace_bytes(hidden_NH.device, vocab=vocab)
    differentiates = torch.is_grad_enabled()
    loss_sum, sums_4L, _, _ = _draft_loss(
        hidden_NH,
        head_VH,
        teacher_hidden_RG.detach(),
        teacher_head_VG.detach(),
        teacher_lse_R.detach(),
        row_to_teacher,
        row_weight.detach(),
        row_step,
        num_steps,
        workspace_bytes,
        differentiates and hidden_NH.requires_grad,
        differentiates and head_VH.requires_grad,
    )
    sums_4L = sums_4L.detach()
    return DraftLoss(loss_sum, sums_4L[0], sums_4L[1], sums_4L[2], sums_4L[3])


def _plan(
    row_to_teacher: Tensor,
    num_teachers: int,
    *,
    row_bytes: int,
    teacher_bytes: int,
    workspace_bytes: int,
) -> list[Chunk]:
    """Checks the values of row_to_teacher (one copy to the host), then cuts it."""
    if workspace_bytes < row_bytes + teacher_bytes:
        raise ValueError(
            f"draft_loss: workspace_bytes must hold a student's row of logits and its teacher's, "
            f"{row_bytes + teacher_bytes} bytes, got {workspace_bytes}"
        )
    on_host = row_to_teacher.cpu()
    if on_host.numel() and (int(on_host.min()) < 0 or int(on_host.max()) >= num_teachers):
        raise ValueError(
            f"draft_loss: row_to_teacher must lie in [0, {num_teachers}), "
            f"got {int(on_host.min())} to {int(on_host.max())}"
        )
    falls = torch.nonzero(on_host[1:] < on_host[:-1])
    if falls.numel():
        at = int(falls[0]) + 1
        raise ValueError(
            f"draft_loss: row_to_teacher must not fall, got {int(on_host[at - 1])} then "
            f"{int(on_host[at])} at row {at}"
        )
    return cut(
        on_host, row_bytes=row_bytes, teacher_bytes=teacher_bytes, workspace_bytes=workspace_bytes
    )


@torch.library.custom_op("specforge_ext::draft_loss", mutates_args=())
def _draft_loss(
    hidden_NH: Tensor,
    head_VH: Tensor,
    teacher_hidden_RG: Tensor,
    teacher_head_VG: Tensor,
    teacher_lse_R: Tensor,
    row_to_teacher_N: Tensor,
    row_weight_N: Tensor,
    row_step_N: Tensor,
    num_steps: int,
    workspace_bytes: int,
    wants_hidden_grad: bool,
    wants_head_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss_sum [], sums [4, L] as in DraftLoss, d loss_sum / d hidden, d loss_sum / d head).

    A gradient that is not wanted is an empty tensor.
    """
    num_rows, vocab = hidden_NH.shape[0], head_VH.shape[0]
    dtype, teacher_dtype = logits_dtype(hidden_NH), logits_dtype(teacher_hidden_RG)
    chunks = _plan(
        row_to_teacher_N,
        teacher_hidden_RG.shape[0],
        row_bytes=vocab * dtype.itemsize,
        teacher_bytes=vocab * teacher_dtype.itemsize,
        workspace_bytes=workspace_bytes,
    )
    hidden_grad_NH = torch.empty_like(
        hidden_NH if wants_hidden_grad else hidden_NH[:0], memory_format=torch.contiguous_format
    )
    head_grad = HeadGrad(head_VH, num_chunks=len(chunks)) if wants_head_grad else None
    loss_N, accepted_N, top_prob_N, entropy_N = (
        hidden_NH.new_empty(num_rows, dtype=torch.float32) for _ in range(4)
    )
    correct_N = hidden_NH.new_empty(num_rows, dtype=torch.uint8)
    most_rows = max((chunk.num_rows for chunk in chunks), default=0)
    most_teachers = max((chunk.num_teachers for chunk in chunks), default=0)
    logits_CV = empty_buffer(hidden_NH, (most_rows, vocab), dtype)
    teacher_CV = empty_buffer(hidden_NH, (most_teachers, vocab), teacher_dtype)
    with torch.autocast(hidden_NH.device.type, enabled=False):
        for chunk in chunks:
            rows, teachers = chunk.rows, chunk.teachers
            logits, teacher = logits_CV[: chunk.num_rows], teacher_CV[: chunk.num_teachers]
            weight = row_weight_N[rows]
            # 0 * NaN is NaN: a row of weight 0 must not reach the product of the head's gradient.
            hidden = hidden_NH[rows].masked_fill(weight[:, None] == 0, 0)
            logits_into(logits, hidden, head_VH)
            logits_into(teacher, teacher_hidden_RG[teachers], teacher_head_VG)
            _C.loss_rows(
                logits,
                teacher,
                row_to_teacher_N[rows] - chunk.teacher,
                weight,
                loss_N[rows],
                accepted_N[rows],
                correct_N[rows],
                top_prob_N[rows],
                entropy_N[rows],
                kind="soft_ce",
                temperature=1.0,
                beta=0.5,
                hard_weight=0.0,
                writes_gradient=True,
                teacher_lse=teacher_lse_R[teachers],
                stream=stream_of(logits),
            )
            if wants_hidden_grad:
                hidden_grad_into(hidden_grad_NH[rows], logits, head_VH)
            if head_grad:
                head_grad.add(logits, hidden)
    sums_7L = hidden_NH.new_empty((7, num_steps), dtype=torch.float64)
    _C.step_sums(
        loss_N,
        accepted_N,
        correct_N,
        top_prob_N,
        entropy_N,
        row_weight_N,
        row_step_N,
        sums_7L,
        stream_of(loss_N),
    )
    loss_sum = sums_7L[4].sum().float()
    head_grad_VH = head_grad.result() if head_grad else head_VH.new_empty(0)
    return loss_sum, sums_7L[:4].clone(), hidden_grad_NH, head_grad_VH


@_draft_loss.register_fake
def _(
    hidden_NH: Tensor,
    head_VH: Tensor,
    teacher_hidden_RG: Tensor,
    teacher_head_VG: Tensor,
    teacher_lse_R: Tensor,
    row_to_teacher_N: Tensor,
    row_weight_N: Tensor,
    row_step_N: Tensor,
    num_steps: int,
    workspace_bytes: int,
    wants_hidden_grad: bool,
    wants_head_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        hidden_NH.new_empty((), dtype=torch.float32),
        hidden_NH.new_empty((4, num_steps), dtype=torch.float64),
        hidden_NH.new_empty(hidden_NH.shape if wants_hidden_grad else (0, hidden_NH.shape[1])),
        head_VH.new_empty(head_VH.shape if wants_head_grad else (0,)),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.wants = inputs[-2:]
    ctx.save_for_backward(*output[2:])
    # Or every backward would fill zeros of the size of the gradients, for outputs nobody uses.
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_loss: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled():  # create_graph: its result would lack the terms of this op
        raise RuntimeError("draft_loss: second derivatives are not available (create_graph=True)")
    grads: list[Tensor | None] = [None, None]
    if grad_loss is not None:
        for k, (saved, wanted) in enumerate(zip(ctx.saved_tensors, ctx.wants, strict=True)):
            grads[k] = _scaled(saved, grad_loss) if wanted else None
    return (*grads, *(None for _ in range(10)))


def _scaled(saved: Tensor, grad_loss: Tensor) -> Tensor:
    """saved * grad_loss, in the memory of `saved` where no later backward can want it.

    The head's gradient is the largest tensor of a step: a copy costs page faults and memory. With
    retain_graph, and while a compiler traces (a subclass of Tensor), it is a copy nevertheless.
    """
    keeps = torch._C._autograd._get_current_graph_task_keep_graph()
    if keeps or type(grad_loss) is not Tensor:
        return saved * grad_loss
    if grad_loss.device.type == "cpu" and grad_loss.item() == 1:
        return saved
    return saved.mul_(grad_loss)


_draft_loss.register_autograd(_backward, setup_context=_save)
