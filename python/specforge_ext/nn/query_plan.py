"""Which rows of a packed batch are keys, and which of those ask (nn/flash.py): index arithmetic.

Legend of shapes: C context rows, n query rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from specforge_ext.nn.flash import QueryPlan, QuerySpan

_MAX_HOLE_ROWS = 32
"""A wider hole between the queries of a sample starts another span, rather than being computed."""


@dataclass(frozen=True)
class Context:
    """The rows that are keys. rows: [C] packed positions, ascending. cu: starts of the samples in
    the packed batch, and at the end its length; begins: the same among the context rows.
    """

    rows: np.ndarray
    cu: np.ndarray
    begins: np.ndarray

    @classmethod
    def up_to_last(cls, asking: np.ndarray, cu: np.ndarray) -> Context:
        """Per sample, the rows up to its last asking one; asking: ascending packed positions."""
        ends = np.searchsorted(asking, cu[1:])
        some = ends > np.searchsorted(asking, cu[:-1])
        last = asking[np.maximum(ends - 1, 0)] if asking.size else np.zeros_like(ends)
        lengths = np.where(some, last + 1 - cu[:-1], 0)
        begins = np.concatenate(([0], np.cumsum(lengths)))
        rows = np.arange(begins[-1]) + np.repeat(cu[:-1] - begins[:-1], lengths)
        return cls(rows=rows, cu=cu, begins=begins)

    def queries(self, rows: np.ndarray, device: torch.device) -> QueryPlan:
        """Some context rows, ascending packed positions, each asking for the keys up to itself."""
        sample = np.searchsorted(self.cu, rows, side="right") - 1
        cuts = np.diff(sample, prepend=-1).astype(bool) | (
            np.diff(rows, prepend=0) > _MAX_HOLE_ROWS
        )
        bounds = np.append(cuts.nonzero()[0], rows.size)
        spans = []
        for a, b in pairwise(bounds.tolist()):
            n = sample[a]
            spans.append(_span(rows[a:b] - self.cu[n], slice(a, b), int(self.begins[n])))
        return QueryPlan(
            spans=tuple(spans),
            index=torch.from_numpy(np.searchsorted(self.rows, rows)).to(device),
            cu_context=torch.from_numpy(self.begins.astype(np.int32)).to(device),
            max_context=int(np.diff(self.begins).max(initial=0)),
        )


def places(rows: np.ndarray, among: np.ndarray, device: torch.device) -> Tensor | None:
    """[n] int64: where each row stands in `among`, a superset, both ascending; None if equal."""
    if rows.size == among.size:
        return None
    return torch.from_numpy(np.searchsorted(among, rows)).to(device)


def _span(local: np.ndarray, query: slice, key_begin: int) -> QuerySpan:
    first, end = int(local[0]), int(local[-1]) + 1
    dense = end - first == local.size
    return QuerySpan(
        query=query,
        key_begin=key_begin,
        first=first,
        end=end,
        local=None if dense else torch.from_numpy(local - first),
    )
