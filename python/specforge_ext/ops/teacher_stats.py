"""Normaliser and argmax of the target over its full vocabulary, without its logits in memory."""

from __future__ import annotations

import torch
from torch import Tensor

from specforge_ext import _C
from specforge_ext.ops._chunks import default_workspace_bytes
from specforge_ext.ops._matmul import empty_buffer, logits_dtype, logits_into
from specforge_ext.ops._native import check, stream_of


def teacher_stats(
    hidden_RH: Tensor,
    head_VH: Tensor,
    *,
    temperature: float = 1.0,
    workspace_bytes: int | None = None,
) -> tuple[Tensor, Tensor]:
    """(lse [R] float32 in nats, argmax [R] int64, lowest index on ties) of hidden @ head.T / temp.

    hidden: [R, H] after the target's final norm. head: [V, H], the full vocabulary. float32 or
    bfloat16, the same. At most workspace_bytes of logits exist at a time; None: what
    `draft_loss` takes. Not differentiable. ValueError if a tensor does not fit, or not even one row
    of logits fits the workspace.
    """
    dtype, width = hidden_RH.dtype, hidden_RH.shape[-1]
    check("teacher_stats", "hidden", hidden_RH, (hidden_RH.shape[0], width), *_DTYPES)
    if not temperature > 0:
        raise ValueError(f"teacher_stats: temperature must be above 0, got {temperature}")
    check("teacher_stats", "head", head_VH, (head_VH.shape[0], width), dtype)
    if workspace_bytes is None:
        workspace_bytes = default_workspace_bytes(hidden_RH.device, vocab=head_VH.shape[0])
    lse_R, argmax_R = _teacher_stats(
        hidden_RH.detach(), head_VH.detach(), temperature, workspace_bytes
    )
    return lse_R, argmax_R


_DTYPES = (torch.float32, torch.bfloat16)


@torch.library.custom_op("specforge_ext::teacher_stats", mutates_args=())
def _teacher_stats(
    hidden_RH: Tensor, head_VH: Tensor, temperature: float, workspace_bytes: int
) -> tuple[Tensor, Tensor]:
    num_rows, vocab = hidden_RH.shape[0], head_VH.shape[0]
    dtype = logits_dtype(hidden_RH)
    chunk = min(workspace_bytes // (vocab * dtype.itemsize), num_rows)
    if num_rows and not chunk:
        raise ValueError(
            f"teacher_stats: workspace_bytes must hold one row of logits, "
            f"{vocab * dtype.itemsize} bytes, got {workspace_bytes}"
        )
    lse_R = hidden_RH.new_empty(num_rows, dtype=torch.float32)
    argmax_R = hidden_RH.new_empty(num_rows, dtype=torch.int32)
    logits_CV = empty_buffer(hidden_RH, (chunk, vocab), dtype)
    with torch.autocast(hidden_RH.device.type, enabled=False):
        for start in range(0, num_rows, max(chunk, 1)):
            rows = slice(start, min(start + chunk, num_rows))
            logits = logits_CV[: rows.stop - rows.start]
            logits_into(logits, hidden_RH[rows], head_VH)
            if temperature != 1:
                logits.div_(temperature)
            _C.row_stats(logits, lse_R[rows], argmax_R[rows], stream_of(logits))
    return lse_R, argmax_R.long()


@_teacher_stats.register_fake
def _(
    hidden_RH: Tensor, head_VH: Tensor, temperature: float, workspace_bytes: int
) -> tuple[Tensor, Tensor]:
    rows = hidden_RH.shape[0]
    return (
        hidden_RH.new_empty(rows, dtype=torch.float32),
        hidden_RH.new_empty(rows, dtype=torch.int64),
    )
