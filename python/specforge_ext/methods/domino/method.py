"""Domino as the layers above see it: `specforge_ext.methods.base.Method`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from specforge_ext.methods._block.config import FEATURE, feature_layout
from specforge_ext.methods._block.init import init_block
from specforge_ext.methods._block.method import BlockMethod
from specforge_ext.methods._block.model import BlockShape
from specforge_ext.methods._block.objective import RATIOS, slot_metrics
from specforge_ext.methods._block.plan import Anchors, Blocks, draw, plan
from specforge_ext.methods._block.work import block_work
from specforge_ext.methods._common import check_whole_vocab
from specforge_ext.methods.base import StepWork
from specforge_ext.methods.domino import export
from specforge_ext.methods.domino.config import DominoConfig
from specforge_ext.methods.domino.drafter import DominoDrafter
from specforge_ext.methods.domino.init import init_correction
from specforge_ext.methods.domino.model import DominoDraft, DominoLoss, DominoShape
from specforge_ext.methods.domino.plan import corrections
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

EPSILON = 1e-6
"""What SpecForge adds to a micro-batch's sum of weights."""


class DominoMethod(BlockMethod[DominoDraft]):
    """Domino (arXiv 2605.29707)."""

    name = "domino"
    Config = DominoConfig
    draft_type = DominoDraft

    def __init__(self, config: DominoConfig) -> None:
        self.config = config

    def layout(self, target: TargetSpec) -> FeatureLayout:
        """`hidden`: the residual streams that the draft reads."""
        return feature_layout(self.config, target)

    def build(self, weights: TargetWeights, vocab: DraftVocab, *, seed: int) -> DominoDraft:
        """A draft with fresh weights. ValueError unless the vocabulary is the whole one."""
        check_whole_vocab(vocab, weights.spec, method=self.name)
        own = DominoShape(self.config.gru_hidden_dim, self.config.emb_dim)
        draft = DominoDraft(BlockShape.of(self.config, weights), own, weights)
        init_block(draft, self.config, weights, seed=seed)
        init_correction(draft, seed=seed)
        return draft.to(weights.embed_tokens.device)

    def step(self, draft: nn.Module, batch: PackedBatch, at: StepContext) -> StepLoss:
        """Metrics of the slots that predict: those of `_block.objective.slot_metrics`, of the
        corrected logits, and base_loss, base_correct and base_accepted of the others.
        """
        anchors = draw(batch, at, num_anchors=self.config.num_anchors)
        return self.step_at(draft, batch, at, anchors)

    def step_at(
        self, draft: nn.Module, batch: PackedBatch, at: StepContext, anchors: Anchors
    ) -> StepLoss:
        """As `step`, with anchors of the caller's choice."""
        config = self.config
        blocks = plan(
            batch, anchors, block_size=config.block_size, first_label=int(config.shift_label)
        )
        own = corrections(blocks, config, base_share=config.base_share(at.step, at.total_steps))
        rows: DominoLoss = draft(batch.features[FEATURE], batch.input_ids, blocks, own)
        loss_sum, weight_sum = rows.loss_sum, own.weight.sum(dtype=torch.float64).float()
        if config.denominator == "micro_batch_mean":
            loss_sum, weight_sum = loss_sum / (weight_sum + EPSILON), torch.ones_like(weight_sum)
        return StepLoss(loss_sum, weight_sum, self._metrics(blocks, rows), BOTH_RATIOS)

    def drafter(self, draft: nn.Module) -> DominoDrafter:
        return DominoDrafter(self._mine(draft), first=self.config.first)

    @property
    def max_depth(self) -> int:
        """The slots that predict a token which is not known yet."""
        return self.config.block_size - self.config.first

    def work(
        self, target: TargetSpec, *, tokens: int, longest: int, itemsize: int, recompute: bool
    ) -> StepWork:
        """The backbone's; of a row the recurrence (candidate, gates, states) and the correction."""
        config = self.config
        backbone = block_work(
            config,
            target,
            tokens=tokens,
            longest=longest,
            itemsize=itemsize,
            recompute=recompute,
        )
        state, rank = config.gru_hidden_dim, config.emb_dim
        row = (8 * state + target.hidden_size + state + 3 * rank) * itemsize
        corrected = backbone.rows // config.block_size * (config.block_size - 1)
        return replace(
            backbone,
            saved_bytes=backbone.saved_bytes + corrected * row,
            head_bytes=4 * target.vocab_size * rank,
        )

    def export(
        self, draft: nn.Module, target: TargetSpec, *, dtype: torch.dtype
    ) -> DraftCheckpoint:
        return export.to_checkpoint(self._mine(draft), self.config, target, dtype=dtype)

    def engine_configs(
        self, config: Mapping[str, object], target: TargetSpec
    ) -> Mapping[str, Mapping[str, object]]:
        """One directory, for SGLang: vLLM 0.32 has no such projector."""
        return export.engine_configs(config)

    def schema(
        self, config: Mapping[str, object]
    ) -> Mapping[str, tuple[tuple[int, ...], torch.dtype | None]]:
        return export.schema(config)

    def restore(self, checkpoint: DraftCheckpoint, weights: TargetWeights) -> DominoDraft:
        return export.from_checkpoint(checkpoint, weights, self.config)

    def _metrics(self, blocks: Blocks, rows: DominoLoss) -> dict[str, Tensor]:
        first = self.config.first
        final = slot_metrics(blocks, rows.loss, rows.correct, first=first)
        base = slot_metrics(blocks, rows.base_loss, rows.base_correct, first=first)
        return final | {f"base_{name}": base[name] for name in RATIOS}


BOTH_RATIOS = RATIOS | {f"base_{name}": below for name, below in RATIOS.items()}
"""See StepLoss.ratios."""
