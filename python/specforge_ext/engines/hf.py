"""The engine `hf`: any decoder-only transformers model, in this process, on the CPU or one GPU."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Literal

import torch
from pydantic import PositiveInt, field_validator
from torch import Tensor

from specforge_ext.assets import demo_target_path
from specforge_ext.config import Config
from specforge_ext.engines.base import Into, TargetDecoder, TargetOutput
from specforge_ext.engines.capture import assemble, check_layout, stream_ids
from specforge_ext.engines.checkpoint import CheckpointTensors
from specforge_ext.engines.columns import INITIAL_COLUMNS, ColumnModel, Visibility
from specforge_ext.engines.feature_batches import batch_features
from specforge_ext.engines.generate import generate_batch, noise
from specforge_ext.engines.lean import LeanModel, why_not_lean
from specforge_ext.records import DTYPES, FeatureLayout, Prompt, Sample, TargetSpec, TargetWeights

if TYPE_CHECKING:
    from specforge_ext.engines.hf_model import TargetModel

log = logging.getLogger(__name__)

DEMO = "demo"
WINDOW_BATCHES = 4
"""Feature batches that are sorted by length together: less padding, a later first sample."""


class HfConfig(Config):
    """model: directory, hub name, or "demo" for the target in the package (never goes online).

    dtype: of weights and computation. device: "auto" is "cuda" where there is one, else "cpu".
    max_batch_tokens: tokens of a feature batch, padding included; a longer prompt goes alone.
        With 1 every prompt goes alone, and its bits depend on it alone.
    generate_batch_size: sequences that are generated together.
    """

    model: str
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    device: str = "auto"
    max_batch_tokens: PositiveInt = 4096
    generate_batch_size: PositiveInt = 128
    attn_implementation: Literal["sdpa", "eager"] = "sdpa"

    @field_validator("device")
    @classmethod
    def _is_a_device(cls, device: str) -> str:
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
            raise ValueError(f"wanted auto, cpu or cuda[:index], got {device!r}")
        return device


class HfEngine:
    """An Engine (engines/base.py). Not for use by several threads at once."""

    Config = HfConfig

    def __init__(self, target: TargetModel, config: HfConfig) -> None:
        self._target = target
        self._config = config
        self._why_not_lean = why_not_lean(target)
        way = "transformers" if self._why_not_lean else "the lean forward"
        reason = f": {self._why_not_lean}" if self._why_not_lean else ""
        log.info("engine hf: %s is decoded by %s%s", target.spec.name, way, reason)
        self.spec: TargetSpec = target.spec

    @classmethod
    def open(cls, config: HfConfig) -> HfEngine:
        """Load the model. ValueError if it is not there, or of a kind that cannot be used."""
        # transformers takes seconds to import: only the process that runs the engine pays.
        from specforge_ext.engines.hf_model import load_model

        target = load_model(
            _path(config.model),
            name=config.model,
            dtype=DTYPES[config.dtype],
            device=_device(config.device),
            attention=config.attn_implementation,
            local=config.model == DEMO,
        )
        return cls(target, config)

    @classmethod
    def read_weights(
        cls, config: HfConfig, *, device: torch.device, last_layer: bool = False
    ) -> TargetWeights:
        """Of the files only what is asked for is read (`hf_weights.read_weights`), unless there are
        no safetensors files: then the whole model is opened on the CPU, and let go. The last layer
        is read tensor by tensor, each when it is asked for.

        Of device "meta" nothing is opened but its config.json (`hf_shape.read_shape`).
        """
        path, dtype = _path(config.model), DTYPES[config.dtype]
        if device.type == "meta":
            from specforge_ext.engines.hf_shape import read_shape

            return read_shape(path, name=config.model, dtype=dtype)
        from specforge_ext.engines.hf_weights import read_weights

        few = read_weights(
            path,
            name=config.model,
            dtype=dtype,
            device=device,
            last_layer=last_layer,
            local=config.model == DEMO,
        )
        if few is not None:
            return few
        log.warning(
            "engine hf: %s has no safetensors files: each trainer opens the whole model to read "
            "its embedding and head",
            config.model,
        )
        engine = cls.open(config.model_copy(update={"device": "cpu"}))
        return engine.weights(device=device, last_layer=last_layer)

    @staticmethod
    def why_not_open(config: HfConfig) -> str | None:
        """transformers does not have the architecture. ValueError as `read_weights`."""
        from specforge_ext.engines.hf_shape import is_known, read_config

        found = read_config(_path(config.model))
        if is_known(found):
            return None
        return f"transformers has no model_type {found.model_type!r}, so hf cannot open it"

    def weights(self, *, device: torch.device, last_layer: bool = False) -> TargetWeights:
        """In the model's dtype; on the model's own device they share its memory: read only."""
        from specforge_ext.engines.hf_model import factor_of, layer_tensors

        target = self._target
        return TargetWeights(
            spec=self.spec,
            embed_tokens=target.embed_tokens.weight.detach().to(device),
            lm_head=target.lm_head.weight.detach().to(device),
            final_norm=factor_of(target.norm, target.norm.weight.detach()).to(device),
            last_layer=layer_tensors(target.layers[-1], device) if last_layer else {},
            checkpoint=CheckpointTensors(_path(self._config.model)),
        )

    def features(
        self, prompts: Sequence[Prompt], layout: FeatureLayout, *, into: Into | None = None
    ) -> Iterator[Sample]:
        """Samples in order, features on the engine's device. A function of the arguments alone.

        into: see Engine.features; each value is copied once, from the model's activations to there.

        Padding goes to the right, where causal attention hides it. Raises ValueError before the
        first forward if the layout does not fit the target, or a prompt is empty, too long or out
        of vocabulary.
        """
        check_layout(layout, self.spec)
        for prompt in prompts:
            self._check_ids(prompt.sample_id, prompt.input_ids, room=0)
        return batch_features(
            self._target,
            prompts,
            layout,
            max_batch_tokens=self._config.max_batch_tokens,
            window_tokens=WINDOW_BATCHES * self._config.max_batch_tokens,
            into=into,
        )

    @torch.no_grad()
    def generate(
        self,
        prefixes: Sequence[Tensor],
        *,
        max_new_tokens: int,
        temperature: float,
        seed: int,
        stop_at_eos: bool = True,
    ) -> list[Tensor]:
        """Continuations, [n] int32 CPU each, in the order of the prefixes ([n] integers, CPU).

        Guaranteed: the same call on the same machine gives the same tokens, and what a prefix draws
        depends on (seed, prefix, its count among equal prefixes) alone. Its logits may differ in
        the last bits with the company in its batch, since matrix products of another shape round
        differently; then a token changes where the draw lies within that difference (about 1e-7)
        of a boundary, and the text from there on.
        """
        if temperature < 0:
            raise ValueError(f"temperature: wanted 0 or more, got {temperature}")
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens: wanted 1 or more, got {max_new_tokens}")
        for index, prefix in enumerate(prefixes):
            self._check_ids(f"prefixes[{index}]", prefix, room=max_new_tokens)
        uniform = noise(prefixes, max_new_tokens, seed).to(self._target.device)
        model = self._columns()
        out: dict[int, Tensor] = {}
        order = sorted(range(len(prefixes)), key=lambda i: len(prefixes[i]))
        for start in range(0, len(order), self._config.generate_batch_size):
            chosen = order[start : start + self._config.generate_batch_size]
            texts = generate_batch(
                model,
                self._logits,
                [prefixes[i] for i in chosen],
                uniform=uniform[chosen],
                temperature=temperature,
                eos_ids=self.spec.eos_token_ids if stop_at_eos else (),
            )
            out.update(zip(chosen, texts, strict=True))
        return [out[i] for i in range(len(prefixes))]

    def decoder(self) -> TargetDecoder:
        """A decoder of its own cache; several may be alive at once."""
        return HfDecoder(self._columns(), self._target)

    def _columns(self) -> ColumnModel:
        """The lean forward where the architecture is one it knows, else transformers' own."""
        if self._why_not_lean is None:
            return LeanModel(self._target)
        from specforge_ext.engines.hf_columns import TransformersModel

        return TransformersModel(self._target)

    def _logits(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self._target.lm_head(hidden)
        return logits.float()

    def _check_ids(self, name: str, ids: Tensor, *, room: int) -> None:
        """ids of one text, with room for that many more tokens."""
        longest = self.spec.max_position_embeddings - room
        if not 1 <= len(ids) <= longest:
            raise ValueError(
                f"{name}: wanted 1..{longest} tokens (max_position_embeddings "
                f"{self.spec.max_position_embeddings}, {room} to come), got {len(ids)}"
            )
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= self.spec.vocab_size:
            raise ValueError(
                f"{name}: wanted token ids in 0..{self.spec.vocab_size - 1}, got {low}..{high}"
            )


class HfDecoder:
    """A TargetDecoder (engines/base.py). Outputs are on the engine's device, without gradients."""

    def __init__(self, model: ColumnModel, target: TargetModel) -> None:
        self._model = model
        self._target = target
        self._layout = FeatureLayout(())
        self._stream_ids: tuple[int, ...] = ()
        self._visible = Visibility(0, target.device)

    def start(self, num_sequences: int, layout: FeatureLayout) -> None:
        check_layout(layout, self._target.spec)
        self._layout = layout
        self._stream_ids = stream_ids(layout)
        self._visible = Visibility(num_sequences, self._target.device)
        self._model.start(num_sequences, INITIAL_COLUMNS)

    @torch.no_grad()
    def forward(self, input_ids: Tensor, positions: Tensor, valid: Tensor) -> TargetOutput:
        """See TargetDecoder. What stands in columns that are not valid is arbitrary but finite."""
        device = self._target.device
        out = self._model.append(
            input_ids.to(device),
            positions.to(device),
            mask=self._visible.append(valid.to(device)),
            stream_ids=self._stream_ids,
        )
        return TargetOutput(
            logits=self._target.lm_head(out.last_hidden).float(),
            features=assemble(self._layout, out.streams, out.last_hidden),
        )

    def drop(self, keep: Tensor) -> None:
        self._visible.drop(keep.to(self._target.device))

    def select(self, rows: Tensor) -> None:
        rows = rows.to(self._target.device)
        self._visible.select(rows)
        self._model.select(rows)


def _path(model: str) -> str:
    return str(demo_target_path()) if model == DEMO else model


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device: wanted {name!r}, but torch finds no CUDA device")
    return device
