"""The op under `draft_loss`: the loop over chunks, and what autograd needs. Legend: as there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from specforge_ext import _C
from specforge_ext.ops._ahead import gradient_buffer, made_ahead
from specforge_ext.ops._chunks import Chunk, cut
from specforge_ext.ops._matmul import (
    HeadGrad,
    empty_buffer,
    hidden_grad_into,
    logits_dtype,
    logits_into,
)
from specforge_ext.ops._native import stream_of
from specforge_ext.ops._top_k import raise_top_k


def plan_chunks(
    row_to_teacher: Tensor,
    num_teachers: int,
    *,
    row_bytes: int,
    teacher_bytes: int,
    workspace_bytes: int,
    op: str = "draft_loss",
) -> list[Chunk]:
    """Checks the values of row_to_teacher (one copy to the host), then cuts it."""
    if workspace_bytes < row_bytes + teacher_bytes:
        raise ValueError(
            f"{op}: workspace_bytes must hold the logits of a student's row and of its teacher's, "
            f"{row_bytes + teacher_bytes} bytes, got {workspace_bytes}"
        )
    on_host = row_to_teacher.cpu()
    if on_host.numel() and (int(on_host.min()) < 0 or int(on_host.max()) >= num_teachers):
        raise ValueError(
            f"{op}: row_to_teacher must lie in [0, {num_teachers}), "
            f"got {int(on_host.min())} to {int(on_host.max())}"
        )
    falls = torch.nonzero(on_host[1:] < on_host[:-1])
    if falls.numel():
        at = int(falls[0]) + 1
        raise ValueError(
            f"{op}: row_to_teacher must not fall, got {int(on_host[at - 1])} then "
            f"{int(on_host[at])} at row {at}"
        )
    return cut(
        on_host, row_bytes=row_bytes, teacher_bytes=teacher_bytes, workspace_bytes=workspace_bytes
    )


class Teacher:
    """The teachers' logits of one chunk at a time; nothing where the loss has only labels."""

    def __init__(self, hidden_RG: Tensor | None, head_UG: Tensor | None) -> None:
        self._hidden_RG, self._head_UG = hidden_RG, head_UG
        self._buffer_CU: Tensor | None = None

    @property
    def row_bytes(self) -> int:
        if self._hidden_RG is None or self._head_UG is None:
            return 0
        return self._head_UG.shape[0] * logits_dtype(self._hidden_RG).itemsize

    def logits(self, chunk: Chunk, *, most_rows: int) -> Tensor | None:
        if self._hidden_RG is None or self._head_UG is None:
            return None
        if self._buffer_CU is None:
            shape = (most_rows, self._head_UG.shape[0])
            self._buffer_CU = empty_buffer(self._hidden_RG, shape, logits_dtype(self._hidden_RG))
        logits = self._buffer_CU[: chunk.num_teachers]
        logits_into(logits, self._hidden_RG[chunk.teachers], self._head_UG)
        return logits


def part_of(side: Tensor | None, part: slice) -> Tensor | None:
    return None if side is None else side[part]


def row_losses(
    logits: Tensor,
    teacher_logits: Tensor | None,
    weight: Tensor,
    results: Sequence[Tensor],
    **of_rows: Any,
) -> None:
    """results: loss, accepted, correct, top_prob and entropy, written."""
    loss, accepted, correct, top_prob, entropy = results
    _C.loss_rows(
        logits=logits,
        teacher=teacher_logits,
        weight=weight,
        loss=loss,
        accepted=accepted,
        correct=correct,
        top_prob=top_prob,
        entropy=entropy,
        stream=stream_of(logits),
        **of_rows,
    )


def _top_k_losses(
    logits: Tensor,
    teacher_logits: Tensor,
    weight: Tensor,
    results: Sequence[Tensor],
    *,
    top_k: int,
    top_k_weight: float,
    writes_gradient: bool,
    **of_rows: Any,
) -> None:
    """As `row_losses`: statistics against the teacher as it is, loss and gradient against the one
    with raised words (ops/_top_k.py).
    """
    row_losses(logits, teacher_logits, weight, results, writes_gradient=False, **of_rows)
    factor = raise_top_k(
        teacher_logits[:, : logits.shape[1]],
        top_k=top_k,
        weight=top_k_weight,
        temperature=of_rows["temperature"],
    )[of_rows["row_to_teacher"].long()]
    factor.masked_fill_(weight == 0, 1)  # such a row's teacher may hold anything
    loss, *others = results
    unused = [torch.empty_like(x) for x in others]
    row_losses(
        logits,
        teacher_logits,
        weight * factor,
        [loss, *unused],
        writes_gradient=writes_gradient,
        **of_rows,
    )
    loss.mul_(factor)


