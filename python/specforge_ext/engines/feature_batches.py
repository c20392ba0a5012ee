"""Features of many prompts: batches by length, captured streams, samples in order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from specforge_ext.engines.base import Into
from specforge_ext.engines.capture import capture, fill, stream_ids
from specforge_ext.records import DTYPES, FeatureLayout, Prompt, Sample

if TYPE_CHECKING:
    from specforge_ext.engines.hf_model import TargetModel


def batch_features(
    target: TargetModel,
    prompts: Sequence[Prompt],
    layout: FeatureLayout,
    *,
    max_batch_tokens: int,
    window_tokens: int,
    into: Into | None = None,
) -> Iterator[Sample]:
    """Samples in the order of the prompts, each as soon as it and all before it are computed.

    into: see Engine.features. What a batch writes there is all there before its first sample comes.
    """
    where = into or own_memory(layout, target.device)
    start = 0
    while start < len(prompts):
        window = _window(prompts, start, window_tokens)
        done: dict[int, Sample] = {}
        upcoming = start
        for batch in plan_batches([len(p) for p in window], max_batch_tokens):
            samples = _forward(target, [window[i] for i in batch], layout, where)
            done.update((start + i, sample) for i, sample in zip(batch, samples, strict=True))
            while upcoming in done:
                yield done.pop(upcoming)
                upcoming += 1
        start += len(window)


def plan_batches(lengths: Sequence[int], max_batch_tokens: int) -> list[list[int]]:
    """Indices that go together, each once: rows * longest <= max_batch_tokens, or one row.

    Batches hold neighbours by length; the batch with the earliest prompt comes first.
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        rows = len(batches[-1]) + 1 if batches else 0
        if rows and rows * lengths[index] <= max_batch_tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
    return sorted(batches, key=min)


def _window(prompts: Sequence[Prompt], start: int, window_tokens: int) -> Sequence[Prompt]:
    """Prompts from `start` on, at least one, while they have no more than `window_tokens`."""
    end, tokens = start, 0
    while end < len(prompts) and (end == start or tokens + len(prompts[end]) <= window_tokens):
        tokens += len(prompts[end])
        end += 1
    return prompts[start:end]


def own_memory(layout: FeatureLayout, device: torch.device) -> Into:
    """New tensors for each prompt."""

    def new(prompt: Prompt) -> Mapping[str, Tensor]:
        return {
            spec.name: torch.empty(len(prompt), spec.width, dtype=DTYPES[spec.dtype], device=device)
            for spec in layout.features
        }

    return new


def _forward(
    target: TargetModel, prompts: Sequence[Prompt], layout: FeatureLayout, into: Into
) -> list[Sample]:
    rows = [prompt.input_ids.to(torch.int64) for prompt in prompts]
    input_ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(target.device)
    with torch.no_grad(), capture(target.layers, stream_ids(layout)) as streams:
        last_hidden = target.last_hidden(input_ids, use_cache=False)
    samples = [Sample(prompt, into(prompt)) for prompt in prompts]
    try:
        for row, sample in enumerate(samples):
            length = len(sample.prompt)  # what comes after it is padding
            own = {i: stream[row, :length] for i, stream in streams.items()}
            fill(layout, own, last_hidden[row, :length], sample.features)
    finally:
        given = {tensor.device for sample in samples for tensor in sample.features.values()}
        _finish_copies(given | {target.device})  # also when this failed: it is somebody else's then
    return samples


def _finish_copies(devices: Iterable[torch.device]) -> None:
    """Wait for copies that the devices' current streams have taken on: from a GPU to the host, or
    from a target on the CPU to a GPU.
    """
    for device in devices:
        if device.type == "cuda":
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(torch.cuda.current_stream(device))
            event.synchronize()
