"""Shared by the tests of own_keys: inputs, and how far a result may be from float64.

Legend: n queries, n_j rows of step j, Hq / Hkv heads, D head dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ops_helpers import assert_no_worse
from specforge_ext.ops import reference

SLACK = {torch.float32: 2e-6, torch.bfloat16: 2.0**-8}


@dataclass(frozen=True)
class OwnKeysCase:
    """What attention over own keys gets. grad_query: what is there before the own keys' part."""

    query: Tensor
    out: Tensor
    lse: Tensor
    grad_out: Tensor
    grad_query: Tensor
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    rows: tuple[Tensor | None, ...]
    scale: float
    spread: float

    @property
    def own(self) -> tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor | None], float]:
        return self.keys, self.values, self.rows, self.scale

    def to(self, dtype: torch.dtype, lse_dtype: torch.dtype) -> OwnKeysCase:
        """A copy."""

        def cast(*tensors: Tensor) -> tuple[Tensor, ...]:
            return tuple(x.to(dtype, copy=True) for x in tensors)

        floats = cast(self.query, self.out), cast(self.grad_out, self.grad_query)
        return OwnKeysCase(
            *floats[0],
            self.lse.to(lse_dtype, copy=True),
            *floats[1],
            cast(*self.keys),
            cast(*self.values),
            self.rows,
            self.scale,
            self.spread,
        )

    def slack(self, dtype: torch.dtype) -> float:
        """A score's rounding is relative to the score, and moves the logarithm of its weight."""
        return SLACK[dtype] * max(self.spread, 1.0)


def own_keys_case(
    num_rows: int,
    *,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 16,
    depth: int = 3,
    dtype: torch.dtype = torch.float32,
    spread: float = 1.0,
    seed: int = 0,
) -> OwnKeysCase:
    """Random values; steps take turns at having all rows in order and holding more of them.

    spread: standard deviation of the scores, about.
    """
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator) * scale).to(dtype)

    rows = [_rows(num_rows, more, generator) for more in _more(depth)]
    sizes = [num_rows + more for more in _more(depth)]
    return OwnKeysCase(
        query=randn(num_rows, heads, head_dim),
        out=randn(num_rows, heads, head_dim),
        lse=torch.randn(num_rows, heads, generator=generator) * spread,
        grad_out=randn(num_rows, heads, head_dim),
        grad_query=randn(num_rows, heads, head_dim),
        keys=tuple(randn(n, kv_heads, head_dim, scale=spread) for n in sizes),
        values=tuple(randn(n, kv_heads, head_dim) for n in sizes),
        rows=tuple(rows),
        scale=head_dim**-0.5,
        spread=spread,
    )


def _more(depth: int) -> list[int]:
    return [0 if j % 3 == 1 else 2 * (depth - j) for j in range(depth)]


def _rows(num_rows: int, more: int, generator: torch.Generator) -> Tensor | None:
    if not more:
        return None
    return torch.randperm(num_rows + more, generator=generator)[:num_rows].sort().values


def merged(case: OwnKeysCase) -> tuple[Tensor, Tensor]:
    """By definition, in float64 of the same values."""
    exact = case.to(torch.float64, torch.float64)
    return reference.own_keys_merge(exact.query, exact.out, exact.lse, *exact.own)


def check_merge(case: OwnKeysCase, got: tuple[Tensor, Tensor]) -> None:
    """Against float64; as good as the definition computed in the query's dtype."""
    baseline = reference.own_keys_merge(case.query, case.out, case.lse, *case.own)
    for mine, true, same_dtype in zip(got, merged(case), baseline, strict=True):
        assert_no_worse(mine, true, same_dtype, slack=case.slack(mine.dtype))


def grads_input(case: OwnKeysCase) -> tuple[Tensor, ...]:
    """grad_out, query, merged out and lse in the dtypes of the case, and a copy of grad_query."""
    out, lse = merged(case)
    rounded = out.to(case.query.dtype), lse.float()
    return case.grad_out, case.query, *rounded, case.grad_query.clone()


def check_grads(case: OwnKeysCase, inputs: Sequence[Tensor], got: Sequence[Tensor]) -> None:
    """inputs: of `grads_input`, after the call. got: gradients of all keys, then all values."""
    fixed, grad_query = inputs[:4], inputs[4]
    exact = case.to(torch.float64, torch.float64)
    truth = reference.own_keys_grads(*(x.double() for x in fixed), *exact.own)
    baseline = reference.own_keys_grads(*fixed, *case.own)
    slack = case.slack(case.query.dtype)
    assert_no_worse(
        grad_query,
        exact.grad_query + truth[0],
        (case.grad_query + baseline[0]).to(grad_query.dtype),
        slack=slack,
    )
    wanted = zip((*truth[1], *truth[2]), (*baseline[1], *baseline[2]), strict=True)
    for mine, (true, same_dtype) in zip(got, wanted, strict=True):
        assert mine.dtype == case.query.dtype
        assert_no_worse(mine, true, same_dtype, slack=slack)
    for j, rows in enumerate(case.rows):
        if rows is not None:
            unused = torch.ones(case.keys[j].shape[0], dtype=torch.bool)
            unused[rows] = False
            assert (got[j][unused] == 0).all() and (got[j + len(case.rows)][unused] == 0).all()
