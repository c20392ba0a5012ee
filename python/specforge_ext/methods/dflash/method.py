"""DFlash as the layers above see it: `specforge_ext.methods.base.Method`."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from specforge_ext.methods._block.config import FEATURE, feature_layout
from specforge_ext.methods._block.export import backbone_config, backbone_schema, stored_shape
from specforge_ext.methods._block.init import init_block
from specforge_ext.methods._block.method import BlockMethod
from specforge_ext.methods._block.model import BlockShape
from specforge_ext.methods._block.objective import (
    RATIOS,
    dpace_weight,
    slot_decay,
    slot_metrics,
)
from specforge_ext.methods._block.plan import Anchors, Blocks, draw, plan
from specforge_ext.methods._block.work import block_work
from specforge_ext.methods._common import check_whole_vocab
from specforge_ext.methods._export import load_parameters, parameters_of
from specforge_ext.methods.base import StepWork
from specforge_ext.methods.dflash.config import DFlashConfig
from specforge_ext.methods.dflash.drafter import DFlashDrafter
from specforge_ext.methods.dflash.model import DFlashDraft
from specforge_ext.ops import LabelLoss
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

ARCHITECTURE = "DFlashDraftModel"


class DFlashMethod(BlockMethod[DFlashDraft]):
    """DFlash (arXiv 2602.06036), with D-PACE (arXiv 2605.18810) as an option."""

    name = "dflash"
    Config = DFlashConfig
    draft_type = DFlashDraft

    def __init__(self, config: DFlashConfig) -> None:
        self.config = config

    def layout(self, target: TargetSpec) -> FeatureLayout:
        """`hidden`: the residual streams that the draft reads."""
        return feature_layout(self.config, target)

    def build(self, weights: TargetWeights, vocab: DraftVocab, *, seed: int) -> DFlashDraft:
        """A draft with fresh weights. ValueError unless the vocabulary is the whole one."""
        check_whole_vocab(vocab, weights.spec, method=self.name)
        draft = DFlashDraft(BlockShape.of(self.config, weights), weights)
        init_block(draft, self.config, weights, seed=seed)
        return draft.to(weights.embed_tokens.device)

    def step(self, draft: nn.Module, batch: PackedBatch, at: StepContext) -> StepLoss:
        """Metrics [block_size - 1]: see `_block.objective.slot_metrics`."""
        return self.step_at(draft, batch, draw(batch, at, num_anchors=self.config.num_anchors))

    def step_at(self, draft: nn.Module, batch: PackedBatch, anchors: Anchors) -> StepLoss:
        """As `step`, with anchors of the caller's choice."""
        blocks = plan(batch, anchors, block_size=self.config.block_size, first_label=0)
        rows: LabelLoss = draft(batch.features[FEATURE], batch.input_ids, blocks)
        weight = self._row_weight(blocks, rows.loss)
        if self.config.dpace is None:
            total = weight.sum(dtype=torch.float64).float()
        else:
            total = weight.new_tensor(float(len(batch.lengths)))
        return StepLoss(
            loss_sum=(weight * rows.loss).sum(),
            weight_sum=total,
            metrics=slot_metrics(blocks, rows.loss.detach(), rows.correct, first=1),
            ratios=RATIOS,
        )

    def drafter(self, draft: nn.Module) -> DFlashDrafter:
        return DFlashDrafter(self._mine(draft))

    def export(
        self, draft: nn.Module, target: TargetSpec, *, dtype: torch.dtype
    ) -> DraftCheckpoint:
        """One checkpoint for every engine."""
        draft = self._mine(draft)
        config = backbone_config(
            draft.block_shape,
            self.config,
            target,
            method=self.name,
            architecture=ARCHITECTURE,
            dtype=dtype,
        )
        return DraftCheckpoint(parameters_of(draft, dtype), config)

    def engine_configs(
        self, config: Mapping[str, object], target: TargetSpec
    ) -> Mapping[str, Mapping[str, object]]:
        """One directory: target_layer_ids mean the same in every engine."""
        return {"": dict(config)}

    def schema(
        self, config: Mapping[str, object]
    ) -> Mapping[str, tuple[tuple[int, ...], torch.dtype | None]]:
        return backbone_schema(config)

    def restore(self, checkpoint: DraftCheckpoint, weights: TargetWeights) -> DFlashDraft:
        shape = stored_shape(checkpoint.config, weights, self.config)
        draft = DFlashDraft(shape, weights)
        load_parameters(draft, checkpoint.tensors)
        return draft.to(weights.embed_tokens.device)

    @property
    def max_depth(self) -> int:
        """All slots of a block but the first, which holds the last known token."""
        return self.config.block_size - 1

    def work(
        self, target: TargetSpec, *, tokens: int, longest: int, itemsize: int, recompute: bool
    ) -> StepWork:
        """Blocks of block_size rows at up to num_anchors places a sample."""
        return block_work(
            self.config,
            target,
            tokens=tokens,
            longest=longest,
            itemsize=itemsize,
            recompute=recompute,
        )

    def _row_weight(self, blocks: Blocks, loss: Tensor) -> Tensor:
        """[P] float32."""
        config = self.config
        if config.dpace is None:
            decay = slot_decay(config.block_size, gamma=config.gamma, first=1)
            return decay.to(loss.device).index_select(0, blocks.slots)
        weight = dpace_weight(
            blocks.by_block(loss.detach()),
            blocks.supervised,
            alpha=config.dpace_alpha,
            kind=config.dpace,
        )
        return weight.flatten().index_select(0, blocks.rows)
