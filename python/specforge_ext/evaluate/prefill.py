"""The target reads a wave of ragged prompts; shared by plain and speculative decoding.

Legend of shapes: B sequences of a wave, S tokens of the longest prompt, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from specforge_ext.engines.base import TargetDecoder
from specforge_ext.records import FeatureLayout

PREFILL_COLUMNS = 128
"""Prompt columns of one target pass: bounds the float32 logits that it returns."""


@dataclass(frozen=True)
class Prefilled:
    """logits: [B, V] after each prompt's last token. features[name]: [B, S, width].

    input_ids, positions [B, S] int64, valid [B, S] bool: the right-padded prompts.
    lengths: [B] int64.
    """

    logits: Tensor
    features: dict[str, Tensor]
    input_ids: Tensor
    positions: Tensor
    valid: Tensor
    lengths: Tensor


def check_budget(max_new_tokens: int, temperature: float) -> None:
    """ValueError if a run with them makes no sense."""
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens: wanted at least 1, got {max_new_tokens}")
    if not 0.0 <= temperature < float("inf"):
        raise ValueError(f"temperature: wanted a finite value of at least 0, got {temperature}")


def waves(prompts: Sequence[Tensor], batch_size: int) -> Iterator[Sequence[Tensor]]:
    """The prompts in their order, `batch_size` at a time. ValueError if one is not readable."""
    if batch_size < 1:
        raise ValueError(f"batch_size: wanted at least 1, got {batch_size}")
    if not prompts:
        raise ValueError("prompts: wanted at least one, got none")
    for index, prompt in enumerate(prompts):
        whole = prompt.dtype in (torch.int32, torch.int64)
        if prompt.dim() != 1 or prompt.numel() == 0 or not whole:
            raise ValueError(
                f"prompts[{index}]: wanted [S >= 1] int32 or int64, "
                f"got {list(prompt.shape)} {prompt.dtype}"
            )
    for first in range(0, len(prompts), batch_size):
        yield prompts[first : first + batch_size]


def prefill(
    target: TargetDecoder,
    prompts: Sequence[Tensor],
    layout: FeatureLayout,
    *,
    device: torch.device,
) -> Prefilled:
    """Start the target on a wave of prompts."""
    ids, lengths = _pad(prompts, device)
    positions = torch.arange(ids.shape[1], device=device).expand_as(ids)
    valid = positions < lengths[:, None]
    target.start(len(prompts), layout)
    last_logits: Tensor | None = None
    parts: dict[str, list[Tensor]] = {spec.name: [] for spec in layout.features}
    for first in range(0, ids.shape[1], PREFILL_COLUMNS):
        columns = slice(first, first + PREFILL_COLUMNS)
        output = target.forward(ids[:, columns], positions[:, columns], valid[:, columns])
        for name, part in parts.items():
            part.append(output.features[name])
        last = lengths - 1 - first
        here = (last >= 0) & (last < output.logits.shape[1])
        rows = torch.arange(len(prompts), device=device)
        logits = output.logits[rows, last.clamp(0, output.logits.shape[1] - 1)]
        last_logits = (
            logits if last_logits is None else torch.where(here[:, None], logits, last_logits)
        )
    assert last_logits is not None  # waves() refuses empty prompts
    features = {name: torch.cat(part, 1) for name, part in parts.items()}
    return Prefilled(last_logits, features, ids, positions, valid, lengths)


def _pad(prompts: Sequence[Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    lengths = torch.tensor([len(p) for p in prompts], dtype=torch.int64)
    ids = torch.zeros(len(prompts), int(lengths.max()), dtype=torch.int64)
    for row, prompt in zip(ids, prompts, strict=True):
        row[: len(prompt)] = prompt
    return ids.to(device), lengths.to(device)
