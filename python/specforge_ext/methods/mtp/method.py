"""Multi-token prediction as the layers above see it: `specforge_ext.methods.base.Method`."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn

from specforge_ext.methods._common import as_draft, check_whole_vocab
from specforge_ext.methods._drafter import ChainDrafter
from specforge_ext.methods.base import StepWork
from specforge_ext.methods.mtp import export
from specforge_ext.methods.mtp.config import MtpConfig
from specforge_ext.methods.mtp.forms import (
    FORMS,
    Form,
    LayerKind,
    default_form,
    find_form,
    kind_of,
    prefix_of,
    shape_of,
)
from specforge_ext.methods.mtp.init import init_random, load, read_layer
from specforge_ext.methods.mtp.model import MtpDraft, MtpShape
from specforge_ext.methods.mtp.work import mtp_work
from specforge_ext.ops import DraftLoss
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

log = logging.getLogger(__name__)


class MtpMethod:
    """Fine-tuning of a target's own layer for multi-token prediction (arXiv 2412.19437, 2.2)."""

    name = "mtp"
    Config = MtpConfig

    def __init__(self, config: MtpConfig) -> None:
        self.config = config

    def layout(self, target: TargetSpec) -> FeatureLayout:
        """`last`: the last residual stream after the final norm, which is read and taught by."""
        width = target.hidden_size
        last = FeatureSpec("last", (target.num_layers,), width, target.dtype, final_norm=True)
        return FeatureLayout((last,))

    def build(self, weights: TargetWeights, vocab: DraftVocab, *, seed: int) -> MtpDraft:
        """The target's own layer, or a fresh one of the target's kind; see MtpConfig.start.

        ValueError if the layer is of a kind that cannot be trained here (latent attention, mixture
        of experts, ...), is not there, or is not the one asked for.
        """
        spec, config = weights.spec, self.config
        check_whole_vocab(vocab, spec, method=self.name)
        if (form := self._found_form(weights)) is None:
            form = FORMS[config.form] if config.form != "auto" else default_form(spec.model_type)
            kind = self._fresh_kind(weights)
            draft = MtpDraft(config, self._shape(spec, form, kind), weights)
            init_random(draft, seed=seed)
            log.info("mtp: a fresh %s layer: %s", form.name, kind)
        else:
            tensors = read_layer(weights.checkpoint, form, spec.num_layers)
            where = f"the {form.name} layer of the checkpoint"
            prefix = prefix_of(form, spec.num_layers)
            around = {f"{prefix}{name}.weight" for name in form.parts().values()}
            layer = {
                name.removeprefix(f"{prefix}{form.layer}"): tensor
                for name, tensor in tensors.items()
                if name not in around
            }
            kind = kind_of(layer, spec, where=where)
            draft = MtpDraft(config, self._shape(spec, form, kind), weights)
            load(draft, tensors, where=where)
            log.info("mtp: the target's own %s layer (%s*): %s", form.name, prefix, kind)
        return draft.to(weights.embed_tokens.device)

    def vocab(self, prompts: Iterable[Prompt], target: TargetSpec) -> DraftVocab:
        """The whole one: the head is the target's."""
        return DraftVocab.full(target.vocab_size)

    def shard_units(self, draft: nn.Module) -> Sequence[nn.Module]:
        """None: the layer is used at every step of the forward, so FSDP2 gathers it with the
        root.
        """
        return ()

    def recompute_units(self, draft: nn.Module) -> Sequence[nn.Module]:
        """The feed-forward block: most of what a step keeps, [rows, intermediate] three times."""
        return (self._mine(draft).layer.mlp,)

    def step(self, draft: nn.Module, batch: PackedBatch, at: StepContext) -> StepLoss:
        """Metrics [L]: loss and correct, sums over `rows`, the rows scored at each step; accepted
        likewise, but not with labels. Nothing is drawn, so `at` does not matter.
        """
        sums: DraftLoss = draft(
            batch.input_ids,
            batch.loss_mask,
            batch.positions,
            batch.features["last"],
            batch.lengths,
        )
        metrics = {"loss": sums.step_loss, "correct": sums.step_correct, "rows": sums.step_rows}
        ratios = {"loss": "rows", "correct": "rows"}
        if self.config.loss != "labels":
            metrics["accepted"], ratios["accepted"] = sums.step_accepted, "rows"
        return StepLoss(
            loss_sum=sums.loss_sum,
            weight_sum=sums.step_rows[0].float(),
            metrics=metrics,
            ratios=ratios,
        )

    def drafter(self, draft: nn.Module) -> ChainDrafter:
        return ChainDrafter(self._mine(draft), name=self.name, feature="last")

    def export(
        self, draft: nn.Module, target: TargetSpec, *, dtype: torch.dtype
    ) -> DraftCheckpoint:
        """The layer's tensors under the target's names, see `export.to_checkpoint`."""
        return export.to_checkpoint(self._mine(draft), target, dtype=dtype)

    def engine_configs(
        self, config: Mapping[str, object], target: TargetSpec
    ) -> Mapping[str, Mapping[str, object]]:
        """One directory: no engine loads it alone, all load the target that it is put into."""
        return {"": dict(config)}

    def schema(
        self, config: Mapping[str, object]
    ) -> Mapping[str, tuple[tuple[int, ...], torch.dtype | None]]:
        return export.schema(config)

    def restore(self, checkpoint: DraftCheckpoint, weights: TargetWeights) -> MtpDraft:
        form, kind = export.stored_form(checkpoint.config, weights.spec)
        draft = MtpDraft(self.config, self._shape(weights.spec, form, kind), weights)
        load(draft, checkpoint.tensors, where="the export")
        return draft.to(weights.embed_tokens.device)

    def work(
        self, target: TargetSpec, *, tokens: int, longest: int, itemsize: int, recompute: bool
    ) -> StepWork:
        """All tokens at each step; how long the samples are does not matter."""
        return mtp_work(
            target,
            num_steps=self.config.num_steps,
            tokens=tokens,
            itemsize=itemsize,
            recompute=recompute,
        )

    def _found_form(self, weights: TargetWeights) -> Form | None:
        """The form to read from the checkpoint; None for a fresh layer."""
        asked, start = self.config.form, self.config.start
        if start == "fresh":
            return None
        found = find_form(weights.checkpoint, weights.spec.num_layers)
        if found is None and start == "checkpoint":
            names = [prefix_of(form, weights.spec.num_layers) for form in FORMS.values()]
            raise ValueError(
                f"start 'checkpoint': wanted a layer for multi-token prediction in the files of "
                f"{weights.spec.name!r}, found none under {', '.join(names)} (start: fresh makes "
                "one)"
            )
        if found is not None and asked not in ("auto", found.name):
            raise ValueError(
                f"form {asked!r}: the checkpoint of {weights.spec.name!r} has a layer of the form "
                f"{found.name!r}"
            )
        return found

    def _fresh_kind(self, weights: TargetWeights) -> LayerKind:
        if not weights.last_layer:
            raise ValueError("mtp: wanted the target's last layer, whose kind a fresh layer takes")
        return kind_of(weights.last_layer, weights.spec, where="the target's last layer")

    def _shape(self, target: TargetSpec, form: Form, kind: LayerKind) -> MtpShape:
        return MtpShape(
            layer=shape_of(target),
            kind=kind,
            form=form,
            vocab_size=target.vocab_size,
            target_layers=target.num_layers,
            rotary_dim=int(target.head_dim * target.partial_rotary_factor),
            rope_theta=target.rope_theta,
            rope_scaling=target.rope_scaling,
        )

    def _mine(self, draft: nn.Module) -> MtpDraft:
        return as_draft(draft, MtpDraft, method=self.name)
