"""EAGLE-3 as the layers above see it: `specforge_ext.methods.base.Method`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from specforge_ext.methods._common import as_draft
from specforge_ext.methods._drafter import ChainDrafter
from specforge_ext.methods._fused.init import init_from_target, init_random
from specforge_ext.methods._fused.shape import DraftShape, aux_layer_ids, fused_layout
from specforge_ext.methods._fused.vocab import most_scored
from specforge_ext.methods._fused.work import fused_work
from specforge_ext.methods._teacher import ScoredSums
from specforge_ext.methods.base import StepWork
from specforge_ext.methods.eagle3 import export
from specforge_ext.methods.eagle3.config import Eagle3Config
from specforge_ext.methods.eagle3.model import Eagle3Draft
from specforge_ext.methods.eagle3.objective import padded_positions
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


class Eagle3Method:
    """EAGLE-3 (arXiv 2503.01840) with exact row compaction."""

    name = "eagle3"
    Config = Eagle3Config

    def __init__(self, config: Eagle3Config) -> None:
        self.config = config

    def layout(self, target: TargetSpec) -> FeatureLayout:
        """`aux`: the residual streams fused by the draft; `last`: the last one, after the final
        norm.
        """
        return fused_layout(self.config, target)

    def build(self, weights: TargetWeights, vocab: DraftVocab, *, seed: int) -> Eagle3Draft:
        """A draft with fresh weights. ValueError if the vocabulary is not of the size asked for."""
        draft = Eagle3Draft(self.config, self._shape(weights.spec, vocab), weights, vocab)
        if self.config.warm_start == "target":
            init_from_target(draft, weights, vocab, seed=seed)
        else:
            init_random(draft, seed=seed)
        return draft.to(weights.embed_tokens.device)

    def vocab(self, prompts: Iterable[Prompt], target: TargetSpec) -> DraftVocab:
        """The `draft_vocab_size` tokens that these texts score most often."""
        return most_scored(prompts, target, self.config.draft_vocab_size)

    def shard_units(self, draft: nn.Module) -> Sequence[nn.Module]:
        """None: a layer is used at every step of the forward, so FSDP2 gathers it with the
        root.
        """
        return ()

    def recompute_units(self, draft: nn.Module) -> Sequence[nn.Module]:
        """The feed-forward blocks: most of what a step keeps, [rows, intermediate] three times."""
        return tuple(layer.mlp for layer in self._mine(draft).stack)

    def step(self, draft: nn.Module, batch: PackedBatch, at: StepContext) -> StepLoss:
        """Metrics [ttt_length]: see `ScoredSums`. Nothing is drawn, so `at` does not matter."""
        sums: ScoredSums = draft(
            batch.input_ids,
            batch.loss_mask,
            batch.positions,
            batch.features["aux"],
            batch.features["last"],
            batch.lengths,
        )
        return sums.as_step(self._weight(sums, batch))

    def drafter(self, draft: nn.Module) -> ChainDrafter:
        draft = self._mine(draft)
        return ChainDrafter(draft, name=self.name, feature="aux", vocab=draft.vocab)

    def export(
        self, draft: nn.Module, target: TargetSpec, *, dtype: torch.dtype
    ) -> DraftCheckpoint:
        """One checkpoint; where its layers are not the default ones, see
        `export.engine_configs`.
        """
        ids = aux_layer_ids(self.config, target)
        return export.to_checkpoint(self._mine(draft), target, aux_layer_ids=ids, dtype=dtype)

    def engine_configs(
        self, config: Mapping[str, object], target: TargetSpec
    ) -> Mapping[str, Mapping[str, object]]:
        """One directory for the layers that SGLang and vLLM take by default, else one each."""
        return export.engine_configs(config, num_target_layers=target.num_layers)

    def schema(
        self, config: Mapping[str, object]
    ) -> Mapping[str, tuple[tuple[int, ...], torch.dtype | None]]:
        return export.schema(config)

    def restore(self, checkpoint: DraftCheckpoint, weights: TargetWeights) -> Eagle3Draft:
        return export.from_checkpoint(checkpoint, weights, self.config)

    def work(
        self, target: TargetSpec, *, tokens: int, longest: int, itemsize: int, recompute: bool
    ) -> StepWork:
        """All tokens at each step of training-time test."""
        config = self.config
        return fused_work(
            config,
            target,
            num_layers=config.num_layers,
            tokens=tokens,
            rows=tokens * config.ttt_length,
            rows_at_once=tokens,
            itemsize=itemsize,
            recompute=recompute,
        )

    def _shape(self, target: TargetSpec, vocab: DraftVocab) -> DraftShape:
        shape = DraftShape.of(self.config, target, vocab)
        return shape if self.config.rope_scaling == "target" else replace(shape, rope_scaling=None)

    def _weight(self, sums: ScoredSums, batch: PackedBatch) -> Tensor:
        if self.config.denominator == "scored":
            return sums.loss.step_rows[0].float()
        padded = padded_positions(batch.lengths)
        return torch.tensor(float(padded), device=sums.labelled.device)

    def _mine(self, draft: nn.Module) -> Eagle3Draft:
        return as_draft(draft, Eagle3Draft, method=self.name)
