"""DSpark as the layers above see it: `specforge_ext.methods.base.Method`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from specforge_ext.methods._block.config import FEATURE
from specforge_ext.methods._block.init import init_block
from specforge_ext.methods._block.method import BlockMethod
from specforge_ext.methods._block.model import BlockShape
from specforge_ext.methods._block.objective import RATIOS, slot_metrics
from specforge_ext.methods._block.plan import Anchors, Blocks, draw, plan
from specforge_ext.methods._block.work import block_work
from specforge_ext.methods._common import check_whole_vocab
from specforge_ext.methods.base import StepWork
from specforge_ext.methods.dspark import export
from specforge_ext.methods.dspark.config import TEACHER, DSparkConfig, dspark_layout
from specforge_ext.methods.dspark.drafter import DSparkDrafter
from specforge_ext.methods.dspark.model import DSparkDraft, HeadShape, Objective, SparkLoss
from specforge_ext.methods.dspark.plan import with_teachers
from specforge_ext.records import (
    DraftCheckpoint,
    DraftVocab,
    FeatureLayout,
    PackedBatch,
    StepContext,
    StepLoss,
    TargetSpec,
    TargetWeights,
)


class DSparkMethod(BlockMethod[DSparkDraft]):
    """DSpark (arXiv 2607.05147)."""

    name = "dspark"
    Config = DSparkConfig
    draft_type = DSparkDraft

    def __init__(self, config: DSparkConfig) -> None:
        self.config = config

    def layout(self, target: TargetSpec) -> FeatureLayout:
        """`hidden`: the residual streams that the draft reads; `last`: the target's last state."""
        return dspark_layout(self.config, target)

    def build(self, weights: TargetWeights, vocab: DraftVocab, *, seed: int) -> DSparkDraft:
        """A draft with fresh weights, biases 0. ValueError unless the vocabulary is the whole."""
        check_whole_vocab(vocab, weights.spec, method=self.name)
        draft = DSparkDraft(BlockShape.of(self.config, weights), HeadShape.of(self.config), weights)
        init_block(draft, self.config, weights, seed=seed)
        return draft.to(weights.embed_tokens.device)

    def step(self, draft: nn.Module, batch: PackedBatch, at: StepContext) -> StepLoss:
        """Metrics [block_size]: see `_block.objective.slot_metrics`, where a token counts as
        correct if it is the target's first choice, and `_chances`.
        """
        return self.step_at(draft, batch, draw(batch, at, num_anchors=self.config.num_anchors))

    def step_at(self, draft: nn.Module, batch: PackedBatch, anchors: Anchors) -> StepLoss:
        """As `step`, with anchors of the caller's choice."""
        config = self.config
        blocks, teachers = with_teachers(
            plan(batch, anchors, block_size=config.block_size, first_label=1, stops_at_gap=True)
        )
        rows: SparkLoss = draft(
            batch.features[FEATURE],
            batch.features[TEACHER],
            batch.input_ids,
            blocks,
            teachers,
            Objective(config.ce_weight, config.l1_weight, config.confidence_weight, config.gamma),
        )
        metrics = slot_metrics(blocks, rows.loss, rows.correct, first=0)
        chances = _chances(blocks, rows)
        return StepLoss(
            loss_sum=rows.loss_sum,
            weight_sum=rows.weight_sum,
            metrics={**metrics, **chances},
            ratios={**RATIOS, **{name: _CHANCE_RATIOS[name] for name in chances}},
        )

    def drafter(self, draft: nn.Module) -> DSparkDrafter:
        return DSparkDrafter(self._mine(draft), confidence_cut=self.config.confidence_cut)

    @property
    def max_depth(self) -> int:
        """A token from every slot of a block."""
        return self.config.block_size

    def work(
        self, target: TargetSpec, *, tokens: int, longest: int, itemsize: int, recompute: bool
    ) -> StepWork:
        """The backbone's, and of a row what the heads read."""
        config = self.config
        backbone = block_work(
            config,
            target,
            tokens=tokens,
            longest=longest,
            itemsize=itemsize,
            recompute=recompute,
        )
        rank = config.markov_rank
        joined = target.hidden_size + rank
        per_row = {"vanilla": 0, "gated": joined + 2 * rank, "rnn": joined + 10 * rank}
        row = (per_row[config.markov_head] + 2 * rank + config.has_confidence * joined) * itemsize
        return replace(
            backbone,
            saved_bytes=backbone.saved_bytes + backbone.rows * row,
            head_bytes=4 * target.vocab_size * rank,
        )

    def export(
        self, draft: nn.Module, target: TargetSpec, *, dtype: torch.dtype
    ) -> DraftCheckpoint:
        """One checkpoint for every engine."""
        return export.to_checkpoint(self._mine(draft), self.config, target, dtype=dtype)

    def engine_configs(
        self, config: Mapping[str, object], target: TargetSpec
    ) -> Mapping[str, Mapping[str, object]]:
        """One directory: target_layer_ids mean the same in every engine."""
        return {"": dict(config)}

    def schema(
        self, config: Mapping[str, object]
    ) -> Mapping[str, tuple[tuple[int, ...], torch.dtype | None]]:
        return export.schema(config)

    def restore(self, checkpoint: DraftCheckpoint, weights: TargetWeights) -> DSparkDraft:
        return export.from_checkpoint(checkpoint, weights, self.config)


_CHANCE_RATIOS = {"acceptance": "rows", "reached": "blocks", "foretold_error": "rows"}


@torch.no_grad()
def _chances(blocks: Blocks, rows: SparkLoss) -> dict[str, Tensor]:
    """Sums per slot, [block_size] float64, of the target's view of draws from the draft.

    `acceptance`: chance that the slot's is accepted if those before it were; `reached`: product of
    these up to and with the slot: the sum of its ratios is the length accepted in sampling from a
    uniform anchor, without the bonus token. `foretold_error`: by how much the confidence head is
    off.
    """
    acceptance = blocks.by_block(rows.accepted.double())
    sums = {"acceptance": acceptance.sum(0), "reached": acceptance.cumprod(1).sum(0)}
    if rows.foretold is not None:
        error = (rows.foretold - rows.accepted).abs()
        sums["foretold_error"] = blocks.by_block(error.double()).sum(0)
    return sums
