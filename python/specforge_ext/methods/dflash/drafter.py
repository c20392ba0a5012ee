"""Decoding with a DFlash draft: a whole block in one pass, its tokens drawn independently."""

from __future__ import annotations

import torch

from specforge_ext.methods._block.drafter import BlockDecoding
from specforge_ext.methods._drafter import check_depth, draw_tokens
from specforge_ext.methods.dflash.model import DFlashDraft
from specforge_ext.records import Proposal


class DFlashDrafter(BlockDecoding):
    """`specforge_ext.methods.base.Drafter`."""

    def __init__(self, draft: DFlashDraft) -> None:
        super().__init__(draft, name="dflash")

    @torch.no_grad()
    def propose(
        self, depth: int, *, temperature: float, generator: torch.Generator | None
    ) -> Proposal:
        """`depth` tokens a sequence. All slots of a block are computed, whatever the depth: they
        see each other. ValueError if depth is not in [0, block_size - 1], a sequence has no row, or
        the temperature is negative.
        """
        most = self.draft.block_shape.block_size - 1
        check_depth("dflash", depth, most=most, what="block_size - 1")
        logits = self.draft.logits(self.states()[:, 1 : depth + 1])
        tokens, probs = draw_tokens(logits, temperature=temperature, generator=generator)
        return Proposal(tokens, probs)
