"""What a draft algorithm offers to the layers above; see docs/architecture.md, "Adding things"."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from specforge_ext.records import (
    DraftCheckpoint,
    DraftVocab,
    FeatureLayout,
    PackedBatch,
    Prompt,
    Proposal,
    StepContext,
    StepLoss,
    TargetSpec,
    TargetWeights,
)


class Drafter(Protocol):
    """A draft in decoding: keeps the state of B sequences.

    Row t of a sequence pairs the target's features of position t with the token at t + 1, which is
    the alignment of training. `observe` adds rows; `propose` looks ahead from the last row of each
    sequence and leaves no trace.
    """

    def start(self, num_sequences: int, capacity: int) -> None:
        """Forget everything; make room for `capacity` rows a sequence, rejected ones included."""
        ...

    def observe(
        self,
        next_tokens: Tensor,
        features: Mapping[str, Tensor],
        positions: Tensor,
        valid: Tensor,
    ) -> None:
        """Add rows.

        next_tokens, positions: [B, n] int64. features[name]: [B, n, width]. valid: [B, n] bool.
        A column that is not valid is as if it had not been given; valid columns of a sequence need
        not be adjacent, but are in ascending order of position.
        """
        ...

    def select(self, rows: Tensor) -> None:
        """Keep these sequences ([R] int64, ascending); the others are forgotten, B becomes R."""
        ...

    def propose(
        self, depth: int, *, temperature: float, generator: torch.Generator | None
    ) -> Proposal:
        """`depth` tokens for every sequence, or fewer of some (see `Proposal.lengths`); temperature
        0 is greedy and needs no generator.
        """
        ...


class Method(Protocol):
    """A draft algorithm. The trainer gets one of these and never writes its name."""

    name: str

    def layout(self, target: TargetSpec) -> FeatureLayout:
        """The features that a batch for `step` must hold."""
        ...

    def build(self, weights: TargetWeights, vocab: DraftVocab, *, seed: int) -> nn.Module:
        """A fresh float32 draft on the device of the weights; frozen target tensors are buffers."""
        ...

    def vocab(self, prompts: Iterable[Prompt], target: TargetSpec) -> DraftVocab:
        """The draft's vocabulary for these training texts; the whole one unless configured."""
        ...

    def shard_units(self, draft: nn.Module) -> Sequence[nn.Module]:
        """Submodules that FSDP2 shards one by one before the root."""
        ...

    def recompute_units(self, draft: nn.Module) -> Sequence[nn.Module]:
        """Submodules with a pure forward; activation checkpointing computes them again."""
        ...

    def step(self, draft: nn.Module, batch: PackedBatch, at: StepContext) -> StepLoss:
        """Loss of a micro-batch, as sums. Goes through draft.forward, so that FSDP2's hooks run.

        at: the same for all micro-batches and ranks of a step.
        """
        ...

    def drafter(self, draft: nn.Module) -> Drafter:
        """A decoder around the draft's present parameters (plain tensors, not sharded)."""
        ...

    def export(
        self, draft: nn.Module, target: TargetSpec, *, dtype: torch.dtype
    ) -> DraftCheckpoint:
        """The draft under its public names, as SGLang and vLLM load it."""
        ...

    def engine_configs(
        self, config: Mapping[str, object], target: TargetSpec
    ) -> Mapping[str, Mapping[str, object]]:
        """config.json of each directory that an export needs, by the directory's name.

        {"": config} where one directory serves every engine; else one an engine.
        """
        ...

    def schema(
        self, config: Mapping[str, object]
    ) -> Mapping[str, tuple[tuple[int, ...], torch.dtype | None]]:
        """Every key a checkpoint with this config.json must hold: shape, and dtype if fixed."""
        ...

    def restore(self, checkpoint: DraftCheckpoint, weights: TargetWeights) -> nn.Module:
        """The draft of a checkpoint (already checked against `schema`), float32."""
        ...


@runtime_checkable
class LimitsDepth(Protocol):
    """What a Method offers beside, if its drafts cannot propose any number of tokens in a round."""

    @property
    def max_depth(self) -> int:
        """Most tokens of a round."""
        ...


@dataclass(frozen=True)
class StepWork:
    """What a micro-batch makes a step compute and keep, at most: every token scored.

    rows: through the draft's layers, summed over steps or slots, not over layers. saved_bytes:
    kept from forward to backward. logits_vocab: of the widest logits. head_bytes: float32 gradient
    of a head that is trained, made in the forward.
    """

    rows: int
    saved_bytes: int
    logits_vocab: int
    head_bytes: int = 0


@runtime_checkable
class EstimatesWork(Protocol):
    """What a Method offers beside, to have `specforge-ext check` say what a step takes."""

    def work(
        self, target: TargetSpec, *, tokens: int, longest: int, itemsize: int, recompute: bool
    ) -> StepWork:
        """Of a micro-batch of so many tokens in samples of `longest` tokens.

        itemsize: bytes of an activation. recompute: activation checkpointing.
        """
        ...
