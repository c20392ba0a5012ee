"""The loss of rows whose logits come from a frozen head and a trained, narrow one, added up.

As in `draft_loss` logits exist one chunk at a time and the forward pass does all the work. Results
come out a row at a time, for losses that are made of them (the confidence of DSpark, arXiv
2607.05147). Legend: N student rows, R teacher rows, H, E and G widths of frozen head, trained head
and target, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from specforge_ext.ops._chunks import default_workspace_bytes
from specforge_ext.ops._native import FLOATS, check, in_autocast_dtype
from specforge_ext.ops._two_heads import two_head_loss_op
from specforge_ext.ops.results import RowLoss


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
    _check_presence(loss, (teacher_hidden_RG, teacher_head_VG), label)
    hidden, head, narrow, narrow_head = in_autocast_dtype(
        hidden_NH, head_VH, narrow_NE, narrow_head_VE
    )
    _check_shapes(
        hidden,
        head,
        narrow,
        narrow_head,
        teacher_hidden_RG,
        teacher_head_VG,
        row_to_teacher,
        row_weight,
        label,
    )
    if workspace_bytes is None:
        workspace_bytes = default_workspace_bytes(hidden.device, vocab=head.shape[0])
    differentiates = torch.is_grad_enabled()
    loss_sum, rows_J3N, correct_JN, *_ = two_head_loss_op(
        hidden,
        narrow,
        narrow_head,
        head.detach(),
        None if teacher_hidden_RG is None else teacher_hidden_RG.detach(),
        None if teacher_head_VG is None else teacher_head_VG.detach(),
        label,
        row_to_teacher,
        row_weight.detach(),
        loss.kind,
        loss.temperature,
        loss.beta,
        loss.hard_weight,
        None,
        workspace_bytes,
        differentiates and hidden.requires_grad,
        differentiates and narrow.requires_grad,
        differentiates and narrow_head.requires_grad,
    )
    row_loss, accepted, top_prob = rows_J3N[0].detach()
    return TwoHeadLoss(loss_sum, row_loss, accepted, correct_JN[0].detach().bool(), top_prob)


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
    check(op, "hidden", hidden, (rows, hidden.shape[-1]), *FLOATS)
    check(op, "head", head, (vocab, hidden.shape[-1]), dtype)
    check(op, "narrow", narrow, (rows, narrow_width), dtype)
    check(op, "narrow_head", narrow_head, (vocab, narrow_width), dtype)
    check(op, "row_to_teacher", row_to_teacher, (rows,), torch.int32)
    check(op, "row_weight", row_weight, (rows,), torch.float32)
    if teacher_hidden is not None and teacher_head is not None:
        teachers, width = teacher_hidden.shape[0], teacher_hidden.shape[-1]
        check(op, "teacher_hidden", teacher_hidden, (teachers, width), *FLOATS)
        check(op, "teacher_head", teacher_head, (vocab, width), teacher_hidden.dtype)
        if label is not None:
            check(op, "label", label, (teachers,), torch.int32)
    elif label is not None:
        check(op, "label", label, (label.shape[0],), torch.int32)
