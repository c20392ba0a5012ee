"""Chain decoding with a layer for multi-token prediction, the same computation as in training.

Legend of shapes: B sequences, n new columns, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from specforge_ext.methods.mtp.model import MtpDraft
from specforge_ext.nn.stack_cache import StackCache
from specforge_ext.records import Proposal


@dataclass
class _State:
    """hidden [B, H], token [B], position [B]: the input of each sequence's last row."""

    cache: StackCache
    hidden: Tensor
    token: Tensor
    position: Tensor


class MtpDrafter:
    """`specforge_ext.methods.base.Drafter`. Rejected columns stay in the cache as holes."""

    def __init__(self, draft: MtpDraft) -> None:
        self.draft = draft
        self._state: _State | None = None

    @torch.no_grad()
    def start(self, num_sequences: int, capacity: int) -> None:
        """Forget everything; make room for `capacity` columns a sequence."""
        shape, weight = self.draft.shape.layer, self.draft.fuse.weight
        integers = torch.zeros(num_sequences, dtype=torch.int64, device=weight.device)
        self._state = _State(
            cache=StackCache((self.draft.layer,), shape, num_sequences, capacity),
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
        """next_tokens, positions [B, n] int64, features["last"] [B, n, H], valid [B, n] bool.

        ValueError when the columns do not fit. What stands in columns that are not valid is not
        used.
        """
        state, draft = self._started(), self.draft
        capacity = state.cache.used.shape[1]
        end = state.cache.num_columns + valid.shape[1]
        if end > capacity:
            raise ValueError(
                f"mtp drafter: wanted at most {capacity} columns, "
                f"the capacity given to start, got {end}"
            )
        rows, columns = valid.nonzero(as_tuple=True)
        tokens, places = next_tokens[rows, columns], positions[rows, columns]
        hidden = features["last"][rows, columns]
        stream = draft.stream(tokens, hidden, places)
        state.cache.add(valid, stream, stream, draft.rope.tables(places))
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
            raise ValueError(f"mtp drafter: sequences {empty} have no row to look ahead from")
        look = _LookAhead(self.draft, state)
        token, tokens, probs = state.token, [], []
        for _ in range(depth):
            logits = look.step(token)
            if temperature == 0:
                token = logits.argmax(-1)
            else:
                p = torch.softmax(logits.float() / temperature, dim=-1)
                token = torch.multinomial(p, 1, generator=generator)[:, 0]
                probs.append(p)
            tokens.append(token)
        return Proposal(
            tokens=torch.stack(tokens, 1) if tokens else state.token[:, None][:, :0],
            probs=torch.stack(probs, 1) if probs else None,
        )

    @torch.no_grad()
    def logits_along(self, tokens: Tensor) -> Tensor:
        """Logits [B, K, V] of the look-ahead whose first K - 1 tokens [B, K - 1] are given."""
        state = self._started()
        look = _LookAhead(self.draft, state)
        given = [state.token, *tokens.unbind(1)]
        return torch.stack([look.step(token) for token in given], 1)

    def _started(self) -> _State:
        if self._state is None:
            raise ValueError("mtp drafter: wanted start() first")
        return self._state


class _LookAhead:
    """The last row of each sequence, step by step; its own keys vanish with it."""

    def __init__(self, draft: MtpDraft, state: _State) -> None:
        self.draft = draft
        self.look = state.cache.look_ahead()
        self.hidden = state.hidden
        self.position = state.position
        self.steps = 0

    def step(self, token: Tensor) -> Tensor:
        """Logits [B, V] of the row whose next input token [B] is given."""
        draft, place = self.draft, self.position + self.steps
        stream = draft.stream(token, self.hidden, place)
        num_cached = 0 if self.steps else 1
        out = self.look.run(stream, stream, draft.rope.tables(place), num_cached=num_cached)
        self.hidden = draft.output_norm(out)
        self.steps += 1
        return draft.logits(self.hidden)
