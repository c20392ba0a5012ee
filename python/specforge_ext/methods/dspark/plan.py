"""Which state of the target judges which row of a block.

Legend of shapes: P predicted rows, R teacher rows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from specforge_ext.methods._block.plan import Blocks


@dataclass(frozen=True)
class Teachers:
    """Blocks overlap, so a state of the target judges rows of several of them; it is used once.

    places: [R] int64, packed positions of the states, ascending; they have read all tokens before
    the predicted one, so the token at such a place is the last that a row's prediction is told.
    row_to_teacher: [P] int32 into them.
    """

    places: Tensor
    row_to_teacher: Tensor


@torch.compiler.disable  # type: ignore[untyped-decorator]
def with_teachers(blocks: Blocks) -> tuple[Blocks, Teachers]:
    """The blocks with their rows in the order of what they predict, and their teachers."""
    device = blocks.rows.device
    told = (blocks.labels.flatten().index_select(0, blocks.rows) - 1).cpu()
    order = torch.argsort(told, stable=True)
    places, of_row = torch.unique_consecutive(told[order], return_inverse=True)
    order = order.to(device)
    ordered = replace(
        blocks,
        rows=blocks.rows.index_select(0, order),
        slots=blocks.slots.index_select(0, order),
    )
    return ordered, Teachers(places.to(device), of_row.int().to(device))
