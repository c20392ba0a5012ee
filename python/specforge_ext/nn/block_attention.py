"""Attention of block drafts (DFlash family, arXiv 2602.06036): context before the anchor, and the
own block.

The query at slot j of the block at anchor a attends, in one softmax, to the context rows of its
sample before a and to the rows of its own block. In a sliding layer of window w it sees the context
from position a + j - (w - 1) on, and its own block up to itself. Blocks never see each other.

The local part is one attention call with a block per batch entry, the context a few wide calls
(nn/block_plan.py); they are merged by their log-sum-exps, so that no [A * B, T] tensor exists.

Legend of shapes: T context rows, A blocks, B rows of a block, Hq / Hkv heads, D head dimension.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.attention.flex_attention import flex_attention

from specforge_ext.nn.attend import HIDDEN, Masking, attend, attend_backward, wide
from specforge_ext.nn.block_plan import BlockPlan, KeyCall


@torch.compiler.disable  # type: ignore[untyped-decorator]
def block_attention(
    query: Tensor,
    context: tuple[Tensor, Tensor],
    block: tuple[Tensor, Tensor],
    plan: BlockPlan,
    window: int | None = None,
) -> Tensor:
    """query [A * B, Hq, D] -> [A * B, Hq, D] in the query's dtype.

    context: keys and values [T, Hkv, D]. block: keys and values [A * B, Hkv, D]. Scores are scaled
    by D ** -0.5. Exact in the forward and in the backward; differentiable once. float32, float64,
    bfloat16, float16. Positions past the end of a sample are rows like any other: the loss weighs
    them with 0. On CUDA half precision runs in flex_attention, the rest in plain matrix products.
    ValueError if a shape or the window does not fit.
    """
    _check(query, context, block, plan, window)
    tensors = [x.to(query.dtype) for x in (*context, *block)]
    if query.device.type == "cuda" and query.dtype in (torch.bfloat16, torch.float16):
        return flex_block_attention(query, context, block, plan, window, flex=_compiled_flex())
    out: Tensor = _BlockAttention.apply(query, *tensors, plan, window)  # type: ignore[no-untyped-call]
    return out


def flex_block_attention(
    query: Tensor,
    context: tuple[Tensor, Tensor],
    block: tuple[Tensor, Tensor],
    plan: BlockPlan,
    window: int | None,
    *,
    flex: Any = flex_attention,
) -> Tensor:
    """As `block_attention`, by flex_attention and the plan's block mask. The mask and this call are
    tested on the CPU, forward only; neither has ever run on a GPU.
    """
    if not plan.num_blocks:
        return query * 1.0
    both = (torch.cat(parts).to(query.dtype) for parts in zip(context, block, strict=True))
    heads = (_heads(x) for x in (query, *both))
    out: Tensor = flex(*heads, block_mask=plan.block_mask(window), enable_gqa=True)
    return _rows(out)


@functools.cache
def _compiled_flex() -> Any:
    return torch.compile(flex_attention)


def _check(
    q: Tensor,
    context: tuple[Tensor, Tensor],
    block: tuple[Tensor, Tensor],
    plan: BlockPlan,
    window: int | None,
) -> None:
    if window is not None and window < 1:
        raise ValueError(f"block_attention: window must be at least 1 or None, got {window}")
    rows, (heads, size) = plan.num_queries, q.shape[1:]
    kv_heads = context[0].shape[1]
    if heads % max(kv_heads, 1):
        raise ValueError(
            f"block_attention: query heads must be a multiple of key heads, "
            f"got {heads} and {kv_heads}"
        )
    for name, tensor, shape in (
        ("query", q, (rows, heads, size)),
        *(("context", x, (plan.num_context, kv_heads, size)) for x in context),
        *(("block", x, (rows, kv_heads, size)) for x in block),
    ):
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"block_attention: {name} must be {list(shape)}, got {list(tensor.shape)}"
            )


class _BlockAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        context_k: Tensor,
        context_v: Tensor,
        block_k: Tensor,
        block_v: Tensor,
        plan: BlockPlan,
        window: int | None,
    ) -> Tensor:
        scale = float(q.shape[-1] ** -0.5)
        with torch.autocast(q.device.type, enabled=False):
            out, lse = _local(q, block_k, block_v, plan, window, scale)
            for call, rows, masking in _context_calls(q, plan, window):
                k, v = _heads(context_k[call.keys]), _heads(context_v[call.keys])
                _merge_into(out[rows], lse[rows], *attend(_heads(q[rows]), k, v, scale, masking))
            out = out.to(q.dtype)
        ctx.save_for_backward(q, context_k, context_v, block_k, block_v, out, lse)
        ctx.plan, ctx.window, ctx.scale = plan, window, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        q, context_k, context_v, block_k, block_v, out, lse = ctx.saved_tensors
        plan, window, scale = ctx.plan, ctx.window, ctx.scale
        grad_out = grad_out.contiguous()
        with torch.autocast(q.device.type, enabled=False):
            of_queries = (grad_out, q, out, lse)
            dq, *own = _local_backward(of_queries, block_k, block_v, plan, window, scale)
            dk, dv = (torch.zeros_like(x, dtype=wide(x.dtype)) for x in (context_k, context_v))
            for call, rows, masking in _context_calls(q, plan, window):
                grad, queries, o, m = (_heads(x[rows]) for x in of_queries)
                k, v = _heads(context_k[call.keys]), _heads(context_v[call.keys])
                parts = attend_backward(grad, queries, k, v, o, m, scale, masking)
                sums = (dq[rows], dk[call.keys], dv[call.keys])
                for total, part in zip(sums, parts, strict=True):
                    total += _rows(part)
        return dq.to(q.dtype), dk.to(q.dtype), dv.to(q.dtype), *own, None, None


def _local(
    q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, window: int | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Blocks on themselves: out [A * B, Hq, D], float32 or wider, and lse [A * B, Hq]."""
    if not plan.num_blocks:
        return q.to(wide(q.dtype)), q.new_empty(q.shape[:2], dtype=wide(q.dtype))
    masking = Masking(causal=window is not None)
    out, lse = attend(_blocks(q, plan), _blocks(k, plan), _blocks(v, plan), scale, masking)
    return _unblock(out).to(wide(q.dtype)), _unblock(lse)


