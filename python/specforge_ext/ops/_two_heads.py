"""The op under `two_head_loss` and `corrected_label_loss`: rows of two heads, added up.

A row's logits are head hidden + narrow_head narrow: of a frozen head, the large one, and of a
trained, narrow one. They may be judged twice, with and without the second part: both are made of
one product with the frozen head, and one product takes the sum of their gradients back through it.
That head gets no gradient, which would be a third product as large. Legend: N student rows, R
teacher rows, H, E and G widths of frozen head, narrow head and target, V vocabulary, J = 1, or 2
where the logits are judged twice: as they are, and without the narrow head's part.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specforge_ext.ops._ahead import gradient_buffer, made_ahead
from specforge_ext.ops._draft_loss import Teacher, part_of, plan_chunks, row_losses
from specforge_ext.ops._matmul import (
    HeadGrad,
    corrected_logits_into,
    empty_buffer,
    hidden_grad_into,
    logits_dtype,
    logits_into,
)


@torch.library.custom_op("specforge_ext::two_head_loss", mutates_args=())
def two_head_loss_op(
    hidden_NH: Tensor,
    narrow_NE: Tensor,
    narrow_head_VE: Tensor,
    head_VH: Tensor,
    teacher_hidden_RG: Tensor | None,
    teacher_head_VG: Tensor | None,
    label_R: Tensor | None,
    row_to_teacher_N: Tensor | None,
    row_weight_N: Tensor,
    kind: str,
    temperature: float,
    beta: float,
    hard_weight: float,
    base_share: float | None,
    workspace_bytes: int,
    wants_hidden_grad: bool,
    wants_narrow_grad: bool,
    wants_narrow_head_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss_sum [] f32; loss, accepted and top_prob [J, 3, N] f32; correct [J, N] u8; d loss_sum /
    d hidden, narrow and narrow_head, empty if not wanted).

    row_to_teacher: None if row n has teacher or label n. base_share: None, or the share of the loss
    without the narrow head's part; the other's is the rest.
    """
    shares = (1.0,) if base_share is None else (1 - base_share, base_share)
    num_rows, vocab = hidden_NH.shape[0], head_VH.shape[0]
    dtype = logits_dtype(hidden_NH)
    teacher = Teacher(teacher_hidden_RG, teacher_head_VG)
    per_teacher = label_R if teacher_hidden_RG is None else teacher_hidden_RG
    assert per_teacher is not None  # one of the two is there, see the callers
    if (row_to_teacher := row_to_teacher_N) is None:
        row_to_teacher = torch.arange(num_rows, dtype=torch.int32)
    chunks = plan_chunks(
        row_to_teacher,
        per_teacher.shape[0],
        row_bytes=len(shares) * vocab * dtype.itemsize,
        teacher_bytes=teacher.row_bytes,
        workspace_bytes=workspace_bytes,
        op="two_head_loss" if base_share is None else "corrected_label_loss",
    )
    row_to_teacher = row_to_teacher.to(hidden_NH.device)
    hidden_grad_NH = gradient_buffer(hidden_NH, wanted=wants_hidden_grad)
    narrow_grad_NE = gradient_buffer(narrow_NE, wanted=wants_narrow_grad)
    if not shares[0]:
        narrow_grad_NE.zero_()
    head_grad = HeadGrad(narrow_head_VE, num_chunks=len(chunks)) if wants_narrow_head_grad else None
    differentiates = wants_hidden_grad or wants_narrow_grad or wants_narrow_head_grad
    rows_J3N = hidden_NH.new_empty((len(shares), 3, num_rows), dtype=torch.float32)
    correct_JN = hidden_NH.new_empty((len(shares), num_rows), dtype=torch.uint8)
    entropy_N = torch.empty_like(rows_J3N[0, 0])
    most_rows = max((chunk.num_rows for chunk in chunks), default=0)
    most_teachers = max((chunk.num_teachers for chunk in chunks), default=0)
    logits_JCV = empty_buffer(hidden_NH, (len(shares), most_rows, vocab), dtype)
    with torch.autocast(hidden_NH.device.type, enabled=False):
        for chunk in chunks:
            rows, teachers = chunk.rows, chunk.teachers
            weight, judged = row_weight_N[rows], logits_JCV[:, : chunk.num_rows]
            # Where the logits are judged once, both are the same memory.
            logits, base = judged[0], judged[-1]
            # 0 * NaN is NaN: a row of weight 0 must not reach the product of the head's gradient.
            skipped = (weight == 0)[:, None]
            narrow = narrow_NE[rows].masked_fill(skipped, 0)
            logits_into(base, hidden_NH[rows].masked_fill(skipped, 0), head_VH)
            corrected_logits_into(logits, base, narrow, narrow_head_VE)
            teacher_logits = teacher.logits(chunk, most_rows=most_teachers)
            for of_rows, correct, share, z in zip(
                rows_J3N[..., rows], correct_JN[:, rows], shares, judged, strict=True
            ):
                loss, accepted, top_prob = of_rows
                row_losses(
                    z,
                    teacher_logits,
                    # A share of 0 is no weight of 0: the row's loss is still wanted.
                    weight * share if share else weight,
                    [loss, accepted, correct, top_prob, entropy_N[rows]],
                    row_to_teacher=row_to_teacher[rows] - chunk.teacher,
                    kind=kind,
                    temperature=temperature,
                    beta=beta,
                    hard_weight=hard_weight,
                    writes_gradient=differentiates and share != 0,
                    teacher_lse=None,
                    teacher_argmax=None,
                    label=part_of(label_R, teachers),
                    kl_weight=None,
                )
            if wants_narrow_grad and shares[0]:
                hidden_grad_into(narrow_grad_NE[rows], logits, narrow_head_VE)
            if head_grad and shares[0]:
                head_grad.add(logits, narrow)
            if wants_hidden_grad:
                if base_share and shares[0]:
                    base += logits
                hidden_grad_into(hidden_grad_NH[rows], base if base_share else logits, head_VH)
    # A row of weight 0 has loss 0. In float64, as draft_loss adds.
    loss_N = sum(share * x.double() for share, x in zip(shares, rows_J3N[:, 0], strict=True))
    loss_sum = (loss_N * row_weight_N).sum().float()
    head_grad_VE = head_grad.result() if head_grad else narrow_head_VE.new_empty(0)
    return loss_sum, rows_J3N, correct_JN, hidden_grad_NH, narrow_grad_NE, head_grad_VE


