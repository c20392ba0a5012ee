"""The row kernels themselves: over logits that exist already. `draft_loss` is built of them."""

from __future__ import annotations

import torch
from torch import Tensor

from specforge_ext import _C
from specforge_ext.ops._native import stream_of
from specforge_ext.ops.results import SoftCeRows


@torch.library.custom_op("specforge_ext::row_stats", mutates_args=())
def row_stats(logits: Tensor) -> tuple[Tensor, Tensor]:
    """(logsumexp [rows] float32, argmax [rows] int32: the lowest index on ties) of each row.

    logits: [rows, vocab] float32 or bfloat16, contiguous, finite. Not differentiable.
    ValueError names what does not fit.
    """
    lse = logits.new_empty(logits.shape[:1], dtype=torch.float32)
    argmax = logits.new_empty(logits.shape[:1], dtype=torch.int32)
    _C.row_stats(logits, lse, argmax, stream_of(logits))
    return lse, argmax


@row_stats.register_fake
def _(logits: Tensor) -> tuple[Tensor, Tensor]:
    rows = logits.shape[:1]
    return logits.new_empty(rows, dtype=torch.float32), logits.new_empty(rows, dtype=torch.int32)


@torch.library.custom_op("specforge_ext::soft_ce_rows_", mutates_args=("logits",))
def _soft_ce_rows(
    logits: Tensor,
    teacher: Tensor,
    row_to_teacher: Tensor,
    weight: Tensor,
    teacher_lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    rows = logits.shape[:1]
    loss, accepted = (logits.new_empty(rows, dtype=torch.float32) for _ in range(2))
    correct = logits.new_empty(rows, dtype=torch.uint8)
    _C.soft_ce_rows(
        logits,
        teacher,
        row_to_teacher,
        weight,
        teacher_lse,
        loss,
        accepted,
        correct,
        stream_of(logits),
    )
    return loss, accepted, correct


@_soft_ce_rows.register_fake
def _(
    logits: Tensor, teacher: Tensor, row_to_teacher: Tensor, weight: Tensor, teacher_lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    rows = logits.shape[:1]
    return (
        logits.new_empty(rows, dtype=torch.float32),
        logits.new_empty(rows, dtype=torch.float32),
        logits.new_empty(rows, dtype=torch.uint8),
    )


def soft_ce_rows_(
    logits: Tensor, teacher: Tensor, *, row_to_teacher: Tensor, weight: Tensor, teacher_lse: Tensor
) -> SoftCeRows:
    """Soft cross entropy per row; `logits` are OVERWRITTEN by d sum(weight * loss) / d logits.

    logits: [rows, vocab], teacher: [teacher_rows, vocab]; float32 or bfloat16 each, contiguous.
    row_to_teacher: [rows] int32. weight: [rows] float32; 0: the row is not read, and becomes 0.
    teacher_lse: [teacher_rows] float32, logsumexp over the FULL vocabulary, nats.
    ValueError names the tensor that does not fit. Formula and source: csrc/loss/soft_ce_rows.h.
    """
    return SoftCeRows(*_soft_ce_rows(logits, teacher, row_to_teacher, weight, teacher_lse))
