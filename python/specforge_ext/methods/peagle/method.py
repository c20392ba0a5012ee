"""P-EAGLE as the layers above see it: `specforge_ext.methods.base.Method`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from specforge_ext.methods._common import as_draft
from specforge_ext.methods._fused.init import init_from_target, init_random
from specforge_ext.methods._fused.shape import DraftShape, aux_layer_ids, fused_layout
from specforge_ext.methods._fused.vocab import most_scored
from specforge_ext.methods._fused.work import fused_work
from specforge_ext.methods._teacher import ScoredSums
from specforge_ext.methods.base import StepWork
from specforge_ext.methods.peagle import export
from specforge_ext.methods.peagle.config import PEagleConfig
from specforge_ext.methods.peagle.drafter import PEagleDrafter
from specforge_ext.methods.peagle.model import PEagleDraft
from specforge_ext.methods.peagle.plan import draw_chains
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


class PEagleMethod:
    """P-EAGLE (arXiv 2602.01469): EAGLE-3's layers, all depths in one pass."""

    name = "peagle"
    Config = PEagleConfig

    def __init__(self, config: PEagleConfig) -> None:
        self.config = config

    def layout(self, target: TargetSpec) -> FeatureLayout:
        """EAGLE-3's: `aux`, the residual streams that are fused; `last`, after the final norm."""
        return fused_layout(self.config, target)

    def build(self, weights: TargetWeights, vocab: DraftVocab, *, seed: int) -> PEagleDraft:
        """A draft with fresh weights; its embedding starts as the target's.

        ValueError if the vocabulary is not of the size asked for.
        """
        shape = DraftShape.of(self.config, weights.spec, vocab)
        draft = PEagleDraft(self.config, shape, weights, vocab)
        if self.config.warm_start == "target":
            init_from_target(draft, weights, vocab, seed=seed)
        else:
            init_random(draft, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            draft.embed_tokens.weight.copy_(weights.embed_tokens)
            nn.init.normal_(draft.mask_hidden, generator=generator)
        return draft.to(weights.embed_tokens.device)

    def vocab(self, prompts: Iterable[Prompt], target: TargetSpec) -> DraftVocab:
        """The `draft_vocab_size` tokens that these texts score most often."""
        return most_scored(prompts, target, self.config.draft_vocab_size)

    def shard_units(self, draft: nn.Module) -> Sequence[nn.Module]:
        """None: the layers' parts are called one by one, so FSDP2 gathers them with the root."""
        return ()

    def recompute_units(self, draft: nn.Module) -> Sequence[nn.Module]:
        """The feed-forward blocks: most of what a step keeps, [rows, intermediate] three times."""
        return tuple(layer.mlp for layer in self._mine(draft).stack)

    def step(self, draft: nn.Module, batch: PackedBatch, at: StepContext) -> StepLoss:
        """Metrics [num_depths]: see `ScoredSums`, over the rows that are drawn."""
        return self.step_with(draft, batch, draw_chains(batch, at, self.config))

    def step_with(self, draft: nn.Module, batch: PackedBatch, chains: Sequence[Tensor]) -> StepLoss:
        """As `step`, with chains of the caller's choice: anchors of depths 1..K-1, packed
        positions, ascending, int32, CPU; those of a depth are among those of the one before.
        """
        sums: ScoredSums = draft(
            batch.input_ids,
            batch.loss_mask,
            batch.positions,
            batch.features["aux"],
            batch.features["last"],
            batch.lengths,
            chains,
        )
        return sums.as_step(sums.loss.step_rows.sum().float())

    def drafter(self, draft: nn.Module) -> PEagleDrafter:
        return PEagleDrafter(self._mine(draft))

    def export(
        self, draft: nn.Module, target: TargetSpec, *, dtype: torch.dtype
    ) -> DraftCheckpoint:
        ids = aux_layer_ids(self.config, target)
        return export.to_checkpoint(self._mine(draft), target, aux_layer_ids=ids, dtype=dtype)

    def engine_configs(
        self, config: Mapping[str, object], target: TargetSpec
    ) -> Mapping[str, Mapping[str, object]]:
        """One directory, for vLLM: no other engine drafts in parallel."""
        return export.engine_configs(config)

    def schema(
        self, config: Mapping[str, object]
    ) -> Mapping[str, tuple[tuple[int, ...], torch.dtype | None]]:
        return export.schema(config)

    def restore(self, checkpoint: DraftCheckpoint, weights: TargetWeights) -> PEagleDraft:
        return export.from_checkpoint(checkpoint, weights, self.config)

    @property
    def max_depth(self) -> int:
        """The depths that the draft learns."""
        return self.config.num_depths

    def work(
        self, target: TargetSpec, *, tokens: int, longest: int, itemsize: int, recompute: bool
    ) -> StepWork:
        """All tokens at depth 0, and the share of them that each further depth draws."""
        config = self.config
        shares = [
            max(config.down_sample_ratio**d, config.down_sample_ratio_min)
            for d in range(config.num_depths)
        ]
        rows = math.ceil(tokens * sum(shares))
        return fused_work(
            config,
            target,
            num_layers=config.num_layers,
            tokens=tokens,
            rows=rows,
            rows_at_once=rows,
            itemsize=itemsize,
            recompute=recompute,
        )

    def _mine(self, draft: nn.Module) -> PEagleDraft:
        return as_draft(draft, PEagleDraft, method=self.name)
