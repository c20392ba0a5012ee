"""The loss of rows whose logits come from a frozen head and a trained, narrow one, added up.

As in `draft_loss` logits exist one chunk at a time and the forward pass does all the work. The
frozen head, which is the large one, gets no gradient: that would be a third product as large as
the logits' own. Results come out a row at a time, for losses that are made of them (the confidence
of DSpark, arXiv 2607.05147). Legend: N student rows, R teacher rows, H, E and G widths of frozen
head, trained head and target, V vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from specforge_ext.ops._chunks import default_workspace_bytes
from specforge_ext.ops._draft_loss import _part, _plan, _row_losses, _Teacher, scaled
from specforge_ext.ops._matmul import (
    HeadGrad,
    corrected_logits_into,
    empty_buffer,
    hidden_grad_into,
    logits_dtype,
    logits_into,
)
from specforge_ext.ops._native import check
from specforge_ext.ops.results import RowLoss

_FLOATS = (torch.float32, torch.bfloat16)


class TwoHeadLoss(NamedTuple):
    """loss_sum: [] float32, sum of weight * loss, nats, differentiable in hidden, narrow and
    narrow_head.

    The others are detached, a value a row, 0 where the weight is 0. loss: [N] float32, not
    weighted. accepted: [N] float32, sum_v min(teacher, student); for "hard_ce" the label's
    probability. correct: [N] bool, the student's argmax is the teacher's; for "hard_ce" the label.
    top_prob: [N] float32, the student's largest probability.
    """

    loss_sum: Tensor
    loss: Tensor
    accepted: Tensor
    correct: Tensor
    top_prob: Tensor


def two_head_loss(
    hidden_NH: Tensor,
    head_VH: Tensor,
    narrow_NE: Tensor,
    narrow_head_VE: Tensor,
    teacher_hidden_RG: Tensor | None = None,
    teacher_head_VG: Tensor | None = None,
    *,
    loss: RowLoss,
    row_to_teacher: Tensor,
    row_weight: Tensor,
    label: Tensor | None = None,
    workspace_bytes: int | None = None,
) -> TwoHeadLoss:
    """Sum of weight * loss of the rows head hidden + narrow_head narrow.

    hidden [N, H], narrow [N, E], narrow_head [V, E]: gradients flow to these. head: [V, H], frozen.
        All float32 or all bfloat16; under autocast they are cast to its dtype first.
    teacher_hidden: [R, G] after the target's final norm. teacher_head: [V, G]. float32 or bfloat16,
        the same. Both None for "hard_ce".
    loss: any kind but "lk_lambda", no top_k.
    row_to_teacher: [N] int32, non-decreasing: each teacher is then computed once for all its
        students. row_weight: [N] float32; rows of weight 0 may hold anything, NaN too.
    label: [R] int32 in [0, V): for "hard_ce", or a hard_weight.
    workspace_bytes: bound on the logits that exist at a time, by default as in `draft_loss`.

    The narrow head's product is added to the frozen one's where that lies; the two are not joined,
    which would copy the frozen head. On CUDA it synchronises once, to read row_to_teacher.
    Deterministic, differentiable once. ValueError names what is missing, too much or does not fit.
    Formulas: csrc/loss/loss_rows.h.
    """
    heads = (hidden_NH, head_VH, narrow_NE, narrow_head_VE)
    if torch.is_autocast_enabled(hidden_NH.device.type):
        dtype = torch.get_autocast_dtype(hidden_NH.device.type)
        heads = tuple(x.to(dtype) for x in heads)  # type: ignore[assignment]
    _check_presence(loss, (teacher_hidden_RG, teacher_head_VG), label)
    _check_shapes(*heads, teacher_hidden_RG, teacher_head_VG, row_to_teacher, row_weight, label)
    if workspace_bytes is None:
        workspace_bytes = default_workspace_bytes(hidden_NH.device, vocab=head_VH.shape[0])
    differentiates = torch.is_grad_enabled()
    hidden, head, narrow, narrow_head = heads
    loss_sum, rows_3N, correct_N, *_ = _two_head_loss(
        hidden,
        head.detach(),
        narrow,
        narrow_head,
        None if teacher_hidden_RG is None else teacher_hidden_RG.detach(),
        None if teacher_head_VG is None else teacher_head_VG.detach(),
        label,
        row_to_teacher,
        row_weight.detach(),
        loss.kind,
        loss.temperature,
        loss.beta,
        loss.hard_weight,
        workspace_bytes,
        differentiates and hidden.requires_grad,
        differentiates and narrow.requires_grad,
        differentiates and narrow_head.requires_grad,
    )
    row_loss, accepted, top_prob = rows_3N.detach()
    return TwoHeadLoss(loss_sum, row_loss, accepted, correct_N.detach().bool(), top_prob)


def _check_presence(
    loss: RowLoss, teacher: tuple[Tensor | None, Tensor | None], label: Tensor | None
) -> None:
    if loss.kind == "lk_lambda" or loss.top_k:
        raise ValueError(f"two_head_loss: loss must not be lk_lambda or have a top_k, got {loss}")
    has_teacher = loss.kind != "hard_ce"
    wants_label = not has_teacher or loss.hard_weight != 0
    for name, tensor, wanted in (
        ("teacher_hidden", teacher[0], has_teacher),
        ("teacher_head", teacher[1], has_teacher),
        ("label", label, wants_label),
    ):
        if (tensor is not None) != wanted:
            verb = "must be given" if wanted else "must be None"
            raise ValueError(f"two_head_loss: {name} {verb} with {loss}")


def _check_shapes(
    hidden: Tensor,
    head: Tensor,
    narrow: Tensor,
    narrow_head: Tensor,
    teacher_hidden: Tensor | None,
    teacher_head: Tensor | None,
    row_to_teacher: Tensor,
    row_weight: Tensor,
    label: Tensor | None,
) -> None:
    op, dtype = "two_head_loss", hidden.dtype
    rows, vocab, narrow_width = hidden.shape[0], head.shape[0], narrow.shape[-1]
    check(op, "hidden", hidden, (rows, hidden.shape[-1]), *_FLOATS)
    check(op, "head", head, (vocab, hidden.shape[-1]), dtype)
    check(op, "narrow", narrow, (rows, narrow_width), dtype)
    check(op, "narrow_head", narrow_head, (vocab, narrow_width), dtype)
    check(op, "row_to_teacher", row_to_teacher, (rows,), torch.int32)
    check(op, "row_weight", row_weight, (rows,), torch.float32)
    if teacher_hidden is not None and teacher_head is not None:
        teachers, width = teacher_hidden.shape[0], teacher_hidden.shape[-1]
        check(op, "teacher_hidden", teacher_hidden, (teachers, width), *_FLOATS)
        check(op, "teacher_head", teacher_head, (vocab, width), teacher_hidden.dtype)
        if label is not None:
            check(op, "label", label, (teachers,), torch.int32)
    elif label is not None:
        check(op, "label", label, (label.shape[0],), torch.int32)


@torch.library.custom_op("specforge_ext::two_head_loss", mutates_args=())
def _two_head_loss(
    hidden_NH: Tensor,
    head_VH: Tensor,
    narrow_NE: Tensor,
    narrow_head_VE: Tensor,
    teacher_hidden_RG: Tensor | None,
    teacher_head_VG: Tensor | None,
    label_R: Tensor | None,
    row_to_teacher_N: Tensor,
    row_weight_N: Tensor,
    kind: str,
    temperature: float,
    beta: float,
    hard_weight: float,
    workspace_bytes: int,
    wants_hidden_grad: bool,
    wants_narrow_grad: bool,
    wants_narrow_head_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss_sum [], loss, accepted and top_prob [3, N], correct [N] u8, d loss_sum / d hidden,
    narrow and narrow_head). A gradient that is not wanted is an empty tensor.
    """
    num_rows, vocab = hidden_NH.shape[0], head_VH.shape[0]
    dtype = logits_dtype(hidden_NH)
    teacher = _Teacher(teacher_hidden_RG, teacher_head_VG)
    per_teacher = label_R if teacher_hidden_RG is None else teacher_hidden_RG
    assert per_teacher is not None  # _check_presence
    chunks = _plan(
        row_to_teacher_N,
        per_teacher.shape[0],
        row_bytes=vocab * dtype.itemsize,
        teacher_bytes=teacher.row_bytes,
        workspace_bytes=workspace_bytes,
        op="two_head_loss",
    )
    hidden_grad_NH = torch.empty_like(
        hidden_NH if wants_hidden_grad else hidden_NH[:0], memory_format=torch.contiguous_format
    )
    narrow_grad_NE = torch.empty_like(
        narrow_NE if wants_narrow_grad else narrow_NE[:0], memory_format=torch.contiguous_format
    )
    head_grad = HeadGrad(narrow_head_VE, num_chunks=len(chunks)) if wants_narrow_head_grad else None
    rows_3N = hidden_NH.new_empty((3, num_rows), dtype=torch.float32)
    entropy_N = torch.empty_like(rows_3N[0])
    correct_N = hidden_NH.new_empty(num_rows, dtype=torch.uint8)
    most_rows = max((chunk.num_rows for chunk in chunks), default=0)
    most_teachers = max((chunk.num_teachers for chunk in chunks), default=0)
    logits_CV = empty_buffer(hidden_NH, (most_rows, vocab), dtype)
    with torch.autocast(hidden_NH.device.type, enabled=False):
        for chunk in chunks:
            rows, teachers = chunk.rows, chunk.teachers
            logits, weight = logits_CV[: chunk.num_rows], row_weight_N[rows]
            # 0 * NaN is NaN: a row of weight 0 must not reach the product of the head's gradient.
            skipped = (weight == 0)[:, None]
            narrow = narrow_NE[rows].masked_fill(skipped, 0)
            logits_into(logits, hidden_NH[rows].masked_fill(skipped, 0), head_VH)
            corrected_logits_into(logits, logits, narrow, narrow_head_VE)
            _row_losses(
                logits,
                teacher.logits(chunk, most_rows=most_teachers),
                weight,
                [*rows_3N[:2, rows], correct_N[rows], rows_3N[2, rows], entropy_N[rows]],
                row_to_teacher=row_to_teacher_N[rows] - chunk.teacher,
                kind=kind,
                temperature=temperature,
                beta=beta,
                hard_weight=hard_weight,
                writes_gradient=wants_hidden_grad or wants_narrow_grad or wants_narrow_head_grad,
                teacher_lse=None,
                teacher_argmax=None,
                label=_part(label_R, teachers),
                kl_weight=None,
            )
            if wants_hidden_grad:
                hidden_grad_into(hidden_grad_NH[rows], logits, head_VH)
            if wants_narrow_grad:
                hidden_grad_into(narrow_grad_NE[rows], logits, narrow_head_VE)
            if head_grad:
                head_grad.add(logits, narrow)
    # A row of weight 0 has loss 0. In float64, as draft_loss adds.
    loss_sum = (rows_3N[0].double() * row_weight_N).sum().float()
    head_grad_VE = head_grad.result() if head_grad else narrow_head_VE.new_empty(0)
    return loss_sum, rows_3N, correct_N, hidden_grad_NH, narrow_grad_NE, head_grad_VE


