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
from specforge_ext.ops import own_keys_grads_, own_keys_merge_, reference

_NATIVE = (torch.float32, torch.bfloat16)
"""What the kernels compute; float64, for tests of gradients, and float16 take the definition."""


@dataclass(frozen=True)
class OwnKeys:
    """Keys and values that rows made for themselves at one step.

    keys, values: [n_j, Hkv, D]. rows: [n] int64, each query's row among the n_j, ascending; None
    for all in order.
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
    tensors = [*context, *(o.keys for o in own), *(o.values for o in own)]
    rows = tuple(o.rows for o in own)
    out: Tensor = _SplitAttention.apply(  # type: ignore[no-untyped-call]
        query.contiguous(), plan, rows, *(x.to(dtype).contiguous() for x in tensors)
    )
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
            if rows and q.dtype in _NATIVE:
                own_keys_merge_(q, out, lse, keys, values, rows, scale)
            elif rows:
                out, lse = reference.own_keys_merge(q, out, lse, keys, values, rows, scale)
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
            if q.dtype in _NATIVE:
                dq = dq.contiguous()
                own = own_keys_grads_(grad_out, q, out, lse, dq, keys, values, rows, ctx.scale)
                return dq, None, None, dk0, dv0, *own
            more, dk, dv = reference.own_keys_grads(
                grad_out, q, out, lse, keys, values, rows, ctx.scale
            )
            dq = (dq + more).to(q.dtype)
        return dq, None, None, dk0, dv0, *dk, *dv
