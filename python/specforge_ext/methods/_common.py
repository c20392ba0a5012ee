"""Small parts of most methods."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

from specforge_ext.nn.layer import LayerShape
from specforge_ext.records import DraftVocab, TargetSpec

AnyDraft = TypeVar("AnyDraft", bound=nn.Module)


def as_draft(draft: nn.Module, kind: type[AnyDraft], *, method: str) -> AnyDraft:
    """The draft under its type. TypeError if it is another method's."""
    if not isinstance(draft, kind):
        raise TypeError(f"{method}: wanted {kind.__name__}, got {type(draft).__name__}")
    return draft


def check_whole_vocab(vocab: DraftVocab, target: TargetSpec, *, method: str) -> None:
    """For drafts that speak with the target's head. ValueError if it is a part of the target's."""
    if not vocab.is_full or vocab.size != target.vocab_size:
        raise ValueError(
            f"{method}: wanted the target's whole vocabulary of {target.vocab_size} (its head is "
            f"used), got {vocab.size} of {vocab.t2d.numel()}"
        )


def sample_keys(sample_ids: Sequence[str]) -> Tensor:
    """[N] int64: 64 bits of each sample's id, the same on every machine, for what is drawn."""
    digests = (hashlib.blake2b(name.encode(), digest_size=8).digest() for name in sample_ids)
    keys = [int.from_bytes(digest, "little", signed=True) for digest in digests]
    return torch.tensor(keys, dtype=torch.int64)


class LayerSizes(Protocol):
    """A config that may name the sizes of the draft's layers, counts."""

    @property
    def intermediate_size(self) -> int | None: ...
    @property
    def num_heads(self) -> int | None: ...
    @property
    def num_kv_heads(self) -> int | None: ...
    @property
    def head_dim(self) -> int | None: ...


def layer_shape(sizes: LayerSizes, target: TargetSpec) -> LayerShape:
    """Sizes that are left out are the target's. ValueError if they do not fit each other."""
    return LayerShape(
        hidden_size=target.hidden_size,
        intermediate_size=sizes.intermediate_size or target.intermediate_size,
        num_heads=sizes.num_heads or target.num_heads,
        num_kv_heads=sizes.num_kv_heads or target.num_kv_heads,
        head_dim=sizes.head_dim or target.head_dim,
        rms_norm_eps=target.rms_norm_eps,
    )