@_two_head_loss.register_fake
def _(
    hidden_NH: Tensor,
    head_VH: Tensor,
    narrow_NE: Tensor,
    narrow_head_VE: Tensor,
    teacher_hidden_RG: Tensor | None,
    teacher_head_VG: Tensor | None,
    label_R: Tensor | None,
    row_to_teacher_N: Tensor,
    row_weight_N: Tensor,
    kind: str,
    temperature: float,
    beta: float,
    hard_weight: float,
    workspace_bytes: int,
    wants_hidden_grad: bool,
    wants_narrow_grad: bool,
    wants_narrow_head_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows = hidden_NH.shape[0]
    return (
        hidden_NH.new_empty((), dtype=torch.float32),
        hidden_NH.new_empty((3, rows), dtype=torch.float32),
        hidden_NH.new_empty(rows, dtype=torch.uint8),
        hidden_NH.new_empty(hidden_NH.shape if wants_hidden_grad else (0, hidden_NH.shape[1])),
        narrow_NE.new_empty(narrow_NE.shape if wants_narrow_grad else (0, narrow_NE.shape[1])),
        narrow_head_VE.new_empty(narrow_head_VE.shape if wants_narrow_head_grad else (0,)),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.wants, ctx.num_inputs = inputs[-3:], len(inputs)
    ctx.save_for_backward(*output[3:])
    # Or every backward would fill zeros of the size of the gradients, for outputs nobody uses.
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_loss: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled():  # create_graph: its result would lack the terms of this op
        raise RuntimeError(
            "two_head_loss: second derivatives are not available (create_graph=True)"
        )
    hidden, narrow, narrow_head = (
        scaled(saved, grad_loss) if wanted and grad_loss is not None else None
        for saved, wanted in zip(ctx.saved_tensors, ctx.wants, strict=True)
    )
    return hidden, None, narrow, narrow_head, *(None for _ in range(ctx.num_inputs - 4))


_two_head_loss.register_autograd(_backward, setup_context=_save)
