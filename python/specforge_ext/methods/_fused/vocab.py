"""The draft's vocabulary: the target tokens that training text scores most often."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from specforge_ext.records import DraftVocab, Prompt, TargetSpec


def most_scored(prompts: Iterable[Prompt], target: TargetSpec, size: int | None) -> DraftVocab:
    """The `size` target tokens that these texts score most often; None: every token."""
    return build_draft_vocab(count_scored_tokens(prompts, vocab_size=target.vocab_size), size)


def count_scored_tokens(prompts: Iterable[Prompt], *, vocab_size: int) -> Tensor:
    """[V] int64: how often each token has loss mask 1. ValueError for an id outside the
    vocabulary.
    """
    counts = torch.zeros(vocab_size, dtype=torch.int64)
    for prompt in prompts:
        ids = prompt.input_ids[prompt.loss_mask.bool()].long()
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
            raise ValueError(
                f"input_ids of {prompt.sample_id}: wanted ids in [0, {vocab_size}), "
                f"got {int(ids.min())}..{int(ids.max())}"
            )
        counts += torch.bincount(ids, minlength=vocab_size)
    return counts


def build_draft_vocab(counts: Tensor, size: int | None) -> DraftVocab:
    """The `size` most frequent tokens of counts [V]; the lower id wins a tie. None: every token.

    ValueError if size is not in [1, V].
    """
    vocab_size = counts.numel()
    if size is None:
        size = vocab_size
    if not 1 <= size <= vocab_size:
        raise ValueError(f"draft_vocab_size: wanted 1..{vocab_size}, got {size}")
    chosen = torch.sort(counts, descending=True, stable=True).indices[:size]
    t2d = torch.zeros(vocab_size, dtype=torch.bool)
    t2d[chosen] = True
    d2t = t2d.nonzero()[:, 0] - torch.arange(size)
    return DraftVocab(t2d=t2d, d2t=d2t)
