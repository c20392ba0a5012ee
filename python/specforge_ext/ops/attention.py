"""Attention of rows over keys that they made for themselves, merged into attention that exists.

The part of training-time test (EAGLE-3, arXiv 2503.01840) that flash attention has no word for: a
query sees, beside a causal context, one key of its own per earlier step. Formulas and source:
csrc/attention/own_keys.h. Legend: n query rows, n_j rows of step j, Hq / Hkv heads, D head
dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Optional

import torch
from torch import Tensor

from specforge_ext import _C
from specforge_ext.ops._native import stream_of


@torch.library.custom_op("specforge_ext::own_keys_merge_", mutates_args=("out", "lse"))
def own_keys_merge_(
    query: Tensor,
    out: Tensor,
    lse: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    rows: Sequence[Optional[Tensor]],  # noqa: UP045 - torch reads the schema from this spelling
    scale: float,
) -> None:
    """`out` and `lse` are OVERWRITTEN by the attention that sees the rows' own keys as well.

    query, out: [n, Hq, D] float32 or bfloat16. lse: [n, Hq] float32, logsumexp of the scores that
    made `out`, nats; -inf where it saw no key (it must be finite there all the same).
    keys[j], values[j]: [n_j, Hkv, D] in the query's dtype, read where they lie; at most 63 of them.
    rows[j]: [n] int64, each query's row of keys[j], strictly ascending; None for all in order.
    scale: factor of the scores. All contiguous.

    Deterministic; not differentiable: `own_keys_grads_` is its backward. CUDA wants D a multiple of
    8, at most 256, and marks the query of a row outside [0, n_j) by NaN; on the CPU ValueError says
    so, as it does everywhere for a tensor that does not fit.
    """
    _C.own_keys_merge(
        query, out, lse, list(keys), list(values), list(rows), scale, stream_of(query)
    )


def own_keys_grads_(
    grad_out: Tensor,
    query: Tensor,
    out: Tensor,
    lse: Tensor,
    grad_query: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    rows: Sequence[Tensor | None],
    scale: float,
) -> list[Tensor]:
    """Gradients of all keys, then of all values; the query's is ADDED to `grad_query`.

    grad_out, grad_query: [n, Hq, D] in the query's dtype. out, lse: as `own_keys_merge_` left them.
    The rest as there. Rows that no query uses get gradient 0. grad_out must hold the gradient of
    `out` alone: nothing flows through lse. Deterministic. ValueError as `own_keys_merge_`.
    """
    grad_keys = [torch.empty_like(k) for k in keys]
    grad_values = [torch.empty_like(v) for v in values]
    _own_keys_grads(
        grad_out, query, out, lse, grad_query, keys, values, rows, grad_keys, grad_values, scale
    )
    return [*grad_keys, *grad_values]


# All results are arguments: torch.compile takes no op that changes some arguments and returns
# others.
@torch.library.custom_op(
    "specforge_ext::own_keys_grads", mutates_args=("grad_query", "grad_keys", "grad_values")
)
def _own_keys_grads(
    grad_out: Tensor,
    query: Tensor,
    out: Tensor,
    lse: Tensor,
    grad_query: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    rows: Sequence[Optional[Tensor]],  # noqa: UP045
    grad_keys: Sequence[Tensor],
    grad_values: Sequence[Tensor],
    scale: float,
) -> None:
    _C.own_keys_grads(
        grad_out,
        query,
        out,
        lse,
        grad_query,
        list(keys),
        list(values),
        list(rows),
        list(grad_keys),
        list(grad_values),
        scale,
        stream_of(query),
    )
