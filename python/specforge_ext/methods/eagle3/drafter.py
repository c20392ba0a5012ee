"""Chain decoding with an EAGLE-3 draft, the same computation as training-time test.

Legend of shapes: B sequences, M columns of the cache (of which each sequence has used some), n new
columns, H hidden size, Hq / Hkv heads, D head dimension, V / Vd vocabularies.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from specforge_ext.methods.eagle3.model import Eagle3Draft
from specforge_ext.records import Proposal


@dataclass
class _Cache:
    """Step-0 keys and values [B, Hkv, M, D]; used [B, M] bool; num_columns of M are taken.

    hidden [B, H], token [B], position [B]: the input of each sequence's last row.
    """

    keys: Tensor
    values: Tensor
    used: Tensor
    num_columns: int
    hidden: Tensor
    token: Tensor
    position: Tensor


class Eagle3Drafter:
    """`specforge_ext.methods.base.Drafter`. Rejected columns stay in the cache as holes."""

    def __init__(self, draft: Eagle3Draft) -> None:
        self.draft = draft
        self._cache: _Cache | None = None

    @torch.no_grad()
    def start(self, num_sequences: int, capacity: int) -> None:
        """Forget everything; make room for `capacity` columns a sequence."""
        shape = self.draft.shape.layer
        weight = self.draft.fc.weight
        cache_shape = (num_sequences, shape.num_kv_heads, capacity, shape.head_dim)
        integers = torch.zeros(num_sequences, dtype=torch.int64, device=weight.device)
        self._cache = _Cache(
            keys=weight.new_zeros(cache_shape),
            values=weight.new_zeros(cache_shape),
            used=torch.zeros(num_sequences, capacity, dtype=torch.bool, device=weight.device),
            num_columns=0,
            hidden=weight.new_zeros(num_sequences, shape.hidden_size),
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
        """next_tokens, positions [B, n] int64, features["aux"] [B, n, F], valid [B, n] bool.

        ValueError when the columns do not fit. What stands in columns that are not valid is not
        used.
        """
        cache, draft = self._started(), self.draft
        begin, end = cache.num_columns, cache.num_columns + valid.shape[1]
        if end > cache.used.shape[1]:
            raise ValueError(
                f"eagle3 drafter: wanted at most {cache.used.shape[1]} columns, "
                f"the capacity given to start, got {end}"
            )
        rows, columns = valid.nonzero(as_tuple=True)
        tokens, places = next_tokens[rows, columns], positions[rows, columns]
        hidden = draft.fuse(features["aux"][rows, columns])
        x = draft.midlayer.inputs(draft.embed(tokens), hidden)
        keys, values = draft.midlayer.self_attn.key_value(x, draft.rope.tables(places))
        cache.keys[rows, :, begin + columns] = keys.to(cache.keys.dtype)
        cache.values[rows, :, begin + columns] = values.to(cache.values.dtype)
        cache.used[:, begin:end] = valid
        cache.num_columns = end
        last = rows != torch.cat((rows[1:], rows.new_full((1,), -1)))[: rows.numel()]
        cache.hidden[rows[last]] = hidden[last].to(cache.hidden.dtype)
        cache.token[rows[last]] = tokens[last]
        cache.position[rows[last]] = places[last]

    @torch.no_grad()
    def propose(
        self, depth: int, *, temperature: float, generator: torch.Generator | None
    ) -> Proposal:
        """`depth` tokens a sequence. ValueError if a sequence has no row, or temperature < 0."""
        cache = self._started()
        if temperature < 0:
            raise ValueError(f"temperature: wanted 0 or more, got {temperature}")
        empty = (~cache.used.any(1)).nonzero()[:, 0].tolist()
        if empty:
            raise ValueError(f"eagle3 drafter: sequences {empty} have no row to look ahead from")
        look = _LookAhead(self.draft, cache)
        token, tokens, probs = cache.token, [], []
        for _ in range(depth):
            logits = look.step(token)
            if temperature == 0:
                choice = logits.argmax(-1)
            else:
                p = torch.softmax(logits.float() / temperature, dim=-1)
                choice = torch.multinomial(p, 1, generator=generator)[:, 0]
                probs.append(self._over_target(p))
            token = choice + self.draft.d2t[choice]
            tokens.append(token)
        return Proposal(
            tokens=torch.stack(tokens, 1) if tokens else cache.token[:, None][:, :0],
            probs=torch.stack(probs, 1) if probs else None,
        )

    @torch.no_grad()
    def logits_along(self, tokens: Tensor) -> Tensor:
        """Draft logits [B, K, Vd] of the look-ahead whose first K - 1 tokens [B, K - 1] are
        given.
        """
        cache = self._started()
        look = _LookAhead(self.draft, cache)
        given = [cache.token, *tokens.unbind(1)]
        return torch.stack([look.step(token) for token in given], 1)

    def _over_target(self, p: Tensor) -> Tensor:
        """Probabilities [B, Vd] over the draft's vocabulary -> [B, V], 0 elsewhere."""
        ids = torch.arange(p.shape[1], device=p.device) + self.draft.d2t
        return p.new_zeros(p.shape[0], self.draft.shape.vocab_size).index_copy_(1, ids, p)

    def _started(self) -> _Cache:
        if self._cache is None:
            raise ValueError("eagle3 drafter: wanted start() first")
        return self._cache


class _LookAhead:
    """The last row of each sequence, step by step; its own keys live here and vanish with it."""

    def __init__(self, draft: Eagle3Draft, cache: _Cache) -> None:
        self.draft = draft
        self.keys = cache.keys[:, :, : cache.num_columns]
        self.values = cache.values[:, :, : cache.num_columns]
        self.used = cache.used[:, : cache.num_columns]
        self.hidden = cache.hidden
        self.position = cache.position
        self.steps = 0

    def step(self, token: Tensor) -> Tensor:
        """Draft logits [B, Vd] of the row whose next input token [B] is given."""
        layer = self.draft.midlayer
        x = layer.inputs(self.draft.embed(token), self.hidden)
        tables = self.draft.rope.tables(self.position + self.steps)
        if self.steps:
            self._append(*layer.self_attn.key_value(x, tables))
        query = layer.self_attn.query(x, tables)
        attended = F.scaled_dot_product_attention(
            query[:, :, None].to(self.keys.dtype),
            self.keys,
            self.values,
            attn_mask=self.used[:, None, None],
            enable_gqa=True,
        )
        self.hidden = layer.finish(self.hidden, attended[:, :, 0].to(query.dtype))
        self.steps += 1
        return self.draft.logits(self.hidden)

    def _append(self, keys: Tensor, values: Tensor) -> None:
        self.keys = torch.cat((self.keys, keys[:, :, None].to(self.keys.dtype)), 2)
        self.values = torch.cat((self.values, values[:, :, None].to(self.values.dtype)), 2)
        self.used = F.pad(self.used, (0, 1), value=True)