@two_head_loss_op.register_fake
def _(
    hidden_NH: Tensor,
    narrow_NE: Tensor,
    narrow_head_VE: Tensor,
    head_VH: Tensor,
    teacher_hidden_RG: Tensor | None,
    teacher_head_VG: Tensor | None,
    label_R: Tensor | None,
    row_to_teacher_N: Tensor | None,
    row_weight_N: Tensor,
    kind: str,
    temperature: float,
    beta: float,
    hard_weight: float,
    base_share: float | None,
    workspace_bytes: int,
    wants_hidden_grad: bool,
    wants_narrow_grad: bool,
    wants_narrow_head_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows, judged = hidden_NH.shape[0], 1 if base_share is None else 2
    return (
        hidden_NH.new_empty((), dtype=torch.float32),
        hidden_NH.new_empty((judged, 3, rows), dtype=torch.float32),
        hidden_NH.new_empty((judged, rows), dtype=torch.uint8),
        gradient_buffer(hidden_NH, wanted=wants_hidden_grad),
        gradient_buffer(narrow_NE, wanted=wants_narrow_grad),
        narrow_head_VE.new_empty(narrow_head_VE.shape if wants_narrow_head_grad else (0,)),
    )


made_ahead(two_head_loss_op, name="two_head_loss", num_gradients=3)
