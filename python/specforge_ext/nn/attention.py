"""Attention of training-time test (EAGLE-3, arXiv 2503.01840): step-0 keys, and the row's own later
keys.

At step i the query of row t attends, in one softmax, to the step-0 keys of its sample up to t and
to the keys that row t itself made at steps 1..i. The first part is plain causal attention, the
second a handful of dot products a row; the two are merged by their log-sum-exps, so that no mask
and no square matrix exists.

Legend of shapes: C context rows, n query rows, n_j rows that were active at step j, Hq / Hkv heads,
G = Hq / Hkv, D head dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from specforge_ext.nn import flash
from specforge_ext.nn.flash import QueryPlan


@dataclass(frozen=True)
class OwnKeys:
    """Keys and values that rows made for themselves at one step.

    keys, values: [n_j, Hkv, D]. rows: [n] int64, each query's row among the n_j; None for all in
    order.
    """

    keys: Tensor
    values: Tensor
    rows: Tensor | None


@torch.compiler.disable  # type: ignore[untyped-decorator]
def split_attention(
    query: Tensor, context: tuple[Tensor, Tensor], plan: QueryPlan, own: Sequence[OwnKeys]
) -> Tensor:
    """query [n, Hq, D], context keys and values [C, Hkv, D] -> [n, Hq, D] in the query's dtype.

    Scores are scaled by D ** -0.5. Exact in the forward and in the backward; differentiable once.
    """
    dtype = query.dtype
    tensors = [x.to(dtype) for x in (*context, *(o.keys for o in own), *(o.values for o in own))]
    rows = tuple(o.rows for o in own)
    out: Tensor = _SplitAttention.apply(query, plan, rows, *tensors)  # type: ignore[no-untyped-call]
    return out


class _SplitAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, plan: QueryPlan, rows: tuple[Tensor | None, ...], *tensors: Tensor
    ) -> Tensor:
        (k0, v0), keys, values = tensors[:2], tensors[2 : 2 + len(rows)], tensors[2 + len(rows) :]
        scale = float(q.shape[-1] ** -0.5)
        with torch.autocast(q.device.type, enabled=False):
            out, lse = flash.forward(q, k0, v0, plan, scale)
            if rows:
                out, lse = _merge_own(q, out, lse, rows, keys, values, scale)
        ctx.save_for_backward(q, out, lse, *tensors, *(r for r in rows if r is not None))
        ctx.plan, ctx.scale = plan, scale
        ctx.has_rows = tuple(r is not None for r in rows)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        depth = len(ctx.has_rows)
        q, out, lse, k0, v0, *rest = ctx.saved_tensors
        keys, values, saved_rows = rest[:depth], rest[depth : 2 * depth], iter(rest[2 * depth :])
        grad_out = grad_out.contiguous()
        with torch.autocast(q.device.type, enabled=False):
            dq, dk0, dv0 = flash.backward(grad_out, q, k0, v0, out, lse, ctx.plan, ctx.scale)
            if not depth:
                return dq, None, None, dk0, dv0
            rows = [next(saved_rows) if has else None for has in ctx.has_rows]
            own = _OwnBackward(grad_out, q, out, lse, groups=k0.shape[1], scale=ctx.scale)
            grads = [own(k, v, r) for k, v, r in zip(keys, values, rows, strict=True)]
            dq = (dq + own.grad_query.flatten(1, 2)).to(q.dtype)
        return dq, None, None, dk0, dv0, *(g[0] for g in grads), *(g[1] for g in grads)


def _merge_own(
    q: Tensor,
    out: Tensor,
    lse: Tensor,
    rows: Sequence[Tensor | None],
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The step-0 part merged with the own keys: out [n, Hq, D], lse [n, Hq]."""
    wide, groups = lse.dtype, keys[0].shape[1]
    q_wide = _grouped(q.to(wide), groups)
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
    return result.flatten(1, 2).to(q.dtype), merged


class _OwnBackward:
    """Gradients through the own keys, one step at a time; `grad_query` [n, Hkv, G, D] adds up."""

    def __init__(
        self, grad_out: Tensor, q: Tensor, out: Tensor, lse: Tensor, *, groups: int, scale: float
    ) -> None:
        wide = lse.dtype
        self.scale = scale
        self.q, self.grad = _grouped(q.to(wide), groups), _grouped(grad_out.to(wide), groups)
        self.lse = _grouped(lse, groups)
        self.delta = (self.grad * _grouped(out.to(wide), groups)).sum(-1)
        self.grad_query = torch.zeros_like(self.q)

    def __call__(self, keys: Tensor, values: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor]:
        wide = self.lse.dtype
        k, v = (_take(x, rows).to(wide)[:, :, None] for x in (keys, values))
        weight = ((self.q * k).sum(-1) * self.scale - self.lse).exp()
        dscore = (weight * ((self.grad * v).sum(-1) - self.delta) * self.scale)[..., None]
        self.grad_query.addcmul_(dscore, k)
        dk, dv = (dscore * self.q).sum(2), (weight[..., None] * self.grad).sum(2)
        return _put(dk, rows, keys), _put(dv, rows, values)


def _grouped(x: Tensor, groups: int) -> Tensor:
    """[n, Hq, ...] -> [n, Hkv, G, ...]."""
    return torch.unflatten(x, 1, (groups, -1))


def _take(x: Tensor, rows: Tensor | None) -> Tensor:
    return x if rows is None else x.index_select(0, rows)


def _put(grad: Tensor, rows: Tensor | None, like: Tensor) -> Tensor:
    """The inverse of `_take` for gradients: rows are distinct, the others get zero."""
    grad = grad.to(like.dtype)
    return grad if rows is None else torch.zeros_like(like).index_copy_(0, rows, grad)
