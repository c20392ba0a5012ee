"""Decoding with a Domino draft: a block in one pass, then token by token what corrects it."""

from __future__ import annotations

from typing import cast

import torch

from specforge_ext.methods._block.drafter import BlockDecoding
from specforge_ext.methods._drafter import check_depth, draw_tokens
from specforge_ext.methods.domino.model import DominoDraft
from specforge_ext.records import Proposal


class DominoDrafter(BlockDecoding):
    """`specforge_ext.methods.base.Drafter`."""

    def __init__(self, draft: DominoDraft, *, first: int) -> None:
        """first: slot that predicts the token after the last known one."""
        super().__init__(draft, name="domino")
        self._first = first

    @torch.no_grad()
    def propose(
        self, depth: int, *, temperature: float, generator: torch.Generator | None
    ) -> Proposal:
        """`depth` tokens a sequence. Each is drawn from logits that those before it correct, and
        probs [S, depth, V] are the distributions they are drawn from, given these.

        ValueError if depth is not in [0, the slots that predict], a sequence has no row, or the
        temperature is negative.
        """
        draft, first = cast("DominoDraft", self.draft), self._first
        most = draft.block_shape.block_size - first
        check_depth("domino", depth, most=most, what="slots that predict")
        hidden = self.states()[:, first : first + depth]
        logits, gru = draft.logits(hidden), draft.prefix_gru
        tokens = self.last_tokens.new_empty(hidden.shape[:2])
        probs = logits.new_empty(logits.shape, dtype=torch.float32) if temperature else None
        said, state = self.last_tokens, gru.initial(len(hidden))
        for k in range(depth):
            state = gru.advance(gru.gates(draft.embed(said)), state)
            final = draft.corrected(logits[:, k], hidden[:, k], state) if k else logits[:, 0]
            said, drawn_from = draw_tokens(final, temperature=temperature, generator=generator)
            tokens[:, k] = said
            if probs is not None and drawn_from is not None:
                probs[:, k] = drawn_from
        return Proposal(tokens, probs)
