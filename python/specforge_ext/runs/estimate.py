"""What a rank's memory holds while it trains a draft: arithmetic over sizes, no tensor is made."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn

from specforge_ext.methods import EstimatesWork, Method, StepWork
from specforge_ext.ops import default_workspace_bytes
from specforge_ext.records import TargetWeights
from specforge_ext.trainer import TrainerConfig

MOMENTS = 2
"""Of AdamW, float32."""


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank's device, at most. Shards are its own part, float32.

    parameters, gradients, moments: its shards. gathered: whole parameters during a step, in the
    dtype of `trainer.precision`, and whole gradients, float32, until they are summed over ranks.
    target: embedding, head and what else the draft takes of the target. features: the micro-batches
    that are there at a time. activations: kept from forward to backward. loss: logits' workspace,
    and a trained head's gradient. 0 where a method estimates none.
    """

    parameters: int
    gradients: int
    moments: int
    gathered: int
    target: int
    features: int
    activations: int
    loss: int

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True)
class Batch:
    """A rank's largest micro-batch: tokens, in samples of `longest`; held: how many at a time.

    feature_bytes: of one token's features.
    """

    tokens: int
    longest: int
    held: int
    feature_bytes: int


def num_parameters(draft: nn.Module) -> int:
    """Trained ones."""
    return sum(p.numel() for p in draft.parameters() if p.requires_grad)


def memory(
    method: Method,
    draft: nn.Module,
    weights: TargetWeights,
    trainer: TrainerConfig,
    batch: Batch,
    *,
    ranks: int,
    device: torch.device,
) -> Memory:
    """draft, weights: on any device, also meta. device: where the trainer runs."""
    whole = 4 * num_parameters(draft)
    shard = -(-whole // ranks)
    itemsize = 2 if trainer.precision == "bfloat16" else 4
    work = step_work(method, weights, trainer, batch)
    return Memory(
        parameters=shard,
        gradients=shard,
        moments=MOMENTS * shard,
        gathered=whole * itemsize // 4 + whole,
        target=distinct_bytes([*_kept_of(weights), *draft.buffers()]),
        features=batch.held * batch.tokens * batch.feature_bytes,
        activations=work.saved_bytes if work else 0,
        loss=work.head_bytes + default_workspace_bytes(device, vocab=work.logits_vocab)
        if work
        else 0,
    )


def together(drafts: Sequence[Memory], weights: TargetWeights) -> int:
    """Bytes of several drafts on a rank, at most, trained one after the other at every step.

    Shards are there for all; what a step needs is there for one at a time. Features
    count as the largest draft's, the target's weights once, what a draft copies of them each time.
    """
    kept = sum(d.parameters + d.gradients + d.moments for d in drafts)
    step = max(d.gathered + d.activations + d.loss for d in drafts)
    target = distinct_bytes(_kept_of(weights))
    copies = sum(d.target - target for d in drafts)
    return kept + step + target + copies + max(d.features for d in drafts)


def step_work(
    method: Method, weights: TargetWeights, trainer: TrainerConfig, batch: Batch
) -> StepWork | None:
    """None if the method estimates none."""
    if not isinstance(method, EstimatesWork):
        return None
    return method.work(
        weights.spec,
        tokens=batch.tokens,
        longest=batch.longest,
        itemsize=2 if trainer.precision == "bfloat16" else 4,
        recompute=trainer.activation_checkpointing,
    )


def _kept_of(weights: TargetWeights) -> list[Tensor]:
    """The last layer is read when a draft is built, and let go."""
    return [weights.embed_tokens, weights.lm_head, weights.final_norm]


def distinct_bytes(tensors: Iterable[Tensor]) -> int:
    """Each storage once: a draft's buffers are views of the target's weights, or copies."""
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())
