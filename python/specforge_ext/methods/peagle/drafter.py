"""Parallel decoding with a P-EAGLE draft: all proposed tokens from one pass, as in training.

Legend of shapes: B sequences, K proposed tokens, F features' width, H hidden size, V / Vd
vocabularies.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from specforge_ext.methods.peagle.model import PEagleDraft
from specforge_ext.nn.stack_cache import StackCache
from specforge_ext.records import Proposal


@dataclass
class _State:
    """hidden [B, H], token [B], position [B]: the input of each sequence's last row."""

    cache: StackCache
    hidden: Tensor
    token: Tensor
    position: Tensor


class PEagleDrafter:
    """`specforge_ext.methods.base.Drafter`. Rejected columns stay in the cache as holes.

    A proposal's tokens do not depend on each other: the distribution at a depth is given the text
    alone.
    """

    def __init__(self, draft: PEagleDraft) -> None:
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
                f"peagle drafter: wanted at most {capacity} columns, "
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
        """`depth` tokens a sequence, at most num_depths, from one pass.

        ValueError if a sequence has no row, depth is more, or temperature < 0.
        """
        if temperature < 0:
            raise ValueError(f"temperature: wanted 0 or more, got {temperature}")
        if not 0 <= depth <= self.draft.config.num_depths:
            raise ValueError(
                f"depth: wanted 0 to {self.draft.config.num_depths}, the depths that the draft has "
                f"learnt (num_depths), got {depth}"
            )
        if depth == 0:
            return Proposal(tokens=self._started().token[:, None][:, :0], probs=None)
        logits = self.logits(depth)
        if temperature == 0:
            choice, probs = logits.argmax(-1), None
        else:
            p = torch.softmax(logits.float() / temperature, dim=-1)
            drawn = torch.multinomial(p.flatten(0, 1), 1, generator=generator)
            choice, probs = drawn.view(p.shape[:2]), self._over_target(p)
        return Proposal(tokens=choice + self.draft.d2t[choice], probs=probs)

    @torch.no_grad()
    def logits(self, depth: int) -> Tensor:
        """[B, depth, Vd]. ValueError if a sequence has no row."""
        state, draft = self._started(), self.draft
        empty = (~state.cache.used.any(1)).nonzero()[:, 0].tolist()
        if empty:
            raise ValueError(f"peagle drafter: sequences {empty} have no row to look ahead from")
        shape = (state.token.shape[0], depth - 1, -1)
        embedding = torch.cat(
            (draft.embed(state.token)[:, None], draft.mask_embedding().expand(*shape)), 1
        )
        hidden = torch.cat((state.hidden[:, None], draft.mask_state().expand(*shape)), 1)
        places = state.position[:, None] + torch.arange(depth, device=state.position.device)
        out = state.cache.look_ahead().run(
            embedding.flatten(0, 1),
            hidden.flatten(0, 1),
            draft.rope.tables(places.flatten()),
            num_cached=1,
        )
        return torch.unflatten(draft.logits(out), 0, (-1, depth))

    def _over_target(self, p: Tensor) -> Tensor:
        """Probabilities [B, K, Vd] over the draft's vocabulary -> [B, K, V], 0 elsewhere."""
        ids = torch.arange(p.shape[-1], device=p.device) + self.draft.d2t
        return p.new_zeros(*p.shape[:2], self.draft.shape.vocab_size).index_copy_(2, ids, p)

    def _started(self) -> _State:
        if self._state is None:
            raise ValueError("peagle drafter: wanted start() first")
        return self._state
