"""EAGLE-3 as the layers above see it: `specforge_ext.methods.base.Method`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from specforge_ext.methods.base import StepWork
from specforge_ext.methods.eagle3 import export
from specforge_ext.methods.eagle3.config import Eagle3Config, aux_layer_ids
from specforge_ext.methods.eagle3.drafter import Eagle3Drafter
from specforge_ext.methods.eagle3.init import init_from_target, init_random
from specforge_ext.methods.eagle3.model import DraftShape, Eagle3Draft, TttSums
from specforge_ext.methods.eagle3.objective import padded_positions
from specforge_ext.methods.eagle3.vocab import build_draft_vocab, count_scored_tokens
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
        ids = aux_layer_ids(self.config, target)
        width = target.hidden_size
        aux = FeatureSpec("aux", ids, width * len(ids), target.dtype)
        last = FeatureSpec("last", (target.num_layers,), width, target.dtype, final_norm=True)
        return FeatureLayout((aux, last))

    def build(self, weights: TargetWeights, vocab: DraftVocab, *, seed: int) -> Eagle3Draft:
        """A draft with fresh weights. ValueError if the vocabulary is not of the size asked for."""
        wanted = self.config.draft_vocab_size or weights.spec.vocab_size
        if vocab.size != wanted or vocab.t2d.numel() != weights.spec.vocab_size:
            raise ValueError(
                f"draft_vocab_size: wanted {wanted} of the target's {weights.spec.vocab_size}, "
                f"got a vocabulary of {vocab.size} of {vocab.t2d.numel()}"
            )
        draft = Eagle3Draft(self.config, self._shape(weights.spec, vocab), weights, vocab)
        if self.config.warm_start == "target":
            init_from_target(draft, weights, vocab, seed=seed)
        else:
            init_random(draft, seed=seed)
        return draft.to(weights.embed_tokens.device)

    def vocab(self, prompts: Iterable[Prompt], target: TargetSpec) -> DraftVocab:
        """The `draft_vocab_size` tokens that these texts score most often."""
        counts = count_scored_tokens(prompts, vocab_size=target.vocab_size)
        return build_draft_vocab(counts, self.config.draft_vocab_size)

    def shard_units(self, draft: nn.Module) -> Sequence[nn.Module]:
        """None: a layer is used at every step of the forward, so FSDP2 gathers it with the
        root.
        """
        return ()

    def recompute_units(self, draft: nn.Module) -> Sequence[nn.Module]:
        """The feed-forward blocks: most of what a step keeps, [rows, intermediate] three times."""
        return tuple(layer.mlp for layer in _as_eagle3(draft).stack)

    def step(self, draft: nn.Module, batch: PackedBatch, at: StepContext) -> StepLoss:
        """Metrics [L]: loss, accepted (sums over `rows`), correct (over `scored`: loss mask 1),
        rows, scored. Nothing is drawn, so `at` does not matter.
        """
        sums: TttSums = draft(
            batch.input_ids,
            batch.loss_mask,
            batch.positions,
            batch.features["aux"],
            batch.features["last"],
            batch.lengths,
        )
        return StepLoss(
            loss_sum=sums.loss,
            weight_sum=self._weight(sums, batch),
            metrics={
                "loss": sums.step_loss.detach().double(),
                "accepted": sums.accepted.detach().double(),
                "correct": sums.correct.detach().double(),
                "rows": sums.rows.detach().double(),
                "scored": sums.labelled,
            },
            ratios={"loss": "rows", "accepted": "rows", "correct": "scored"},
        )

    def drafter(self, draft: nn.Module) -> Eagle3Drafter:
        return Eagle3Drafter(_as_eagle3(draft))

    def export(
        self, draft: nn.Module, target: TargetSpec, *, dtype: torch.dtype
    ) -> DraftCheckpoint:
        """One checkpoint; where its layers are not the default ones, see
        `export.engine_configs`.
        """
        ids = aux_layer_ids(self.config, target)
        return export.to_checkpoint(_as_eagle3(draft), target, aux_layer_ids=ids, dtype=dtype)

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
        config, shape = self.config, self._layer_shape(target)
        rows = tokens * config.ttt_length
        row = fused_stack_bytes(shape, itemsize, num_layers=config.num_layers, recompute=recompute)
        fused = tokens * target.hidden_size * len(aux_layer_ids(config, target)) * itemsize
        again = tokens * mlp_bytes(shape, itemsize) if recompute else 0
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
        return DraftShape(
            layer=self._layer_shape(target),
            features_width=target.hidden_size * len(aux_layer_ids(config, target)),
            num_features=len(aux_layer_ids(config, target)),
            vocab_size=target.vocab_size,
            draft_vocab_size=vocab.size,
            rope_theta=target.rope_theta,
            rope_scaling=target.rope_scaling if config.rope_scaling == "target" else None,
        )

    def _weight(self, sums: TttSums, batch: PackedBatch) -> Tensor:
        if self.config.denominator == "scored":
            return sums.rows[0].detach().float()
        padded = padded_positions(batch.lengths)
        return torch.tensor(float(padded), device=sums.loss.device)


def _as_eagle3(draft: nn.Module) -> Eagle3Draft:
    if not isinstance(draft, Eagle3Draft):
        raise TypeError(f"eagle3: wanted an Eagle3Draft, got {type(draft).__name__}")
    return draft
