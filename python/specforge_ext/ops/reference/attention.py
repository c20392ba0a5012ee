"""Attention over a row's own keys, and what block attention sees. Legend: n rows, Hq / Hkv heads,
G = Hq / Hkv, D head dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor


def own_keys_merge(
    query: Tensor,
    out: Tensor,
    lse: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    rows: Sequence[Tensor | None],
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The merged (out [n, Hq, D], lse [n, Hq]); shapes as in `ops.own_keys_merge_`.

    Computed in the dtype of lse, all steps' scores at once.
    """
    wide, groups = lse.dtype, keys[0].shape[1]
    q_wide = _grouped(query.to(wide), groups)
    scores = torch.stack(
        [
            (q_wide * _take(k, r).to(wide)[:, :, None]).sum(-1)
            for k, r in zip(keys, rows, strict=True)
        ]
    )
    scores = scores.mul_(scale).flatten(2)
    merged = torch.logaddexp(lse, torch.logsumexp(scores, dim=0))
    result = _grouped(out.to(wide) * (lse - merged).exp()[..., None], groups)
    weights = _grouped((scores - merged).exp_().movedim(0, -1), groups)
    for j, (v, r) in enumerate(zip(values, rows, strict=True)):
        result.addcmul_(weights[..., j, None], _take(v, r).to(wide)[:, :, None])
    return result.flatten(1, 2).to(query.dtype), merged


def own_keys_grads(
    grad_out: Tensor,
    query: Tensor,
    out: Tensor,
    lse: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    rows: Sequence[Tensor | None],
    scale: float,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """(what the own keys add to the gradient of query, in the dtype of lse; gradients of keys; of
    values).

    out, lse: merged. Shapes as in `ops.own_keys_grads_`.
    """
    wide, groups = lse.dtype, keys[0].shape[1]
    q, grad = _grouped(query.to(wide), groups), _grouped(grad_out.to(wide), groups)
    delta = (grad * _grouped(out.to(wide), groups)).sum(-1)
    grad_query = torch.zeros_like(q)
    grad_keys, grad_values = [], []
    for keys_j, values_j, r in zip(keys, values, rows, strict=True):
        k, v = (_take(x, r).to(wide)[:, :, None] for x in (keys_j, values_j))
        weight = ((q * k).sum(-1) * scale - _grouped(lse, groups)).exp()
        dscore = (weight * ((grad * v).sum(-1) - delta) * scale)[..., None]
        grad_query.addcmul_(dscore, k)
        grad_keys.append(_put((dscore * q).sum(2), r, keys_j))
        grad_values.append(_put((weight[..., None] * grad).sum(2), r, values_j))
    return grad_query.flatten(1, 2), grad_keys, grad_values


def _grouped(x: Tensor, groups: int) -> Tensor:
    """[n, Hq, ...] -> [n, Hkv, G, ...]."""
    return torch.unflatten(x, 1, (groups, -1))


def _take(x: Tensor, rows: Tensor | None) -> Tensor:
    return x if rows is None else x.index_select(0, rows)


def _put(grad: Tensor, rows: Tensor | None, like: Tensor) -> Tensor:
    """The inverse of `_take` for gradients: rows are distinct, the others get zero."""
    grad = grad.to(like.dtype)
    return grad if rows is None else torch.zeros_like(like).index_copy_(0, rows, grad)


def block_visibility(
    anchors: Tensor,
    cu_anchors: Tensor,
    cu_seqlens: Tensor,
    *,
    num_context: int,
    block_size: int,
    window: int | None = None,
) -> Tensor:
    """[A * B, T + A * B] bool: which keys a query of block attention sees (arXiv 2602.06036)."""
    blocks = anchors.numel()
    visible = torch.zeros(blocks * block_size, num_context + blocks * block_size, dtype=torch.bool)
    bounds = list(zip(pairwise(cu_anchors.tolist()), cu_seqlens.tolist(), strict=False))
    for (first, last), begin in bounds:
        for block in range(first, last):
            anchor, own = int(anchors[block]), num_context + block * block_size
            for slot in range(block_size):
                row = visible[block * block_size + slot]
                if window is None:
                    row[begin:anchor] = row[own : own + block_size] = True
                else:
                    row[max(begin, anchor + slot - (window - 1)) : anchor] = True
                    row[own : own + slot + 1] = True
    return visible
