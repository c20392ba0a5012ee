"""Chain decoding with an EAGLE-3 draft, the same computation as training-time test.

Legend of shapes: B sequences, n new columns, F features' width, H hidden size, V / Vd vocabularies.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from specforge_ext.methods.eagle3.model import Eagle3Draft
from specforge_ext.nn.stack_cache import StackCache
from specforge_ext.records import Proposal


@dataclass
class _State:
    """hidden [B, H], token [B], position [B]: the input of each sequence's last row."""

    cache: StackCache
    hidden: Tensor
    token: Tensor
    position: Tensor


class Eagle3Drafter:
    """`specforge_ext.methods.base.Drafter`. Rejected columns stay in the cache as holes."""

    def __init__(self, draft: Eagle3Draft) -> None:
        self.draft = draft
        self._state: _State | None = None

    @torch.no_grad()
    def start(self, num_sequences: int, capacity: int) -> None:
        """Forget everything; make room for `capacity` columns a sequence."""
        shape, weight = self.draft.shape.layer, self.draft.fc.weight
        integers = torch.zeros(num_sequences, dtype=torch.int64, device=weight.device)
        self._state = _State(
            cache=StackCache(self.draft.stack, shape, num_sequences, capacity),
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
        state, draft = self._started(), self.draft
        capacity = state.cache.used.shape[1]
        end = state.cache.num_columns + valid.shape[1]
        if end > capacity:
            raise ValueError(
                f"eagle3 drafter: wanted at most {capacity} columns, "
                f"the capacity given to start, got {end}"
            )
        rows, columns = valid.nonzero(as_tuple=True)
        tokens, places = next_tokens[rows, columns], positions[rows, columns]
        hidden = draft.fuse(features["aux"][rows, columns])
        state.cache.add(valid, draft.embed(tokens), hidden, draft.rope.tables(places))
        last = rows != torch.cat((rows[1:], rows.new_full((1,), -1)))[: rows.numel()]
        state.hidden[rows[last]] = hidden[last].to(state.hidden.dtype)
        state.token[rows[last]] = tokens[last]
        state.position[rows[last]] = places[last]

    def select(self, rows: Tensor) -> None:
        """Keep these sequences, [R] int64; the others are forgotten."""
        state = self._started()
        state.cache.select(rows)
        state.hidden, state.token = state.hidden[rows], state.token[rows]
        state.position = state.position[rows]

    @torch.no_grad()
    def propose(
        self, depth: int, *, temperature: float, generator: torch.Generator | None
    ) -> Proposal:
        """`depth` tokens a sequence. ValueError if a sequence has no row, or temperature < 0."""
        state = self._started()
        if temperature < 0:
            raise ValueError(f"temperature: wanted 0 or more, got {temperature}")
        empty = (~state.cache.used.any(1)).nonzero()[:, 0].tolist()
        if empty:
            raise ValueError(f"eagle3 drafter: sequences {empty} have no row to look ahead from")
        look = _LookAhead(self.draft, state)
        token, tokens, probs = state.token, [], []
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
            tokens=torch.stack(tokens, 1) if tokens else state.token[:, None][:, :0],
            probs=torch.stack(probs, 1) if probs else None,
        )

    @torch.no_grad()
    def logits_along(self, tokens: Tensor) -> Tensor:
        """Draft logits [B, K, Vd] of the look-ahead whose first K - 1 tokens [B, K - 1] are
        given.
        """
        state = self._started()
        look = _LookAhead(self.draft, state)
        given = [state.token, *tokens.unbind(1)]
        return torch.stack([look.step(token) for token in given], 1)

    def _over_target(self, p: Tensor) -> Tensor:
        """Probabilities [B, Vd] over the draft's vocabulary -> [B, V], 0 elsewhere."""
        ids = torch.arange(p.shape[1], device=p.device) + self.draft.d2t
        return p.new_zeros(p.shape[0], self.draft.shape.vocab_size).index_copy_(1, ids, p)

    def _started(self) -> _State:
        if self._state is None:
            raise ValueError("eagle3 drafter: wanted start() first")
        return self._state


class _LookAhead:
    """The last row of each sequence, step by step; its own keys vanish with it."""

    def __init__(self, draft: Eagle3Draft, state: _State) -> None:
        self.draft = draft
        self.look = state.cache.look_ahead()
        self.hidden = state.hidden
        self.position = state.position
        self.steps = 0

    def step(self, token: Tensor) -> Tensor:
        """Draft logits [B, Vd] of the row whose next input token [B] is given."""
        draft = self.draft
        tables = draft.rope.tables(self.position + self.steps)
        hidden = draft.carry(self.hidden) if self.steps else self.hidden
        num_cached = 0 if self.steps else 1
        self.hidden = self.look.run(draft.embed(token), hidden, tables, num_cached=num_cached)
        self.steps += 1
        return draft.logits(self.hidden)
