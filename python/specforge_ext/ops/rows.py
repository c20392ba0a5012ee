"""The row kernels themselves: over logits that exist already. `draft_loss` is built of them."""

from __future__ import annotations

import torch
from torch import Tensor

from specforge_ext import _C
from specforge_ext.ops._native import stream_of
from specforge_ext.ops.results import LossRowsResult, RowLoss


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


def _new_results(logits: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows = logits.shape[:1]
    loss, accepted, top_prob, entropy = (
        logits.new_empty(rows, dtype=torch.float32) for _ in range(4)
    )
    return loss, accepted, logits.new_empty(rows, dtype=torch.uint8), top_prob, entropy


@torch.library.custom_op("specforge_ext::loss_rows_", mutates_args=("logits",))
def _loss_rows(
    logits: Tensor,
    teacher: Tensor | None,
    row_to_teacher: Tensor,
    weight: Tensor,
    teacher_lse: Tensor | None,
    teacher_argmax: Tensor | None,
    label: Tensor | None,
    kl_weight: Tensor | None,
    kind: str,
    temperature: float,
    beta: float,
    hard_weight: float,
    writes_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    results = _new_results(logits)
    _C.loss_rows(
        logits,
        teacher,
        row_to_teacher,
        weight,
        *results,
        kind=kind,
        temperature=temperature,
        beta=beta,
        hard_weight=hard_weight,
        writes_gradient=writes_gradient,
        teacher_lse=teacher_lse,
        teacher_argmax=teacher_argmax,
        label=label,
        kl_weight=kl_weight,
        stream=stream_of(logits),
    )
    return results


@_loss_rows.register_fake
def _(
    logits: Tensor,
    teacher: Tensor | None,
    row_to_teacher: Tensor,
    weight: Tensor,
    teacher_lse: Tensor | None,
    teacher_argmax: Tensor | None,
    label: Tensor | None,
    kl_weight: Tensor | None,
    kind: str,
    temperature: float,
    beta: float,
    hard_weight: float,
    writes_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _new_results(logits)


def loss_rows_(
    logits: Tensor,
    teacher: Tensor | None,
    *,
    loss: RowLoss | str = "soft_ce",
    row_to_teacher: Tensor,
    weight: Tensor,
    teacher_lse: Tensor | None = None,
    teacher_argmax: Tensor | None = None,
    label: Tensor | None = None,
    kl_weight: Tensor | None = None,
    writes_gradient: bool = True,
) -> LossRowsResult:
    """A draft loss per row; `logits` are OVERWRITTEN by d sum(weight * loss) / d logits.

    logits: [rows, vocab] float32 or bfloat16, contiguous; not written if not writes_gradient.
    teacher: [teacher_rows, teacher_vocab] float32 or bfloat16, contiguous, the draft's vocabulary
        first; None for hard_ce.
    loss: kind and parameters; a bare name takes the defaults of `RowLoss`. top_k must be 0.
    row_to_teacher: [rows] int32. weight: [rows] float32; 0: the row is not read, and becomes 0.
    teacher_lse: [teacher_rows] float32, logsumexp of teacher / temperature over the FULL
        vocabulary, nats; None: that of all columns of teacher.
    teacher_argmax: [teacher_rows] int32, only beside teacher_lse; None: that of the columns read.
    label: [teacher_rows] int32 in [0, vocab), for hard_ce or a hard_weight above 0.
    kl_weight: [rows] float32, for lk_lambda.
    ValueError names what does not fit. Formulas and sources: csrc/loss/loss_rows.h.
    """
    spec = RowLoss(loss) if isinstance(loss, str) else loss
    if spec.top_k:
        raise ValueError(f"loss_rows: top_k must be 0, got {spec.top_k}: draft_loss has it")
    return LossRowsResult(
        *_loss_rows(
            logits,
            teacher,
            row_to_teacher,
            weight,
            teacher_lse,
            teacher_argmax,
            label,
            kl_weight,
            spec.kind,
            spec.temperature,
            spec.beta,
            spec.hard_weight,
            writes_gradient,
        )
    )
