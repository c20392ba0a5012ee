"""Settings of DSpark, and what of a target it depends on."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from specforge_ext.methods._block.config import BlockConfig, feature_layout
from specforge_ext.records import FeatureLayout, FeatureSpec, TargetSpec

MarkovKind = Literal["vanilla", "gated", "rnn"]

TEACHER = "last"
"""Name of the target's last state, after the final norm, in samples and batches."""


class DSparkConfig(BlockConfig):
    """DSpark (arXiv 2607.05147): slot k of a block predicts the token k + 1 after the anchor, and
    every token is told the one before it.

    markov_rank: width of the correction by the token before.
    markov_head: what becomes of that token's embedding m before it corrects the logits. "vanilla":
        nothing; "gated": sigmoid(gate(hidden, m)) * m; "rnn": a state goes along the block.
    ce_weight, l1_weight: of cross entropy (labels) and of the L1 distance to the target.
    confidence_weight: of the head that foretells the chance to be accepted; 0: there is none.
    confidence_cut: in decoding, tokens whose chance to be accepted, by that head and with all
        before them, is below it are not proposed, 0 to 1; None: all are.
    """

    markov_rank: Annotated[int, Field(gt=0)] = 256
    markov_head: MarkovKind = "vanilla"
    ce_weight: Annotated[float, Field(ge=0)] = 0.1
    l1_weight: Annotated[float, Field(gt=0)] = 0.9
    confidence_weight: Annotated[float, Field(ge=0)] = 1.0
    confidence_cut: Annotated[float, Field(ge=0, le=1)] | None = None

    @model_validator(mode="after")
    def _cut_has_a_head(self) -> Self:
        if self.confidence_cut is not None and not self.has_confidence:
            raise ValueError(
                "confidence_cut: wanted none where confidence_weight is 0 (there is no head), "
                f"got {self.confidence_cut}"
            )
        return self

    @property
    def has_confidence(self) -> bool:
        return self.confidence_weight > 0


def dspark_layout(config: DSparkConfig, target: TargetSpec) -> FeatureLayout:
    """`hidden`: the residual streams that the draft reads; `last`: the last one, after the final
    norm, from which the target's own distribution follows.
    """
    width = target.hidden_size
    last = FeatureSpec(TEACHER, (target.num_layers,), width, target.dtype, final_norm=True)
    return FeatureLayout((*feature_layout(config, target).features, last))
