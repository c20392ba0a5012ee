"""The order of the data, as a pure function of (lengths, seed, epoch): the ledger of a run.

Which samples form global step s does not depend on the world size; which rank takes which does, and
is as pure. A checkpoint that holds the step number therefore holds the whole delivery state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from pydantic import Field

from specforge_ext.config import Config


class OrderConfig(Config):
    """batch_tokens: tokens of a global step, over all ranks; no step exceeds it by more than half.

    micro_batch_tokens: tokens of one forward and backward on a rank (None: its whole share).
    epochs: passes over the data. max_steps: a limit on global steps (None: none).
    shuffle: False keeps the order of the data set.
    """

    batch_tokens: int = Field(default=4096, ge=1)
    micro_batch_tokens: int | None = Field(default=None, ge=1)
    epochs: int = Field(default=1, ge=1)
    max_steps: int | None = Field(default=None, ge=1)
    shuffle: bool = True


@dataclass(frozen=True)
class GlobalStep:
    """The samples (indices into the data set) that one optimizer step sees, on all ranks."""

    step: int
    epoch: int
    samples: tuple[int, ...]


def global_steps(lengths: Sequence[int], config: OrderConfig, *, seed: int) -> list[GlobalStep]:
    """Every step of a run. lengths: tokens of each sample.

    Samples fill a step in the epoch's order until the next one would exceed `batch_tokens`. The
    last step of an epoch joins its neighbour when it holds less than half of `batch_tokens`.
    Raises ValueError if a sample alone exceeds the budget of a step or of a micro-batch.
    """
    _check(lengths, config)
    steps: list[GlobalStep] = []
    for epoch in range(config.epochs):
        for samples in _epoch(lengths, config, seed=seed, epoch=epoch):
            if config.max_steps is not None and len(steps) == config.max_steps:
                return steps
            steps.append(GlobalStep(len(steps), epoch, tuple(samples)))
    return steps


def _check(lengths: Sequence[int], config: OrderConfig) -> None:
    if not lengths:
        raise ValueError("the data set is empty: no sample has a scored token")
    longest = max(range(len(lengths)), key=lengths.__getitem__)
    budget = min(config.batch_tokens, config.micro_batch_tokens or config.batch_tokens)
    if lengths[longest] > budget:
        raise ValueError(
            f"order.batch_tokens / micro_batch_tokens: sample {longest} has {lengths[longest]} "
            f"tokens, the budget is {budget}; raise it or shorten the data (data.train)"
        )


def _epoch(
    lengths: Sequence[int], config: OrderConfig, *, seed: int, epoch: int
) -> list[list[int]]:
    order = list(range(len(lengths)))
    if config.shuffle:
        rng = np.random.Generator(np.random.PCG64([seed, epoch]))
        order = [int(i) for i in rng.permutation(len(lengths))]
    steps: list[list[int]] = []
    room = 0
    for index in order:
        if lengths[index] > room:
            steps.append([])
            room = config.batch_tokens
        steps[-1].append(index)
        room -= lengths[index]
    if len(steps) > 1 and 2 * sum(lengths[i] for i in steps[-1]) < config.batch_tokens:
        steps[-2].extend(steps.pop())
    return steps


def share(step: GlobalStep, lengths: Sequence[int], *, rank: int, world_size: int) -> list[int]:
    """The samples of a step that a rank takes: longest first, each to the least loaded rank."""
    return _balance(list(step.samples), lengths, world_size)[rank]


def micro_batches(
    step: GlobalStep, lengths: Sequence[int], config: OrderConfig, *, rank: int, world_size: int
) -> list[list[int]]:
    """A rank's share of a step in the fewest balanced micro-batches; none empty, none if no sample.

    Ranks may differ in their number: the trainer exchanges data once a step, not in every forward.
    """
    samples = share(step, lengths, rank=rank, world_size=world_size)
    if not samples:
        return []
    limit = config.micro_batch_tokens or sum(lengths[i] for i in samples)
    return _balance(samples, lengths, _bins_needed(samples, lengths, limit))


def _bins_needed(samples: list[int], lengths: Sequence[int], limit: int) -> int:
    """The least number of balanced bins that keeps every bin within `limit` tokens."""
    bins = max(1, -(-sum(lengths[i] for i in samples) // limit))
    while any(sum(lengths[i] for i in part) > limit for part in _balance(samples, lengths, bins)):
        bins += 1
    return bins


def _balance(samples: list[int], lengths: Sequence[int], parts: int) -> list[list[int]]:
    """Longest first, each to the part with the fewest tokens (then samples, then the first)."""
    out: list[list[int]] = [[] for _ in range(parts)]
    load = [(0, 0, part) for part in range(parts)]
    for index in sorted(samples, key=lambda i: (-lengths[i], i)):
        tokens, count, part = min(load)
        out[part].append(index)
        load[part] = (tokens + lengths[index], count + 1, part)
    return out
