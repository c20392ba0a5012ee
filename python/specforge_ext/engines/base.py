"""What a target engine offers: shape, weights, features, generation, cached decoding."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from pydantic import BaseModel
from torch import Tensor

from specforge_ext.records import FeatureLayout, Prompt, Sample, TargetSpec, TargetWeights


@dataclass(frozen=True)
class TargetOutput:
    """logits: [B, n, V] float32. features[name]: [B, n, width] of the layout."""

    logits: Tensor
    features: Mapping[str, Tensor]


class TargetDecoder(Protocol):
    """The target with a key/value cache, for decoding B sequences that advance unevenly. Tensors
    that it is given may be on any device; those it gives are on its own.

    The cache is a list of columns. A column whose token was rejected stays, and is switched off
    for good by `drop`; attention never sees it again.
    """

    def start(self, num_sequences: int, layout: FeatureLayout) -> None: ...

    def forward(self, input_ids: Tensor, positions: Tensor, valid: Tensor) -> TargetOutput:
        """Append n columns. input_ids, positions [B, n] int64; valid [B, n] bool (padding is not).

        A row sees the valid columns before it and itself.
        """
        ...

    def drop(self, keep: Tensor) -> None:
        """keep: [B, n] bool over the columns of the last `forward`; the others are switched off."""
        ...

    def select(self, rows: Tensor) -> None:
        """Keep these sequences ([R] int64, ascending); the others are forgotten, B becomes R."""
        ...


Into = Callable[[Prompt], Mapping[str, Tensor]]
"""Where the features of a prompt are to be written: [S, width] of the layout's dtypes, by name."""


class Engine(Protocol):
    spec: TargetSpec

    def weights(self, *, device: torch.device, last_layer: bool = False) -> TargetWeights: ...

    def features(
        self, prompts: Sequence[Prompt], layout: FeatureLayout, *, into: Into | None = None
    ) -> Iterator[Sample]:
        """Samples in the order of the prompts. The bits depend on `prompts` and `layout` alone.

        into: asked once for each prompt before its features are written; the sample then holds the
        very tensors that it gave. They are whole when the sample comes, and nothing writes to any
        of them once this has raised or was closed. None: tensors of the sample's own.
        """
        ...

    def generate(
        self,
        prefixes: Sequence[Tensor],
        *,
        max_new_tokens: int,
        temperature: float,
        seed: int,
        stop_at_eos: bool = True,
    ) -> list[Tensor]:
        """Continuations: [n] int32 each, without the prefix, with the end token if it was said."""
        ...

    def decoder(self) -> TargetDecoder: ...


class EngineFactory(Protocol):
    """What a registered engine is: a config model, and two ways to open a target.

    `read_weights` is for processes that need a target's shape and a few of its weights only. With
    device "meta" it reads the shape alone, and no weight: tensors have sizes and no values.
    """

    Config: type[BaseModel]

    def open(self, config: Any) -> Engine: ...

    def read_weights(
        self, config: Any, *, device: torch.device, last_layer: bool = False
    ) -> TargetWeights: ...

    def why_not_open(self, config: Any) -> str | None:
        """Why `open` cannot work for a model of this kind, as far as its shape says; else None."""
        ...
