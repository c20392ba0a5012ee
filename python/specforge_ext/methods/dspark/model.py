"""The DSpark draft (arXiv 2607.05147): DFlash's backbone, a Markov head and a confidence head.

Legend of shapes: T tokens of a packed batch, P predicted rows, S sequences, F features' width, H
hidden size, Ht the target's, E rank, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from specforge_ext.methods._block.model import BlockBackbone, BlockShape
from specforge_ext.methods._block.objective import slot_decay
from specforge_ext.methods._block.plan import Blocks
from specforge_ext.methods.dspark.config import DSparkConfig, MarkovKind
from specforge_ext.methods.dspark.heads import ConfidenceHead, MarkovHead
from specforge_ext.methods.dspark.plan import Teachers
from specforge_ext.ops import RowLoss, two_head_loss
from specforge_ext.records import TargetWeights


@dataclass(frozen=True)
class HeadShape:
    """What the heads are made of. confidence: there is such a head."""

    kind: MarkovKind
    rank: int
    confidence: bool

    @classmethod
    def of(cls, config: DSparkConfig) -> HeadShape:
        return cls(config.markov_head, config.markov_rank, config.has_confidence)


@dataclass(frozen=True)
class Objective:
    """ce, l1, confidence: weights of the three terms. gamma: of `slot_decay`. Numbers and no tensor
    of row weights: FSDP2 rounds what it finds in a call's arguments to bfloat16.
    """

    ce: float
    l1: float
    confidence: float
    gamma: float | None

    def row_weight(self, blocks: Blocks) -> Tensor:
        """[P] float32."""
        decay = slot_decay(blocks.block_size, gamma=self.gamma, first=0)
        return decay.to(blocks.slots.device).index_select(0, blocks.slots)


class SparkLoss(NamedTuple):
    """loss_sum, weight_sum: [] float32, the first differentiable and with all weights in it.

    The others are of each row, [P], detached. loss: float32, without the row's weight. correct:
    bool, the first choices of draft and target agree. accepted: float32, chance that the target
    accepts a draw. foretold: float32, that chance by the confidence head, None without one.
    """

    loss_sum: Tensor
    weight_sum: Tensor
    loss: Tensor
    correct: Tensor
    accepted: Tensor
    foretold: Tensor | None


class DSparkDraft(BlockBackbone):
    """Parameters carry the names that engines load."""

    def __init__(self, shape: BlockShape, heads: HeadShape, weights: TargetWeights) -> None:
        super().__init__(shape, weights)
        self.head_shape = heads
        hidden = shape.layer.hidden_size
        self.markov_head = MarkovHead(
            heads.kind, vocab_size=shape.vocab_size, hidden_size=hidden, rank=heads.rank
        )
        self.confidence_head = (
            ConfidenceHead(hidden_size=hidden, rank=heads.rank) if heads.confidence else None
        )

    def forward(
        self,
        features: Tensor,
        last: Tensor,
        input_ids: Tensor,
        blocks: Blocks,
        teachers: Teachers,
        objective: Objective,
    ) -> SparkLoss:
        """features [T, F], last [T, Ht] after the final norm, input_ids [T] int64.

        blocks, teachers: of `plan.with_teachers`.
        """
        hidden = self.predicted(features, input_ids, blocks)
        told = input_ids.index_select(0, teachers.places)
        embedding = self.markov_head.embed(told.index_select(0, teachers.row_to_teacher))
        latent = self.markov_head.latents(hidden, embedding, blocks)
        head, weight = self.target_head, objective.row_weight(blocks)
        rows = two_head_loss(
            hidden,
            head,
            latent.to(head.dtype),
            self.markov_head.markov_w2.weight.to(head.dtype),
            last.index_select(0, teachers.places).to(head.dtype),
            head,
            # The kernel knows L1 + c CE.
            loss=RowLoss("l1", hard_weight=objective.ce / objective.l1),
            row_to_teacher=teachers.row_to_teacher,
            row_weight=weight * objective.l1,
            label=input_ids.index_select(0, teachers.places + 1).int() if objective.ce else None,
        )
        loss_sum, loss, foretold = rows.loss_sum, rows.loss * objective.l1, None
        if self.confidence_head is not None:
            logit = self.confidence_head(hidden, embedding)
            # Over the whole vocabulary `accepted` is 1 - L1 / 2.
            chance = rows.accepted.clamp(0, 1)
            error = F.binary_cross_entropy_with_logits(logit, chance, reduction="none")
            loss_sum = loss_sum + objective.confidence * (weight * error).sum()
            loss = loss + objective.confidence * error.detach()
            foretold = torch.sigmoid(logit.detach())
        weight_sum = weight.sum(dtype=torch.float64).float()
        return SparkLoss(loss_sum, weight_sum, loss, rows.correct, rows.accepted, foretold)

    def corrected(
        self, hidden: Tensor, base: Tensor, embedding: Tensor, state: Tensor
    ) -> tuple[Tensor, Tensor]:
        """A slot in decoding: its logits [S, V] and the next state [S, E].

        hidden [S, H], base [S, V] its logits by the target's head, embedding of the token before
        and state [S, E].
        """
        latent, state = self.markov_head.step(hidden, embedding, state)
        weight = self.markov_head.markov_w2.weight.to(base.dtype)
        return base + F.linear(latent.to(base.dtype), weight), state
