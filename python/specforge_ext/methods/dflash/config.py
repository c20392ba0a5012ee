"""Settings of DFlash."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator

from specforge_ext.methods._block.config import BlockConfig
from specforge_ext.methods._block.objective import DpaceKind


class DFlashConfig(BlockConfig):
    """DFlash (arXiv 2602.06036): slot k of a block predicts the token k after the anchor.

    dpace: weigh slots by what they are worth to the accepted length (D-PACE, arXiv 2605.18810)
        rather than by `gamma`, see `_block.objective.dpace_weight`; the loss is then divided by the
        number of samples. None: off.
    dpace_alpha: how little the draft's own confidence counts in it, 0 to 1.
    """

    dpace: DpaceKind | None = None
    dpace_alpha: Annotated[float, Field(ge=0, le=1)] = 0.5

    @model_validator(mode="after")
    def _one_weighting(self) -> Self:
        if self.dpace is not None and self.gamma is not None:
            raise ValueError(f"gamma: wanted none beside dpace, got {self.gamma}")
        return self
