"""P-EAGLE as the layers above see it: `specforge_ext.methods.base.Method`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from specforge_ext.methods.base import StepWork
from specforge_ext.methods.eagle3.config import aux_layer_ids
from specforge_ext.methods.eagle3.init import init_from_target, init_random
from specforge_ext.methods.eagle3.model import DraftShape
from specforge_ext.methods.eagle3.vocab import build_draft_vocab, count_scored_tokens
from specforge_ext.methods.peagle import export
from specforge_ext.methods.peagle.config import PEagleConfig
from specforge_ext.methods.peagle.drafter import PEagleDrafter
from specforge_ext.methods.peagle.model import ChainSums, PEagleDraft
from specforge_ext.methods.peagle.plan import draw_chains
from specforge_ext.nn.layer import LayerShape
from specforge_ext.nn.saved import fused_stack_bytes, mlp_bytes
from specforge_ext.records import (
    DraftCheckpoint,
    DraftVocab,
    FeatureLayout,
    FeatureSpec,
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
        ids = aux_layer_ids(self.config, target)
        width = target.hidden_size
        aux = FeatureSpec("aux", ids, width * len(ids), target.dtype)
        last = FeatureSpec("last", (target.num_layers,), width, target.dtype, final_norm=True)
        return FeatureLayout((aux, last))

    def build(self, weights: TargetWeights, vocab: DraftVocab, *, seed: int) -> PEagleDraft:
        """A draft with fresh weights; its embedding starts as the target's.

        ValueError if the vocabulary is not of the size asked for.
        """
        wanted = self.config.draft_vocab_size or weights.spec.vocab_size
        if vocab.size != wanted or vocab.t2d.numel() != weights.spec.vocab_size:
            raise ValueError(
                f"draft_vocab_size: wanted {wanted} of the target's {weights.spec.vocab_size}, "
                f"got a vocabulary of {vocab.size} of {vocab.t2d.numel()}"
            )
        draft = PEagleDraft(self.config, self._shape(weights.spec, vocab), weights, vocab)
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
        counts = count_scored_tokens(prompts, vocab_size=target.vocab_size)
        return build_draft_vocab(counts, self.config.draft_vocab_size)

    def shard_units(self, draft: nn.Module) -> Sequence[nn.Module]:
        """None: the layers' parts are called one by one, so FSDP2 gathers them with the root."""
        return ()

    def recompute_units(self, draft: nn.Module) -> Sequence[nn.Module]:
        """The feed-forward blocks: most of what a step keeps, [rows, intermediate] three times."""
        return tuple(layer.mlp for layer in _as_peagle(draft).stack)

    def step(self, draft: nn.Module, batch: PackedBatch, at: StepContext) -> StepLoss:
        """Metrics [num_depths]: loss, accepted, correct (sums over `rows`, the scored rows), rows,
        scored (the drawn rows whose loss mask is 1).
        """
        return self.step_with(draft, batch, draw_chains(batch, at, self.config))

    def step_with(self, draft: nn.Module, batch: PackedBatch, chains: Sequence[Tensor]) -> StepLoss:
        """As `step`, with chains of the caller's choice: anchors of depths 1..K-1, packed
        positions, ascending, int32, CPU; those of a depth are among those of the one before.
        """
        sums: ChainSums = draft(
            batch.input_ids,
            batch.loss_mask,
            batch.positions,
            batch.features["aux"],
            batch.features["last"],
            batch.lengths,
            chains,
        )
        loss = sums.loss
        return StepLoss(
            loss_sum=loss.loss_sum,
            weight_sum=loss.step_rows.sum().float(),
            metrics={
                "loss": loss.step_loss.double(),
                "accepted": loss.step_accepted.double(),
                "correct": loss.step_correct.double(),
                "rows": loss.step_rows.double(),
                "scored": sums.labelled,
            },
            ratios={"loss": "rows", "accepted": "rows", "correct": "scored"},
        )

    def drafter(self, draft: nn.Module) -> PEagleDrafter:
        return PEagleDrafter(_as_peagle(draft))

    def export(
        self, draft: nn.Module, target: TargetSpec, *, dtype: torch.dtype
    ) -> DraftCheckpoint:
        ids = aux_layer_ids(self.config, target)
        return export.to_checkpoint(_as_peagle(draft), target, aux_layer_ids=ids, dtype=dtype)

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
        config, shape = self.config, self._layer_shape(target)
        shares = [
            max(config.down_sample_ratio**d, config.down_sample_ratio_min)
            for d in range(config.num_depths)
        ]
        rows = math.ceil(tokens * sum(shares))
        row = fused_stack_bytes(shape, itemsize, num_layers=config.num_layers, recompute=recompute)
        fused = tokens * target.hidden_size * len(aux_layer_ids(config, target)) * itemsize
        again = rows * mlp_bytes(shape, itemsize) if recompute else 0
        return StepWork(
            rows=rows,
            saved_bytes=rows * row + fused + again,
            logits_vocab=target.vocab_size,
            head_bytes=4 * (config.draft_vocab_size or target.vocab_size) * target.hidden_size,
        )

    def _layer_shape(self, target: TargetSpec) -> LayerShape:
        config = self.config
        return LayerShape(
            hidden_size=target.hidden_size,
            intermediate_size=config.intermediate_size or target.intermediate_size,
            num_heads=config.num_heads or target.num_heads,
            num_kv_heads=config.num_kv_heads or target.num_kv_heads,
            head_dim=config.head_dim or target.head_dim,
            rms_norm_eps=target.rms_norm_eps,
        )

    def _shape(self, target: TargetSpec, vocab: DraftVocab) -> DraftShape:
        config = self.config
        ids = aux_layer_ids(config, target)
        return DraftShape(
            layer=self._layer_shape(target),
            features_width=target.hidden_size * len(ids),
            num_features=len(ids),
            vocab_size=target.vocab_size,
            draft_vocab_size=vocab.size,
            rope_theta=target.rope_theta,
            rope_scaling=target.rope_scaling,
        )


def _as_peagle(draft: nn.Module) -> PEagleDraft:
    if not isinstance(draft, PEagleDraft):
        raise TypeError(f"peagle: wanted a PEagleDraft, got {type(draft).__name__}")
    return draft
