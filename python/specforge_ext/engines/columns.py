"""Columns of a cache: what generation and cached decoding share.

The cache is a list of columns, the same number for all B rows. A column that a row does not use
(padding of a ragged prefix, a rejected token) is a hole: it stays and is masked. Positions are
given with the tokens, so a hole moves nobody's RoPE angle.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class ColumnOutput:
    """last_hidden: [B, n, H] after the final norm. streams[k]: [B, n, H], after k layers."""

    last_hidden: Tensor
    streams: Mapping[int, Tensor]


class ColumnModel(Protocol):
    """A forward that appends n columns to a key/value cache of its own."""

    def start(self, num_rows: int, capacity: int) -> None:
        """Forget everything. capacity: columns to make room for at once; more may come."""
        ...

    def append(
        self,
        input_ids: Tensor,
        positions: Tensor,
        *,
        mask: Tensor | None,
        stream_ids: tuple[int, ...] = (),
    ) -> ColumnOutput:
        """input_ids, positions [B, n] int64. mask [B, n, columns so far + n] bool, True is seen.

        mask None: no row has a hole, plain causal attention; with n > 1 only on the first columns.
        """
        ...

    def select(self, rows: Tensor) -> None:
        """Keep these rows ([R] int64) of the cache, in this order."""
        ...


INITIAL_COLUMNS = 256


class Visibility:
    """Which columns each row may see: [B, columns] bool, growing."""

    def __init__(self, num_rows: int, device: torch.device) -> None:
        self._visible = torch.zeros(num_rows, INITIAL_COLUMNS, dtype=torch.bool, device=device)
        self._length = 0

    @property
    def num_columns(self) -> int:
        return self._length

    def append(self, valid: Tensor) -> Tensor:
        """Add n columns, valid [B, n] bool; their mask [B, n, columns] bool.

        A new column sees the visible ones before it and itself, also when it is a hole: attention
        over nothing would give NaN.
        """
        num_new = valid.shape[1]
        start, end = self._length, self._length + num_new
        if end > self._visible.shape[1]:
            grown = self._visible.new_zeros(len(valid), max(end, 2 * self._visible.shape[1]))
            grown[:, :start] = self._visible[:, :start]
            self._visible = grown
        self._visible[:, start:end] = valid
        self._length = end
        mask = self._visible[:, None, :end].repeat(1, num_new, 1)
        before = torch.ones(num_new, num_new, dtype=torch.bool, device=valid.device).tril(-1)
        mask[:, :, start:] &= before
        mask[:, :, start:] |= torch.eye(num_new, dtype=torch.bool, device=valid.device)
        return mask

    def drop(self, keep: Tensor) -> None:
        """Of the last n columns, switch those off where keep [B, n] bool is False."""
        num_last = keep.shape[1]
        if num_last > self._length:
            raise ValueError(f"keep: wanted at most {self._length} columns, got {num_last}")
        self._visible[:, self._length - num_last : self._length] &= keep

    def select(self, rows: Tensor) -> None:
        """Keep these rows ([R] int64), in this order."""
        self._visible = self._visible[rows]
