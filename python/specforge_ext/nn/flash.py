"""Causal attention of some rows of a packed batch, with log-sum-exp, forward and backward.

The backward takes `out` and `lse` from the caller, so that it stays exact when the caller has
merged more keys into the softmax (FlashAttention-2, arXiv 2307.08691, algorithm 2, needs nothing
else).

Legend of shapes: C context rows (keys) of all samples laid end to end, n query rows, which are some
of the context rows, Hq / Hkv heads, D head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_MATH_CHUNK_ROWS = 256
"""Query rows whose scores the plain path holds at once."""


@dataclass(frozen=True)
class QuerySpan:
    """Queries of one sample that lie close together; offsets are counts of rows.

    query: slice of the n queries. key_begin: the sample's first context row. first, end: the
    queries lie in rows [first, end) of the sample. local: [len(query)] int64, CPU, each query's row
    minus first, where the queries leave holes in that range; None where they fill it.
    """

    query: slice
    key_begin: int
    first: int
    end: int
    local: Tensor | None


@dataclass(frozen=True)
class QueryPlan:
    """Which context rows ask, ascending.

    spans: each query is in one. index: [n] int64, the queries' context rows. cu_context:
    [samples + 1] int32. max_context: rows of the longest context of a sample. Both tensors lie on
    the device of the queries.
    """

    spans: tuple[QuerySpan, ...]
    index: Tensor
    cu_context: Tensor
    max_context: int


def forward(
    q: Tensor, k: Tensor, v: Tensor, plan: QueryPlan, scale: float
) -> tuple[Tensor, Tensor]:
    """q [n, Hq, D], k and v [C, Hkv, D] -> out [n, Hq, D] and lse [n, Hq], nats.

    A query attends to the rows of its sample up to its own; scores are scale * q.k. lse is float32,
    for float64 queries float64.
    """
    if q.device.type == "cpu":
        return _cpu_forward(q, k, v, plan, scale)
    if q.dtype in (torch.bfloat16, torch.float16):
        return _varlen_forward(q, k, v, plan, scale)
    return math_forward(q, k, v, plan, scale)


def backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    plan: QueryPlan,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k, v. out, lse: as `forward` gave them, or merged with further keys."""
    if q.device.type == "cpu":
        return _cpu_backward(grad_out, q, k, v, out, lse, plan, scale)
    if q.dtype in (torch.bfloat16, torch.float16):
        return _varlen_backward(grad_out, q, k, v, out, lse, plan, scale)
    return math_backward(grad_out, q, k, v, out, lse, plan, scale)


def merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over the union of two disjoint key sets: out [n, Hq, D], lse [n, Hq]."""
    lse = torch.logaddexp(lse_a, lse_b)
    weight_a, weight_b = (lse_a - lse).exp()[..., None], (lse_b - lse).exp()[..., None]
    return (weight_a * out_a + weight_b * out_b).to(out_a.dtype), lse


def _batched(x: Tensor) -> Tensor:
    """[n, heads, D] or [n, heads] as the operator wants it, [1, heads, n, ...]; no copy."""
    return x.transpose(0, 1)[None]


def _spread(x: Tensor, span: QuerySpan) -> Tensor:
    """Rows of the queries put at their places in [first, end); zeros, which are inert, in the
    holes.
    """
    if span.local is None:
        return x
    wide = x.new_zeros(span.end - span.first, *x.shape[1:])
    return wide.index_copy_(0, span.local, x)


def _gather(x: Tensor, span: QuerySpan) -> Tensor:
    return x if span.local is None else x.index_select(0, span.local)


# CPU: torch's flash kernel aligns a causal mask with the first key, so a span's queries, rows
# [first, end), see rows [0, first) without a mask and rows [first, end) causally.


def _cpu_forward(
    q: Tensor, k: Tensor, v: Tensor, plan: QueryPlan, scale: float
) -> tuple[Tensor, Tensor]:
    out = torch.empty_like(q)
    lse = q.new_empty(q.shape[:2], dtype=_wide(q.dtype))
    for span in plan.spans:
        rows = q[span.query]
        block = slice(span.key_begin + span.first, span.key_begin + span.end)
        o, m = _cpu_call(_spread(rows, span), k[block], v[block], scale, causal=True)
        o, m = _gather(o, span), _gather(m, span)
        if span.first:
            before = slice(span.key_begin, span.key_begin + span.first)
            o, m = merge(o, m, *_cpu_call(rows, k[before], v[before], scale, causal=False))
        out[span.query], lse[span.query] = o, m
    return out, lse


def _cpu_call(
    q: Tensor, k: Tensor, v: Tensor, scale: float, *, causal: bool
) -> tuple[Tensor, Tensor]:
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        _batched(q), _batched(k), _batched(v), 0.0, causal, scale=scale
    )
    return out[0].transpose(0, 1), lse[0].transpose(0, 1)


def _cpu_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    plan: QueryPlan,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    dq = torch.empty_like(q)
    dk, dv = (torch.zeros_like(x, dtype=_wide(x.dtype)) for x in (k, v))
    for span in plan.spans:
        rows = [x[span.query] for x in (grad_out, q, out, lse)]
        wide = [_spread(x, span) for x in rows]
        block = slice(span.key_begin + span.first, span.key_begin + span.end)
        gq, gk, gv = _cpu_backward_call(wide, k[block], v[block], scale, causal=True)
        gq = _gather(gq, span)
        dk[block] += gk
        dv[block] += gv
        if span.first:
            before = slice(span.key_begin, span.key_begin + span.first)
            more, gk, gv = _cpu_backward_call(rows, k[before], v[before], scale, causal=False)
            gq = gq + more
            dk[before] += gk
            dv[before] += gv
        dq[span.query] = gq
    return dq, dk.to(k.dtype), dv.to(v.dtype)


def _cpu_backward_call(
    rows: list[Tensor], k: Tensor, v: Tensor, scale: float, *, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """rows: grad_out, q, out, lse."""
    grad_out, q, out, lse = rows
    grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *(_batched(x) for x in (grad_out, q, k, v, out, lse)), 0.0, causal, scale=scale
    )
    dq, dk, dv = (g[0].transpose(0, 1) for g in grads)
    return dq, dk, dv


# CUDA, half precision: the varlen kernel aligns a causal mask with the last key. Giving every
# context row a query (zeros where there is none) makes both alignments the same.


def _varlen_forward(
    q: Tensor, k: Tensor, v: Tensor, plan: QueryPlan, scale: float
) -> tuple[Tensor, Tensor]:
    if not plan.spans:
        return torch.empty_like(q), q.new_empty(q.shape[:2], dtype=torch.float32)
    longest = plan.max_context
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        _scatter(q, plan, k), k, v, plan.cu_context, plan.cu_context, longest, longest,
        0.0, True, False, scale=scale,
    )  # fmt: skip
    return out.index_select(0, plan.index), lse.transpose(0, 1).index_select(0, plan.index)


def _varlen_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    plan: QueryPlan,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    if not plan.spans:
        return torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    longest = plan.max_context
    unused = torch.empty(2, dtype=torch.uint64, device=q.device)  # dropout's state; there is none
    dq, dk, dv = torch.ops.aten._flash_attention_backward(
        _scatter(grad_out, plan, k), _scatter(q, plan, k), k, v, _scatter(out, plan, k),
        _scatter(lse, plan, k).transpose(0, 1).contiguous(),
        plan.cu_context, plan.cu_context, longest, longest, 0.0, True,
        unused, unused[:0], scale=scale,
    )  # fmt: skip
    return dq.index_select(0, plan.index), dk, dv


def _scatter(x: Tensor, plan: QueryPlan, context: Tensor) -> Tensor:
    """Rows of the queries put at their context rows, zeros elsewhere: [C, ...]."""
    return x.new_zeros(context.shape[0], *x.shape[1:]).index_copy_(0, plan.index, x)


# Any device, any dtype: explicit scores of a chunk of queries. CUDA has no flash kernel for
# float32.


def math_forward(
    q: Tensor, k: Tensor, v: Tensor, plan: QueryPlan, scale: float
) -> tuple[Tensor, Tensor]:
    """As `forward`, with the scores of at most 256 query rows written out."""
    out = torch.empty_like(q)
    lse = q.new_empty(q.shape[:2], dtype=_wide(q.dtype))
    for rows, keys, hidden in _math_chunks(plan):
        scores = _scores(q[rows], k[keys], hidden, scale)
        lse[rows] = torch.logsumexp(scores, dim=-1).flatten(0, 1).transpose(0, 1)
        out[rows] = _ungroup(torch.softmax(scores, dim=-1) @ _heads(v[keys])[:, None]).to(q.dtype)
    return out, lse


def math_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    plan: QueryPlan,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `backward`, with the scores of at most 256 query rows written out."""
    wide = _wide(q.dtype)
    dq = torch.empty_like(q)
    dk, dv = (torch.zeros_like(x, dtype=wide) for x in (k, v))
    groups = k.shape[1]
    for rows, keys, hidden in _math_chunks(plan):
        grad, delta = _group(grad_out[rows], groups), _group(grad_out[rows] * out[rows], groups)
        scores = _scores(q[rows], k[keys], hidden, scale)
        p = (scores - _group(lse[rows][..., None], groups)).exp()
        ds = p * (grad @ _heads(v[keys])[:, None].mT - delta.sum(-1, keepdim=True)) * scale
        dq[rows] = _ungroup(ds @ _heads(k[keys])[:, None]).to(q.dtype)
        dk[keys] += (ds.mT @ _group(q[rows], groups)).sum(1).transpose(0, 1)
        dv[keys] += (p.mT @ grad).sum(1).transpose(0, 1)
    return dq, dk.to(k.dtype), dv.to(v.dtype)


def _math_chunks(plan: QueryPlan) -> list[tuple[slice, slice, Tensor]]:
    """(queries, keys, hidden [queries, keys] bool: the key comes after the query) of each chunk."""
    chunks = []
    for span in plan.spans:
        keys = slice(span.key_begin, span.key_begin + span.end)
        columns = torch.arange(span.key_begin, keys.stop, device=plan.index.device)
        for begin in range(span.query.start, span.query.stop, _MATH_CHUNK_ROWS):
            rows = slice(begin, min(begin + _MATH_CHUNK_ROWS, span.query.stop))
            chunks.append((rows, keys, columns > plan.index[rows, None]))
    return chunks


def _scores(q: Tensor, k: Tensor, hidden: Tensor, scale: float) -> Tensor:
    """[Hkv, Hq / Hkv, queries, keys], -inf where hidden."""
    scores = _group(q, k.shape[1]) @ _heads(k)[:, None].mT * scale
    return scores.masked_fill_(hidden, float("-inf"))


def _heads(x: Tensor) -> Tensor:
    """[rows, heads, D] -> [heads, rows, D], float32 or wider."""
    return x.transpose(0, 1).to(_wide(x.dtype))


def _group(x: Tensor, groups: int) -> Tensor:
    """[rows, Hq, D] -> [Hkv, Hq / Hkv, rows, D], float32 or wider."""
    return torch.unflatten(_heads(x), 0, (groups, -1))


def _ungroup(x: Tensor) -> Tensor:
    """[Hkv, Hq / Hkv, rows, D] -> [rows, Hq, D]."""
    return x.flatten(0, 1).transpose(0, 1)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
