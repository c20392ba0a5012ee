"""Parallel decoding with a P-EAGLE draft: all proposed tokens from one pass, as in training.

Legend of shapes: B sequences, K proposed tokens, Vd the draft's vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specforge_ext.methods._drafter import (
    StackDecoding,
    check_depth,
    check_temperature,
    draw_tokens,
)
from specforge_ext.methods.peagle.model import PEagleDraft
from specforge_ext.records import Proposal


class PEagleDrafter(StackDecoding):
    """`specforge_ext.methods.base.Drafter`.

    A proposal's tokens do not depend on each other: the distribution at a depth is given the text
    alone.
    """

    def __init__(self, draft: PEagleDraft) -> None:
        super().__init__(draft, name="peagle", feature="aux", vocab=draft.vocab)
        self._draft = draft

    @torch.no_grad()
    def propose(
        self, depth: int, *, temperature: float, generator: torch.Generator | None
    ) -> Proposal:
        """`depth` tokens a sequence, at most num_depths, from one pass.

        ValueError if a sequence has no row, depth is more, or temperature < 0.
        """
        check_temperature(temperature)
        check_depth("peagle", depth, most=self._draft.config.num_depths, what="num_depths")
        if depth == 0:
            return Proposal(self.last_rows().token[:, None][:, :0], None)
        tokens, probs = draw_tokens(
            self.logits(depth), temperature=temperature, generator=generator, vocab=self._vocab
        )
        return Proposal(tokens, probs)

    @torch.no_grad()
    def logits(self, depth: int) -> Tensor:
        """[B, depth, Vd]. ValueError if a sequence has no row."""
        rows, draft = self.last_rows(), self._draft
        shape = (rows.token.shape[0], depth - 1, -1)
        embedding = torch.cat(
            (draft.embed(rows.token)[:, None], draft.mask_embedding().expand(*shape)), 1
        )
        hidden = torch.cat((rows.hidden[:, None], draft.mask_state().expand(*shape)), 1)
        places = rows.position[:, None] + torch.arange(depth, device=rows.position.device)
        out = rows.cache.look_ahead().run(
            embedding.flatten(0, 1),
            hidden.flatten(0, 1),
            draft.rope.tables(places.flatten()),
            num_cached=1,
        )
        return torch.unflatten(draft.logits(out), 0, (-1, depth))
