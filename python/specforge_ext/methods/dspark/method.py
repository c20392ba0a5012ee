"""DSpark as the layers above see it: `specforge_ext.methods.base.Method`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from specforge_ext.methods._block import export as block_export
from specforge_ext.methods._block.config import FEATURE
from specforge_ext.methods._block.init import init_from_target, init_random
from specforge_ext.methods._block.model import BlockShape
from specforge_ext.methods._block.objective import RATIOS, slot_metrics
from specforge_ext.methods._block.plan import Anchors, Blocks, draw, plan
from specforge_ext.methods._block.work import block_work
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
    Prompt,
    StepContext,
    StepLoss,
    TargetSpec,
    TargetWeights,
)


class DSparkMethod:
    """DSpark (arXiv 2607.05147)."""

    name = "dspark"
    Config = DSparkConfig

    def __init__(self, config: DSparkConfig) -> None:
        self.config = config

    def layout(self, target: TargetSpec) -> FeatureLayout:
        """`hidden`: the residual streams that the draft reads; `last`: the target's last state."""
        return dspark_layout(self.config, target)

    def build(self, weights: TargetWeights, vocab: DraftVocab, *, seed: int) -> DSparkDraft:
        """A draft with fresh weights, biases 0. ValueError unless the vocabulary is the whole."""
        if not vocab.is_full or vocab.size != weights.spec.vocab_size:
            raise ValueError(
                f"dspark: wanted the target's whole vocabulary of {weights.spec.vocab_size} (its "
                f"head is used), got {vocab.size} of {vocab.t2d.numel()}"
            )
        draft = DSparkDraft(BlockShape.of(self.config, weights), HeadShape.of(self.config), weights)
        init_random(draft, seed=seed)
        for name, parameter in draft.named_parameters():
            if name.endswith(".bias"):
                nn.init.zeros_(parameter)
        if self.config.warm_start == "target":
            init_from_target(draft, weights)
        return draft.to(weights.embed_tokens.device)

    def vocab(self, prompts: Iterable[Prompt], target: TargetSpec) -> DraftVocab:
        """The whole one."""
        return DraftVocab.full(target.vocab_size)

    def shard_units(self, draft: nn.Module) -> Sequence[nn.Module]:
        """The layers, each called once a micro-batch."""
        return tuple(_as_dspark(draft).layers)

    def recompute_units(self, draft: nn.Module) -> Sequence[nn.Module]:
        """The layers."""
        return tuple(_as_dspark(draft).layers)

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
        return DSparkDrafter(_as_dspark(draft), confidence_cut=self.config.confidence_cut)

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
        draft = _as_dspark(draft)
        config = block_export.backbone_config(
            draft.block_shape,
            self.config,
            target,
            method=self.name,
            architecture=export.ARCHITECTURE,
            dtype=dtype,
        )
        config |= export.head_config(draft.head_shape)
        return DraftCheckpoint(block_export.tensors_of(draft, dtype), config)

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
        shape = block_export.stored_shape(checkpoint.config, weights, self.config)
        heads = export.stored_heads(checkpoint.config, self.config)
        draft = DSparkDraft(shape, heads, weights)
        block_export.load_parameters(draft, checkpoint.tensors)
        return draft.to(weights.embed_tokens.device)


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


def _as_dspark(draft: nn.Module) -> DSparkDraft:
    if not isinstance(draft, DSparkDraft):
        raise TypeError(f"dspark: wanted a DSparkDraft, got {type(draft).__name__}")
    return draft
