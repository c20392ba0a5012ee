"""Settings of Domino."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from specforge_ext.methods._block.config import BlockConfig, Positive


class DominoConfig(BlockConfig):
    """Domino (arXiv 2605.29707): a block draft whose logits are corrected by what was said before.

    The first predicted slot of a block is not corrected; engines want it so.

    shift_label: slot k of the block predicts the token k + 1 after the anchor, slot 0 too; off: the
        token k after it, as DFlash.
    gru_hidden_dim: width of the recurrent state that reads the block's tokens.
    emb_dim: rank of the correction, the larger part of what is trained: [vocabulary, emb_dim].
    lambda_start, lambda_decay_ratio: the share of the uncorrected loss falls linearly from
        lambda_start to 0 over the first lambda_decay_ratio of the run's steps.
    denominator: what the loss is divided by. "rows": the weights of all rows, over all
        micro-batches and ranks. "micro_batch_mean": each micro-batch's by its own weights, and then
        by the number of micro-batches, as SpecForge has it: what is learned then depends on what is
        packed together, and a micro-batch without a scored row counts as one of loss 0.
    """

    shift_label: bool = False
    gru_hidden_dim: Positive = 1024
    emb_dim: Positive = 256
    lambda_start: Annotated[float, Field(ge=0, le=1)] = 1.0
    lambda_decay_ratio: Annotated[float, Field(ge=0, le=1)] = 0.5
    denominator: Literal["rows", "micro_batch_mean"] = "rows"

    @property
    def first(self) -> int:
        """The first slot that predicts; the next one is the first whose logits are corrected."""
        return 0 if self.shift_label else 1

    def base_share(self, step: int, total_steps: int) -> float:
        """Of the loss without correction, at a step of the run: 0 to 1."""
        until = max(1, int(total_steps * self.lambda_decay_ratio))
        return self.lambda_start * (1 - min(step / until, 1))
