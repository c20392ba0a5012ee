"""Decoding with a DSpark draft: a block in one pass, then its tokens one after another.

Legend of shapes: S sequences, K drafted tokens, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specforge_ext.methods._block.drafter import BlockDecoding
from specforge_ext.methods._drafter import check_depth, draw_tokens
from specforge_ext.methods.dspark.model import DSparkDraft
from specforge_ext.records import Proposal


class DSparkDrafter(BlockDecoding):
    """`specforge_ext.methods.base.Drafter`."""

    def __init__(self, draft: DSparkDraft, *, confidence_cut: float | None) -> None:
        super().__init__(draft, name="dspark")
        self._heads = draft
        self._cut = confidence_cut

    @torch.no_grad()
    def propose(
        self, depth: int, *, temperature: float, generator: torch.Generator | None
    ) -> Proposal:
        """`depth` tokens a sequence, each told the one before; fewer where the confidence falls
        below the cut. All slots of a block are computed, whatever the depth: they see each other.
        ValueError if depth is not in [0, block_size], a sequence has no row, or the temperature is
        negative.
        """
        draft, most = self._heads, self.draft.block_shape.block_size
        check_depth("dspark", depth, most=most, what="block_size")
        hidden = self.states()[:, :depth]
        token = self.last_tokens
        tokens, probs, confidence = [token[:, None][:, :0]], [], []
        state = draft.markov_head.first_state(token.shape[0])
        base = draft.logits(hidden)
        for k in range(depth):
            embedding = draft.markov_head.embed(token)
            if draft.confidence_head is not None and self._cut is not None:
                confidence.append(torch.sigmoid(draft.confidence_head(hidden[:, k], embedding)))
            logits, state = draft.corrected(hidden[:, k], base[:, k], embedding, state)
            token, drawn_from = draw_tokens(logits, temperature=temperature, generator=generator)
            tokens.append(token[:, None])
            if drawn_from is not None:
                probs.append(drawn_from)
        return Proposal(
            tokens=torch.cat(tokens, 1),
            probs=torch.stack(probs, 1) if probs else None,
            lengths=self._lengths(confidence),
        )

    def _lengths(self, confidence: list[Tensor]) -> Tensor | None:
        """[S] int64 of [S] at each slot: as long as their product does not fall below the cut."""
        if not confidence or self._cut is None:
            return None
        return (torch.stack(confidence, 1).cumprod(1) >= self._cut).long().sum(1)
