"""The sides that benchmarks/acceptance.py trains: our trainer, and SpecForge's own classes.

All start from the same weights and see the same samples in the same order. SpecForge's weights come
and go as its checkpoints, by `specforge_ext.export.convert`, both ways.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fp8_runs import Shared
from specforge_ext.assets import demo_target_path
from specforge_ext.export import convert, read_strict, write
from specforge_ext.methods import Method
from specforge_ext.methods._block.plan import Anchors, draw
from specforge_ext.methods.dflash import DFlashMethod
from specforge_ext.methods.dflash.model import DFlashDraft
from specforge_ext.methods.eagle3 import Eagle3Method
from specforge_ext.records import (
    DraftCheckpoint,
    DraftVocab,
    PackedBatch,
    Sample,
    StepContext,
)
from specforge_ext.runs.recipe import Recipe
from specforge_ext.trainer import StepData, Trainer, TrainerConfig, World
from specforge_ext.trainer.schedule import learning_rate
from step import import_specforge
from step_dflash import padded_anchors


@dataclass(frozen=True)
class Batch:
    """What one optimizer step sees: samples, and the same packed in the same order."""

    data: StepData
    samples: tuple[Sample, ...]

    @property
    def packed(self) -> PackedBatch:
        (batch,) = self.data.micro_batches
        return batch


@dataclass(frozen=True)
class Setting:
    """What the sides of one method and one seed have in common. folder: each has one below it."""

    shared: Shared
    recipe: Recipe
    total_steps: int
    folder: Path
    world: World

    @property
    def vocab(self) -> DraftVocab:
        return self.shared.method.vocab(self.shared.dataset.train, self.shared.weights.spec)

    def start(self) -> nn.Module:
        """A draft as every side starts from."""
        return self.shared.method.build(self.shared.weights, self.vocab, seed=self.recipe.run.seed)


class Side(Protocol):
    """Trains one draft. is_twin: its loss is defined as SpecForge's, and on the same rows."""

    name: str
    is_twin: bool

    def prepare(self, batch: Batch) -> Callable[[], float]:
        """Lays the batch out; the call is the step, and gives its loss."""
        ...

    def draft(self) -> nn.Module:
        """What is trained so far, as our module in plain float32 tensors."""
        ...


class OurSide:
    """The trainer of a run, on its own world of one rank."""

    def __init__(self, setting: Setting, method: Method, *, name: str, is_twin: bool) -> None:
        self.name, self.is_twin = name, is_twin
        self._setting = setting
        self._trainer = Trainer(
            setting.recipe.trainer,
            method,
            setting.start(),
            _Counted(setting.total_steps),
            output_dir=setting.folder / name.replace("/", "-"),
            world=setting.world,
        )
        self._trainer.begin()

    def prepare(self, batch: Batch) -> Callable[[], float]:
        def step() -> float:
            self._trainer.advance(batch.data, lambda: False)
            loss = self._trainer.result().final_loss
            if loss is None:
                raise RuntimeError(f"step {batch.data.step}: no scored token")
            return loss

        return step

    def draft(self) -> nn.Module:
        draft = self._setting.start()
        draft.load_state_dict(self._trainer.full_state_dict())
        return draft


@dataclass(frozen=True)
class _Counted:
    """A StepSource that only says how many steps there are: batches are handed over."""

    total_steps: int

    def iterate(self, start_step: int) -> Iterator[StepData]:
        raise RuntimeError("wanted steps to be handed over, got a call for them")