def _local_backward(
    of_queries: tuple[Tensor, Tensor, Tensor, Tensor],
    k: Tensor,
    v: Tensor,
    plan: BlockPlan,
    window: int | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, float32 or wider, dk and dv of the blocks."""
    if not plan.num_blocks:
        return torch.zeros_like(of_queries[1]), torch.zeros_like(k), torch.zeros_like(v)
    grad, q, out, lse = (_blocks(x, plan) for x in of_queries)
    keys, values = _blocks(k, plan), _blocks(v, plan)
    masking = Masking(causal=window is not None)
    dq, dk, dv = attend_backward(grad, q, keys, values, out, lse, scale, masking)
    return _unblock(dq).to(wide(q.dtype)), _unblock(dk).to(k.dtype), _unblock(dv).to(v.dtype)


def _context_calls(
    q: Tensor, plan: BlockPlan, window: int | None
) -> Iterator[tuple[KeyCall, slice, Masking]]:
    for call in plan.calls(window):
        rows = slice(call.first * plan.block_size, call.last * plan.block_size)
        bias = _bias(call, plan, window, q.dtype) if call.masked else None
        yield call, rows, Masking(bias)


def _bias(call: KeyCall, plan: BlockPlan, window: int | None, dtype: torch.dtype) -> Tensor:
    """[rows of the call, its keys]: 0 where visible. The keys are of the sample of the blocks."""
    anchors = plan.anchors[call.first : call.last, None, None]
    keys = torch.arange(call.keys.start, call.keys.stop, dtype=torch.int32, device=anchors.device)
    hidden = keys >= anchors
    if window is not None:
        slot = torch.arange(plan.block_size, dtype=torch.int32, device=anchors.device)[:, None]
        hidden = hidden | (keys < anchors + slot - (window - 1))
    bias = torch.zeros(hidden.shape, dtype=dtype, device=anchors.device)
    bias.masked_fill_(hidden, HIDDEN)
    return bias.expand(-1, plan.block_size, -1).flatten(0, 1)


def _merge_into(out: Tensor, lse: Tensor, more: Tensor, more_lse: Tensor) -> None:
    """out [n, Hq, D], lse [n, Hq] become those of the union with a disjoint key set."""
    other = _rows(more_lse)
    out.lerp_(_rows(more).to(out.dtype), torch.sigmoid(other - lse)[..., None])
    torch.logaddexp(lse, other, out=lse)


def _heads(x: Tensor) -> Tensor:
    """[n, heads, ...] -> [1, heads, n, ...]; no copy."""
    return x.transpose(0, 1)[None]


def _rows(x: Tensor) -> Tensor:
    """The inverse of `_heads`."""
    return x[0].transpose(0, 1)


def _blocks(x: Tensor, plan: BlockPlan) -> Tensor:
    """[A * B, heads, ...] -> [A, heads, B, ...]; no copy."""
    return x.view(plan.num_blocks, plan.block_size, *x.shape[1:]).transpose(1, 2)


def _unblock(x: Tensor) -> Tensor:
    """The inverse of `_blocks`."""
    return x.transpose(1, 2).flatten(0, 1)
