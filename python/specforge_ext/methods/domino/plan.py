"""Which of a batch's predicted rows are corrected, from which state, and what they weigh."""

from __future__ import annotations

import torch
from torch import Tensor

from specforge_ext.methods._block.objective import slot_decay
from specforge_ext.methods._block.plan import Blocks
from specforge_ext.methods.domino.config import DominoConfig


class Corrections:
    """Of blocks with P predicted rows. Index tensors are int64 on the draft's device.

    plain, corrected: places among the P, ascending; together all of them. num_tokens: that the
    recurrence reads of each block, from its anchor on. states: of each corrected row, the place of
    the state it is given among those of all blocks, [A, num_tokens] flattened; state j has read
    j + 1 tokens. weight: [P] float32. base_share: of the loss without correction.

    Not a dataclass: FSDP2, which casts what a module is given to bfloat16, looks into those.
    """

    def __init__(
        self,
        *,
        plain: Tensor,
        corrected: Tensor,
        num_tokens: int,
        states: Tensor,
        weight: Tensor,
        base_share: float,
    ) -> None:
        self.plain = plain
        self.corrected = corrected
        self.num_tokens = num_tokens
        self.states = states
        self.weight = weight
        self.base_share = base_share


@torch.compiler.disable  # type: ignore[untyped-decorator]
def corrections(blocks: Blocks, config: DominoConfig, *, base_share: float) -> Corrections:
    """The state of slot k has read the tokens up to the one before that which slot k predicts."""
    first, size = config.first, config.block_size
    slots, device = blocks.slots, blocks.slots.device
    num_tokens = size - first
    is_corrected = slots > first
    corrected = is_corrected.nonzero()[:, 0]
    block = blocks.rows.index_select(0, corrected) // size
    decay = slot_decay(size, gamma=config.gamma, first=first).to(device)
    return Corrections(
        plain=(~is_corrected).nonzero()[:, 0],
        corrected=corrected,
        num_tokens=num_tokens,
        states=block * num_tokens + slots.index_select(0, corrected) - first,
        weight=decay.index_select(0, slots),
        base_share=base_share,
    )
