"""Decoding with a block draft: the context's keys and values, kept; a block's rows, computed anew.

Legend of shapes: S sequences, M columns of the cache (of which each sequence has used some), n new
columns, B rows of a block, F features' width, H hidden size, Hq / Hkv heads, D head dimension.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional as F

from specforge_ext.methods._block.config import FEATURE
from specforge_ext.methods._block.model import BlockBackbone, BlockLayer
from specforge_ext.methods._drafter import NewRows, check_room, check_seen


@dataclass
class _Cache:
    """Of every layer, keys and values [S, Hkv, M, D]. used [S, M] bool; num_columns of M are taken.

    places [S, M]: positions of the columns. token, position [S]: the last known token, where the
    next block begins.
    """

    keys: list[Tensor]
    values: list[Tensor]
    used: Tensor
    places: Tensor
    num_columns: int
    token: Tensor
    position: Tensor


class BlockDecoding:
    """The part of `specforge_ext.methods.base.Drafter` that block drafts share: all but `propose`.

    A block begins at the last known token and sees the rows before it, which are all that have been
    observed. Rejected columns stay in the cache as holes.
    """

    def __init__(self, draft: BlockBackbone, *, name: str) -> None:
        """name: of the method, for errors."""
        self.draft = draft
        self.name = name
        self._cache: _Cache | None = None

    @property
    def layers(self) -> list[BlockLayer]:
        return cast("list[BlockLayer]", list(self.draft.layers))

    @torch.no_grad()
    def start(self, num_sequences: int, capacity: int) -> None:
        """Forget everything; make room for `capacity` columns a sequence."""
        shape, weight = self.draft.block_shape.layer, self.draft.fc.weight
        cache_shape = (num_sequences, shape.num_kv_heads, capacity, shape.head_dim)
        integers = torch.zeros(num_sequences, dtype=torch.int64, device=weight.device)
        columns = (num_sequences, capacity)
        self._cache = _Cache(
            keys=[weight.new_zeros(cache_shape) for _ in self.layers],
            values=[weight.new_zeros(cache_shape) for _ in self.layers],
            used=torch.zeros(columns, dtype=torch.bool, device=weight.device),
            places=torch.zeros(columns, dtype=torch.int64, device=weight.device),
            num_columns=0,
            token=integers,
            position=integers.clone(),
        )

    @torch.no_grad()
    def observe(
        self,
        next_tokens: Tensor,
        features: Mapping[str, Tensor],
        positions: Tensor,
        valid: Tensor,
    ) -> None:
        """next_tokens, positions [S, n] int64, features["hidden"] [S, n, F], valid [S, n] bool.

        ValueError when the columns do not fit. What stands in columns that are not valid is not
        used.
        """
        cache, draft = self._started(), self.draft
        begin, end = cache.num_columns, cache.num_columns + valid.shape[1]
        check_room(self.name, capacity=cache.used.shape[1], num_columns=end)
        new = NewRows.of(next_tokens, positions, valid)
        sequences, columns = new.sequences, begin + new.columns
        context = draft.context(features[FEATURE][new.sequences, new.columns])
        tables = draft.rope.tables(new.positions)
        for layer, keys, values in zip(self.layers, cache.keys, cache.values, strict=True):
            new_keys, new_values = layer.self_attn.key_value(context, tables)
            keys[sequences, :, columns] = new_keys.to(keys.dtype)
            values[sequences, :, columns] = new_values.to(values.dtype)
        cache.used[:, begin:end] = valid
        cache.places[sequences, columns] = new.positions
        cache.num_columns = end
        cache.token[sequences[new.last]] = new.tokens[new.last]
        cache.position[sequences[new.last]] = new.positions[new.last] + 1

    def select(self, rows: Tensor) -> None:
        """Keep these sequences, [R] int64; the others are forgotten."""
        cache = self._started()
        cache.keys = [keys[rows] for keys in cache.keys]
        cache.values = [values[rows] for values in cache.values]
        cache.used, cache.places = cache.used[rows], cache.places[rows]
        cache.token, cache.position = cache.token[rows], cache.position[rows]

    @property
    def last_tokens(self) -> Tensor:
        """[S] int64, the last known token of each sequence."""
        return self._started().token

    @torch.no_grad()
    def states(self) -> Tensor:
        """Normed hidden states [S, B, H] of the blocks at the last known tokens; no trace is left.

        ValueError if a sequence has no row.
        """
        cache, draft = self._started(), self.draft
        check_seen(self.name, cache.used)
        size = draft.block_shape.block_size
        positions = cache.position[:, None] + torch.arange(size, device=cache.position.device)
        tables = draft.rope.tables(positions.flatten())
        x = draft.noise(cache.token).flatten(0, 1)
        visible = {window: _visible(cache, positions, window) for window in self._windows()}
        for i, layer in enumerate(self.layers):
            normed = layer.input_layernorm(x)
            own = layer.self_attn.key_value(normed, tables)
            kept = (cache.keys[i], cache.values[i])
            keys, values = (
                torch.cat((old[:, :, : cache.num_columns], _heads(new, size).to(old.dtype)), 2)
                for old, new in zip(kept, own, strict=True)
            )
            attended = F.scaled_dot_product_attention(
                _heads(layer.self_attn.query(normed, tables), size).to(keys.dtype),
                keys,
                values,
                attn_mask=visible[layer.window],
                enable_gqa=True,
            )
            x = layer.finish(x, attended.transpose(1, 2).flatten(0, 1).to(x.dtype))
        return torch.unflatten(draft.normed(x), 0, (-1, size))

    def _windows(self) -> set[int | None]:
        return {layer.window for layer in self.layers}

    def _started(self) -> _Cache:
        if self._cache is None:
            raise ValueError(f"{self.name} drafter: wanted start() first")
        return self._cache


def _visible(cache: _Cache, positions: Tensor, window: int | None) -> Tensor:
    """[S, 1, B, M' + B] bool, M' the columns taken: what the rows at `positions` [S, B] see."""
    size, columns = positions.shape[1], cache.num_columns
    context = cache.used[:, None, :columns].expand(-1, size, -1)
    slots = torch.arange(size, device=positions.device)
    own = torch.ones(size, size, dtype=torch.bool, device=positions.device)
    if window is not None:
        own = slots[:, None] >= slots
        context = context & (
            cache.places[:, None, :columns] >= positions[:, :, None] - (window - 1)
        )
    return torch.cat((context, own.expand(len(positions), -1, -1)), 2)[:, None]


def _heads(x: Tensor, size: int) -> Tensor:
    """[S * B, heads, D] -> [S, heads, B, D]."""
    return torch.unflatten(x, 0, (-1, size)).transpose(1, 2)