class SpecForgeSide:
    """SpecForge's draft, training model, strategy, padding and optimizer, in float32 on the CPU."""

    def __init__(self, setting: Setting, *, name: str, is_twin: bool) -> None:
        import_specforge()
        self.name, self.is_twin = name, is_twin
        self._setting = setting
        self._folder = setting.folder / name.replace("/", "-")
        self.model: Any = self._load()
        self.strategy: Any = self._strategy()
        self.optimizer = specforge_optimizer(
            self.model, setting.recipe.trainer, total_steps=setting.total_steps
        )

    def _strategy(self) -> Any:
        raise NotImplementedError

    def _collate(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, str]]:
        """SpecForge's padded tensors, and what it says of them."""
        raise NotImplementedError

    def prepare(self, batch: Batch) -> Callable[[], float]:
        from specforge.runtime.contracts import TrainBatch

        tensors, about = self._collate(batch)
        ids = list(batch.packed.sample_ids)
        padded = TrainBatch(ids, self.strategy.name, tensors, about)

        def step() -> float:
            # As its trainer without accumulation; its small functions as they are, not compiled.
            with torch.compiler.set_stance("force_eager"):
                loss = self.strategy.forward_loss(padded).loss
                loss.backward()
                specforge_update(
                    self.optimizer,
                    self._setting.recipe.trainer,
                    batch.data.step,
                    self._setting.total_steps,
                )
            return float(loss.detach())

        return step

    def nudge(self) -> None:
        """Changes every weight by about 1e-7 of itself, one unit in its last place."""
        generator = torch.Generator().manual_seed(self._setting.recipe.run.seed)
        with torch.no_grad():
            for weight, copy in zip(
                self.optimizer.model_params, self.optimizer.fp32_params, strict=True
            ):
                weight.mul_(1 + 1e-7 * torch.randn(weight.shape, generator=generator))
                copy.copy_(weight)

    def draft(self) -> nn.Module:
        """Through its training_state.pt and our converter."""
        method, weights = self._setting.shared.method, self._setting.shared.weights
        state = self.strategy.checkpoint_state_filter(self.strategy.trainable_module().state_dict())
        saved, came = self._folder / "training_state.pt", self._folder / "came"
        torch.save({"draft_state_dict": {k: v.clone() for k, v in state.items()}}, saved)
        convert(
            saved,
            came,
            to="sglang",
            source_format="specforge",
            config=self._folder / "start" / "config.json",
            target=demo_target_path(),
        )
        return method.restore(read_strict(came, method), weights)

    def _load(self) -> Any:
        """Its model from the start's checkpoint, converted to its format."""
        from specforge.modeling.auto import AutoDraftModel, AutoDraftModelConfig

        method, spec = self._setting.shared.method, self._setting.shared.weights.spec
        checkpoint = method.export(self._setting.start(), spec, dtype=torch.float32)
        configs = method.engine_configs(checkpoint.config, spec)
        ours, theirs = self._folder / "ours", self._folder / "start"
        write(DraftCheckpoint(checkpoint.tensors, next(iter(configs.values()))), ours)
        convert(ours, theirs, to="specforge", target=demo_target_path())
        with contextlib.redirect_stdout(None):  # it tells what it sets
            config = AutoDraftModelConfig.from_file(str(theirs / "config.json"))
        # Not its from_pretrained: with this transformers that leaves its RoPE tables uninitialised.
        model = AutoDraftModel.from_config(config).float()
        model.load_state_dict(load_file(theirs / "model.safetensors"))
        return model


class SpecForgeEagle3(SpecForgeSide):
    def _strategy(self) -> Any:
        from specforge.algorithms.eagle3.model import OnlineEagle3Model
        from specforge.modeling.target.target_head import TargetHead
        from specforge.training.strategies.base import Eagle3TrainStrategy

        config = self._setting.shared.method.config
        self.model.embed_tokens.weight.requires_grad_(False)
        head = TargetHead(str(demo_target_path())).float()
        head.fc.weight.data = self._setting.shared.weights.lm_head.clone()
        head.freeze_weights()
        online = OnlineEagle3Model(self.model, length=config.ttt_length, attention_backend="sdpa")
        return Eagle3TrainStrategy(online, target_head=head, ploss_decay=config.step_decay)

    def _collate(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, str]]:
        from specforge.algorithms.eagle3.data import (
            build_offline_collator,
            normalize_offline_sample,
        )

        rows = [
            normalize_offline_sample(
                {
                    "aux_hidden_state": sample.features["aux"],
                    "hidden_state": sample.features["last"],
                    "input_ids": sample.prompt.input_ids.long(),
                    "loss_mask": sample.prompt.loss_mask.long(),
                },
                max_len=len(sample.prompt),
            )
            for sample in batch.samples
        ]
        return build_offline_collator()(rows), {"target_repr": "hidden_state"}


