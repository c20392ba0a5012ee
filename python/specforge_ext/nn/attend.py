"""One softmax attention call and its backward, where the backward takes `out` and `lse` from the
caller: it stays exact when the caller has merged further keys into the softmax
(FlashAttention-2, arXiv 2307.08691, algorithm 2, needs nothing else).

Legend of shapes: b batch, Hq / Hkv heads, n query rows, m key rows, D head dimension.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

HIDDEN = -1e30
"""Score of a hidden key. Finite, so that a row without any visible key has a finite output, which
its lse then weighs with 0.
"""

_SMALL_CALL = 128
"""Rows and keys up to which the CPU's half-precision backward is slower than a float32 one on
copies: 1.6 times at 128 by 128, 5 times at 16 by 16.
"""

_MATH_SCORES = 1 << 24
"""Scores that the plain path holds at once, at least one row of them."""


class Masking(NamedTuple):
    """bias: [n, m] added to the scores (0 or HIDDEN), or None. causal: key j is hidden from query
    i < j; n = m.
    """

    bias: Tensor | None = None
    causal: bool = False


def attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float, masking: Masking
) -> tuple[Tensor, Tensor]:
    """q [b, Hq, n, D], k and v [b, Hkv, m, D] -> out [b, Hq, n, D] and lse [b, Hq, n], nats.

    lse is float32, for float64 queries float64.
    """
    if q.device.type != "cpu":
        return math_attend(q, k, v, scale, masking)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, masking.causal, attn_mask=masking.bias, scale=scale
    )
    return out, lse


def attend_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    masking: Masking,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, in their dtype or wider. out, lse: as `attend` gave them, or merged
    with further keys.
    """
    if q.device.type != "cpu":
        return math_attend_backward(grad_out, q, k, v, out, lse, scale, masking)
    rows, bias = [grad_out, q, k, v, out], masking.bias
    if max(q.shape[2], k.shape[2]) <= _SMALL_CALL:
        rows = [x.to(wide(x.dtype)) for x in rows]
        bias = None if bias is None else bias.to(wide(bias.dtype))
    dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *rows, lse, 0.0, masking.causal, attn_mask=bias, scale=scale
    )
    return dq, dk, dv


def math_attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float, masking: Masking
) -> tuple[Tensor, Tensor]:
    """As `attend`, with the scores of some query rows at a time written out, on any device."""
    out = torch.empty_like(q)
    lse = q.new_empty(q.shape[:3], dtype=wide(q.dtype))
    for rows in _chunks(q, k):
        scores = _scores(q, k, rows, scale, masking)
        lse[:, :, rows] = torch.logsumexp(scores, dim=-1).flatten(1, 2)
        chunk = torch.softmax(scores, dim=-1) @ _wide_heads(v)
        out[:, :, rows] = chunk.flatten(1, 2).to(q.dtype)
    return out, lse


def math_attend_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    masking: Masking,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `attend_backward`, with the scores of some query rows at a time written out."""
    groups = k.shape[1]
    dq = torch.empty_like(q)
    dk, dv = (torch.zeros_like(x, dtype=wide(q.dtype)) for x in (k, v))
    for rows in _chunks(q, k):
        grad = _grouped(grad_out[:, :, rows], groups)
        delta = (grad * _grouped(out[:, :, rows], groups)).sum(-1, keepdim=True)
        p = (_scores(q, k, rows, scale, masking) - _grouped(lse[:, :, rows, None], groups)).exp()
        ds = p * (grad @ _wide_heads(v).mT - delta) * scale
        dq[:, :, rows] = (ds @ _wide_heads(k)).flatten(1, 2).to(q.dtype)
        dk += (ds.mT @ _grouped(q[:, :, rows], groups)).sum(2)
        dv += (p.mT @ grad).sum(2)
    return dq, dk.to(k.dtype), dv.to(v.dtype)


def wide(dtype: torch.dtype) -> torch.dtype:
    """float32, or float64 for float64: what sums run in."""
    return torch.promote_types(dtype, torch.float32)


def _chunks(q: Tensor, k: Tensor) -> list[slice]:
    rows, per_row = q.shape[2], q.shape[0] * q.shape[1] * k.shape[2]
    step = max(1, _MATH_SCORES // max(per_row, 1))
    return [slice(begin, min(begin + step, rows)) for begin in range(0, rows, step)]


def _scores(q: Tensor, k: Tensor, rows: slice, scale: float, masking: Masking) -> Tensor:
    """[b, Hkv, Hq / Hkv, rows, m]."""
    scores = _grouped(q[:, :, rows], k.shape[1]) @ _wide_heads(k).mT * scale
    if masking.bias is not None:
        scores += masking.bias[rows]
    if masking.causal:
        row = torch.arange(q.shape[2], device=q.device)[rows, None]
        column = torch.arange(k.shape[2], device=q.device)
        scores = scores.masked_fill_(column > row, float("-inf"))
    return scores


def _grouped(x: Tensor, groups: int) -> Tensor:
    """[b, Hq, n, ...] -> [b, Hkv, Hq / Hkv, n, ...], float32 or wider."""
    return x.view(x.shape[0], groups, -1, *x.shape[2:]).to(wide(x.dtype))


def _wide_heads(x: Tensor) -> Tensor:
    """[b, Hkv, m, D] -> [b, Hkv, 1, m, D], float32 or wider."""
    return x[:, :, None].to(wide(x.dtype))
