"""Decoding with a stack of draft layers: keys and values of the rows seen so far, and what looks
ahead of them.

Legend of shapes: B sequences, M columns of the cache (of which each sequence has used some), n new
columns, K rows of a look-ahead, r rows in all, H hidden size, Hq / Hkv heads, D head dimension.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from specforge_ext.nn.layer import DraftLayer, Tables


class StackCache:
    """Keys and values [B, Hkv, M, D] of every layer. Rejected columns stay as holes.

    used: [B, M] bool. num_columns of M are taken.
    """

    def __init__(self, stack: Sequence[DraftLayer], num_sequences: int, capacity: int) -> None:
        """stack: layers of one shape."""
        attention = stack[0].self_attn
        weight = attention.k_proj.weight
        size = (num_sequences, attention.num_kv_heads, capacity, attention.head_dim)
        self.stack = stack
        self.keys = [weight.new_zeros(size) for _ in stack]
        self.values = [weight.new_zeros(size) for _ in stack]
        self.used = torch.zeros(num_sequences, capacity, dtype=torch.bool, device=weight.device)
        self.num_columns = 0

    def add(self, valid: Tensor, embedding: Tensor, hidden: Tensor, tables: Tables) -> None:
        """Run the rows of the valid new columns; the cache gets their keys and values.

        valid: [B, n] bool. embedding, hidden: [r, H] of the valid ones, sequence by sequence, in
        order. A row sees the used columns of its sequence up to its own. The room must be there.
        """
        begin, end = self.num_columns, self.num_columns + valid.shape[1]
        rows, columns = valid.nonzero(as_tuple=True)
        self.used[:, begin:end] = valid
        self.num_columns = end
        for i, layer in enumerate(self.stack):
            x = layer.inputs(embedding, hidden)
            keys, values = layer.self_attn.key_value(x, tables)
            self.keys[i][rows, :, begin + columns] = keys.to(self.keys[i].dtype)
            self.values[i][rows, :, begin + columns] = values.to(self.values[i].dtype)
            if i + 1 < len(self.stack):
                query = layer.self_attn.query(x, tables)
                wide = query.new_zeros(*valid.shape, *query.shape[1:])
                wide[rows, columns] = query
                attended = self._attend(i, wide.transpose(1, 2), self._causal(begin, end))
                hidden = layer.finish(hidden, attended.transpose(1, 2)[rows, columns])

    def select(self, rows: Tensor) -> None:
        """Keep these sequences, [R] int64."""
        self.keys = [keys[rows] for keys in self.keys]
        self.values = [values[rows] for values in self.values]
        self.used = self.used[rows]

    def look_ahead(self) -> LookAhead:
        """From the last rows; it leaves no trace here."""
        return LookAhead(self)

    def _causal(self, begin: int, end: int) -> Tensor:
        """[B, 1, n, M'] bool: used columns up to the row's own."""
        columns = torch.arange(end, device=self.used.device)
        return (self.used[:, None, :end] & (columns <= columns[begin:, None]))[:, None]

    def _attend(self, i: int, query: Tensor, visible: Tensor) -> Tensor:
        """query [B, Hq, n, D] -> the same. Rows that see nothing hold anything."""
        keys, values = (x[i][:, :, : self.num_columns] for x in (self.keys, self.values))
        return attend(query, keys, values, visible)


class LookAhead:
    """Rows beyond the last ones; their keys live here, by layer, and vanish with it."""

    def __init__(self, cache: StackCache) -> None:
        self.stack = cache.stack
        self.keys = [x[:, :, : cache.num_columns] for x in cache.keys]
        self.values = [x[:, :, : cache.num_columns] for x in cache.values]
        self.used = cache.used[:, : cache.num_columns]

    def run(
        self, embedding: Tensor, hidden: Tensor, tables: Tables, *, num_cached: int = 0
    ) -> Tensor:
        """K rows a sequence, embedding, hidden [B * K, H] -> the last layer's output, [B * K, H].

        A row sees the used columns, the rows of earlier calls, and those of this one up to itself.
        The first num_cached of the K (0 or 1) have their keys in the cache already.
        """
        size = embedding.shape[0] // self.used.shape[0]
        visible = self._visible(size, size - num_cached)
        for i, layer in enumerate(self.stack):
            x = layer.inputs(embedding, hidden)
            if size > num_cached:
                own = layer.self_attn.key_value(x, tables)
                self.keys[i], self.values[i] = (
                    torch.cat((old, _heads(new, size)[:, :, num_cached:].to(old.dtype)), 2)
                    for old, new in zip((self.keys[i], self.values[i]), own, strict=True)
                )
            query = _heads(layer.self_attn.query(x, tables), size)
            attended = attend(query, self.keys[i], self.values[i], visible)
            hidden = layer.finish(hidden, attended.transpose(1, 2).flatten(0, 1))
        self.used = F.pad(self.used, (0, size - num_cached), value=True)
        return hidden

    def _visible(self, size: int, new: int) -> Tensor:
        """[B, 1, K, M' + new] bool."""
        row = torch.arange(size, device=self.used.device)[:, None]
        own = torch.arange(size - new, size, device=self.used.device) <= row
        before = self.used[:, None].expand(-1, size, -1)
        return torch.cat((before, own.expand(len(before), -1, -1)), 2)[:, None]


def attend(query: Tensor, keys: Tensor, values: Tensor, visible: Tensor) -> Tensor:
    """query [B, Hq, n, D], keys, values [B, Hkv, m, D], visible [B, 1, n, m] bool -> as query."""
    out = F.scaled_dot_product_attention(
        query.to(keys.dtype), keys, values, attn_mask=visible, enable_gqa=True
    )
    return out.to(query.dtype)


def _heads(x: Tensor, size: int) -> Tensor:
    """[B * K, heads, D] -> [B, heads, K, D]."""
    return torch.unflatten(x, 0, (-1, size)).transpose(1, 2)