class SpecForgeDFlash(SpecForgeSide):
    """Twin: with the anchors that ours draws. Otherwise it draws its own, by its own rule."""

    def _strategy(self) -> Any:
        from specforge.algorithms.common.dflash_family_model import OnlineDFlashModel
        from specforge.training.strategies.base import DFlashTrainStrategy

        config, weights = self._setting.shared.method.config, self._setting.shared.weights
        self.model.config._attn_implementation = "sdpa"
        draft = self._setting.start()
        assert isinstance(draft, DFlashDraft)
        vocab, hidden = weights.embed_tokens.shape
        head, embedding = nn.Linear(hidden, vocab, bias=False), nn.Embedding(vocab, hidden)
        head.weight.data, embedding.weight.data = weights.lm_head, weights.embed_tokens
        online = OnlineDFlashModel(
            self.model,
            head.requires_grad_(False),
            embedding.requires_grad_(False),
            mask_token_id=draft.block_shape.mask_token_id,
            block_size=config.block_size,
            attention_backend="sdpa",
            num_anchors=config.num_anchors,
            loss_decay_gamma=config.gamma,
        )
        self._draw = online._sample_anchor_positions
        self._step = 0
        self._anchors: tuple[Tensor, Tensor] | None = None
        online._sample_anchor_positions = self._sample_anchor_positions
        return DFlashTrainStrategy(online)

    def _sample_anchor_positions(self, *args: Any) -> tuple[Tensor, Tensor]:
        if self._anchors is not None:
            return self._anchors
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1_000_000 * (self._setting.recipe.run.seed + 1) + self._step)
            drawn: tuple[Tensor, Tensor] = self._draw(*args)
        return drawn

    def _collate(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, str]]:
        from specforge.algorithms.common.dflash_family_data import (
            build_collator,
            normalize_offline_sample,
        )

        self._step = batch.data.step
        if self.is_twin:
            self._anchors = padded_anchors(batch.packed, self._our_anchors(batch))
        rows = [
            normalize_offline_sample(
                {
                    "input_ids": sample.prompt.input_ids.long(),
                    "loss_mask": sample.prompt.loss_mask.long(),
                    "hidden_states": sample.features["hidden"],
                },
                max_len=len(sample.prompt),
            )
            for sample in batch.samples
        ]
        return build_collator()(rows), {}

    def _our_anchors(self, batch: Batch) -> Anchors:
        recipe = self._setting.recipe
        at = StepContext(
            step=batch.data.step, total_steps=self._setting.total_steps, seed=recipe.trainer.seed
        )
        return draw(batch.packed, at, num_anchors=self._setting.shared.method.config.num_anchors)


def specforge_optimizer(model: nn.Module, config: TrainerConfig, *, total_steps: int) -> Any:
    """SpecForge's AdamW and clipping, with our settings where it has no option."""
    from specforge.optimizer import BF16Optimizer

    optimizer = BF16Optimizer(
        model,
        lr=config.lr,
        weight_decay=config.weight_decay,
        max_grad_norm=float("inf") if config.clip_norm is None else config.clip_norm,
        total_steps=total_steps,
    )
    optimizer.configure_grad_norm_reduction(enabled=False)  # no other rank
    for group in optimizer.optimizer.param_groups:
        group["betas"], group["eps"] = config.betas, config.eps
    return optimizer


def specforge_update(optimizer: Any, config: TrainerConfig, step: int, total_steps: int) -> None:
    """Its step at our rate.

    Its cosine is ours on paper, but with torch 2.13 the rate is 2 / (1 + cos(pi / T)) too high from
    the end of the warm-up on, T steps before the last: 7e-6 of it in the demo, 10 % in six steps.
    """
    for group in optimizer.optimizer.param_groups:
        group["lr"] = learning_rate(config, step, total_steps)
    optimizer.step()


def eagle3_sides(setting: Setting) -> list[Side]:
    """Ours twice: with the denominator that SpecForge has, and with the recipe's own."""
    recipe_own = setting.shared.method
    assert isinstance(recipe_own, Eagle3Method)
    twin = Eagle3Method(recipe_own.config.model_copy(update={"denominator": "all_positions_mean"}))
    return [
        SpecForgeEagle3(setting, name="specforge", is_twin=True),
        OurSide(setting, twin, name="specforge_ext", is_twin=True),
        OurSide(setting, recipe_own, name="specforge_ext/recipe", is_twin=False),
    ]


def dflash_sides(setting: Setting) -> list[Side]:
    method = setting.shared.method
    assert isinstance(method, DFlashMethod) and method.config.dpace is None
    return [
        SpecForgeDFlash(setting, name="specforge", is_twin=True),
        OurSide(setting, method, name="specforge_ext", is_twin=True),
    ]


def eagle3_controls(setting: Setting) -> list[Side]:
    """SpecForge once more, started as far away as float32 rounds."""
    nudged = SpecForgeEagle3(setting, name="specforge/nudged", is_twin=True)
    nudged.nudge()
    return [nudged]


def dflash_controls(setting: Setting) -> list[Side]:
    """The same, and with the anchors that it draws itself."""
    nudged = SpecForgeDFlash(setting, name="specforge/nudged", is_twin=True)
    nudged.nudge()
    return [nudged, SpecForgeDFlash(setting, name="specforge/own-anchors", is_twin=False)]


SIDES: dict[str, Callable[[Setting], list[Side]]] = {
    "eagle3": eagle3_sides,
    "dflash": dflash_sides,
}
CONTROLS: dict[str, Callable[[Setting], list[Side]]] = {
    "eagle3": eagle3_controls,
    "dflash": dflash_controls,
}
"""How far apart two runs of SpecForge itself come, when nothing that matters differs."""
