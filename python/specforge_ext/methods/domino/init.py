"""Initial weights of what Domino adds to the backbone."""

from __future__ import annotations

import torch
from torch import nn

from specforge_ext.methods.domino.model import DominoDraft


@torch.no_grad()
def init_correction(draft: DominoDraft, *, seed: int) -> None:
    """A correction of zero, from a recurrence and a projection as torch makes them.

    The last matrix is zero: at first the draft says what its backbone does, and the backbone's
    gradient is its own. The same seed gives the same weights.
    """
    generator = torch.Generator().manual_seed(seed)
    for parameter, width in (
        (draft.prefix_gru.weight_ih_l0, draft.own_shape.gru_hidden_dim),
        (draft.prefix_gru.weight_hh_l0, draft.own_shape.gru_hidden_dim),
        (draft.project, draft.project.shape[1]),
    ):
        nn.init.uniform_(parameter, -(width**-0.5), width**-0.5, generator=generator)
    nn.init.zeros_(draft.correct)
