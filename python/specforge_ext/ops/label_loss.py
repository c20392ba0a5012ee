"""Cross entropy of rows against labels under a frozen head; logits exist one chunk at a time.

`draft_loss` sums, and its weights must be known before. Here every row's loss comes out by itself
and may be weighted afterwards, e.g. by the losses themselves (D-PACE, arXiv 2605.18810): a row's
gradient is linear in its weight. Legend: N rows, H width, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from specforge_ext import _C
from specforge_ext.ops._ahead import gradient_buffer, made_ahead
from specforge_ext.ops._chunks import cut, default_workspace_bytes
from specforge_ext.ops._matmul import empty_buffer, hidden_grad_into, logits_dtype, logits_into
from specforge_ext.ops._native import FLOATS, check, in_autocast_dtype, stream_of


class LabelLoss(NamedTuple):
    """loss: [N] float32, nats, differentiable in hidden. correct: [N] bool, argmax == label (the
    lowest index on ties).
    """

    loss: Tensor
    correct: Tensor


def label_loss(
    hidden_NH: Tensor, head_VH: Tensor, label_N: Tensor, *, workspace_bytes: int | None = None
) -> LabelLoss:
    """-log softmax(head hidden)[label] of each row.

    hidden: [N, H]; head: [V, H], frozen: it gets no gradient. Both float32 or both bfloat16; under
    autocast they are cast to its dtype. label: [N] int32 in [0, V). workspace_bytes: bound on the
    logits that exist at a time, by default as in `draft_loss`. Deterministic, differentiable once.
    ValueError names what does not fit. Formulas: csrc/loss/loss_rows.h, kHardCe.
    """
    hidden_NH, head_VH = in_autocast_dtype(hidden_NH, head_VH)
    num_rows, width = hidden_NH.shape[0], hidden_NH.shape[-1]
    check("label_loss", "hidden", hidden_NH, (num_rows, width), *FLOATS)
    check("label_loss", "head", head_VH, (head_VH.shape[0], width), hidden_NH.dtype)
    check("label_loss", "label", label_N, (num_rows,), torch.int32)
    if workspace_bytes is None:
        workspace_bytes = default_workspace_bytes(hidden_NH.device, vocab=head_VH.shape[0])
    wants_grad = torch.is_grad_enabled() and hidden_NH.requires_grad
    loss, correct, _ = _label_loss(
        hidden_NH, head_VH.detach(), label_N, workspace_bytes, wants_grad
    )
    return LabelLoss(loss, correct.detach().bool())


@torch.library.custom_op("specforge_ext::label_loss", mutates_args=())
def _label_loss(
    hidden_NH: Tensor, head_VH: Tensor, label_N: Tensor, workspace_bytes: int, wants_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss [N] f32, correct [N] u8, d loss[n] / d hidden[n]: [N, H], empty if not wanted)."""
    num_rows, vocab = hidden_NH.shape[0], head_VH.shape[0]
    dtype = logits_dtype(hidden_NH)
    row_bytes = vocab * dtype.itemsize
    if workspace_bytes < row_bytes:
        raise ValueError(
            f"label_loss: workspace_bytes must hold a row of logits, {row_bytes} bytes, "
            f"got {workspace_bytes}"
        )
    index_N = torch.arange(num_rows, dtype=torch.int32)
    chunks = cut(index_N, row_bytes=row_bytes, teacher_bytes=0, workspace_bytes=workspace_bytes)
    grad_NH = gradient_buffer(hidden_NH, wanted=wants_grad)
    loss_N = hidden_NH.new_empty(num_rows, dtype=torch.float32)
    correct_N = hidden_NH.new_empty(num_rows, dtype=torch.uint8)
    most_rows = max((chunk.num_rows for chunk in chunks), default=0)
    logits_CV = empty_buffer(hidden_NH, (most_rows, vocab), dtype)
    ones_C = hidden_NH.new_ones(most_rows, dtype=torch.float32)
    unused_C = [torch.empty_like(ones_C) for _ in range(3)]
    index_C = torch.arange(most_rows, dtype=torch.int32, device=hidden_NH.device)
    with torch.autocast(hidden_NH.device.type, enabled=False):
        for chunk in chunks:
            rows, count = chunk.rows, chunk.num_rows
            logits = logits_CV[:count]
            logits_into(logits, hidden_NH[rows], head_VH)
            _C.loss_rows(
                logits,
                None,
                index_C[:count],
                ones_C[:count],
                loss_N[rows],
                unused_C[0][:count],
                correct_N[rows],
                unused_C[1][:count],
                unused_C[2][:count],
                kind="hard_ce",
                temperature=1.0,
                beta=0.5,
                hard_weight=0.0,
                writes_gradient=wants_grad,
                teacher_lse=None,
                teacher_argmax=None,
                label=label_N[rows],
                kl_weight=None,
                stream=stream_of(logits),
            )
            if wants_grad:
                hidden_grad_into(grad_NH[rows], logits, head_VH)
    return loss_N, correct_N, grad_NH


@_label_loss.register_fake
def _(
    hidden_NH: Tensor, head_VH: Tensor, label_N: Tensor, workspace_bytes: int, wants_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    rows = hidden_NH.shape[:1]
    return (
        hidden_NH.new_empty(rows, dtype=torch.float32),
        hidden_NH.new_empty(rows, dtype=torch.uint8),
        gradient_buffer(hidden_NH, wanted=wants_grad),
    )


made_ahead(_label_loss, name="label_loss", num_gradients=1)