@torch.library.custom_op("specforge_ext::draft_loss", mutates_args=())
def draft_loss_op(
    hidden_NH: Tensor,
    head_VH: Tensor,
    teacher_hidden_RG: Tensor | None,
    teacher_head_UG: Tensor | None,
    teacher_lse_R: Tensor | None,
    teacher_argmax_R: Tensor | None,
    label_R: Tensor | None,
    kl_weight_N: Tensor | None,
    row_to_teacher_N: Tensor,
    row_weight_N: Tensor,
    row_step_N: Tensor,
    num_teachers: int,
    num_steps: int,
    kind: str,
    temperature: float,
    beta: float,
    hard_weight: float,
    top_k: int,
    top_k_weight: float,
    workspace_bytes: int,
    wants_hidden_grad: bool,
    wants_head_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss_sum [], sums [7, L] of `step_sums`, d loss_sum / d hidden, d loss_sum / d head).

    A gradient that is not wanted is an empty tensor.
    """
    num_rows, vocab = hidden_NH.shape[0], head_VH.shape[0]
    dtype = logits_dtype(hidden_NH)
    teacher = Teacher(teacher_hidden_RG, teacher_head_UG)
    chunks = plan_chunks(
        row_to_teacher_N,
        num_teachers,
        row_bytes=vocab * dtype.itemsize,
        teacher_bytes=teacher.row_bytes,
        workspace_bytes=workspace_bytes,
    )
    hidden_grad_NH = gradient_buffer(hidden_NH, wanted=wants_hidden_grad)
    head_grad = HeadGrad(head_VH, num_chunks=len(chunks)) if wants_head_grad else None
    loss_N, accepted_N, top_prob_N, entropy_N = (
        hidden_NH.new_empty(num_rows, dtype=torch.float32) for _ in range(4)
    )
    correct_N = hidden_NH.new_empty(num_rows, dtype=torch.uint8)
    most_rows = max((chunk.num_rows for chunk in chunks), default=0)
    most_teachers = max((chunk.num_teachers for chunk in chunks), default=0)
    logits_CV = empty_buffer(hidden_NH, (most_rows, vocab), dtype)
    with torch.autocast(hidden_NH.device.type, enabled=False):
        for chunk in chunks:
            rows, teachers = chunk.rows, chunk.teachers
            logits, weight = logits_CV[: chunk.num_rows], row_weight_N[rows]
            # 0 * NaN is NaN: a row of weight 0 must not reach the product of the head's gradient.
            hidden = hidden_NH[rows].masked_fill(weight[:, None] == 0, 0)
            logits_into(logits, hidden, head_VH)
            teacher_logits = teacher.logits(chunk, most_rows=most_teachers)
            options: dict[str, Any] = {
                "row_to_teacher": row_to_teacher_N[rows] - chunk.teacher,
                "kind": kind,
                "temperature": temperature,
                "beta": beta,
                "hard_weight": hard_weight,
                "writes_gradient": wants_hidden_grad or wants_head_grad,
                "teacher_lse": part_of(teacher_lse_R, teachers),
                "teacher_argmax": part_of(teacher_argmax_R, teachers),
                "label": part_of(label_R, teachers),
                "kl_weight": part_of(kl_weight_N, rows),
            }
            results = [x[rows] for x in (loss_N, accepted_N, correct_N, top_prob_N, entropy_N)]
            if top_k and teacher_logits is not None:
                options |= {"top_k": top_k, "top_k_weight": top_k_weight}
                _top_k_losses(logits, teacher_logits, weight, results, **options)
            else:
                row_losses(logits, teacher_logits, weight, results, **options)
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
    return loss_sum, sums_7L, hidden_grad_NH, head_grad_VH


@draft_loss_op.register_fake
def _(
    hidden_NH: Tensor,
    head_VH: Tensor,
    teacher_hidden_RG: Tensor | None,
    teacher_head_UG: Tensor | None,
    teacher_lse_R: Tensor | None,
    teacher_argmax_R: Tensor | None,
    label_R: Tensor | None,
    kl_weight_N: Tensor | None,
    row_to_teacher_N: Tensor,
    row_weight_N: Tensor,
    row_step_N: Tensor,
    num_teachers: int,
    num_steps: int,
    kind: str,
    temperature: float,
    beta: float,
    hard_weight: float,
    top_k: int,
    top_k_weight: float,
    workspace_bytes: int,
    wants_hidden_grad: bool,
    wants_head_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        hidden_NH.new_empty((), dtype=torch.float32),
        hidden_NH.new_empty((7, num_steps), dtype=torch.float64),
        gradient_buffer(hidden_NH, wanted=wants_hidden_grad),
        head_VH.new_empty(head_VH.shape if wants_head_grad else (0,)),
    )


made_ahead(draft_loss_op, name="draft_loss", num_gradients=2)
