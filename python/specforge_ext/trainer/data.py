"""What the trainer reads: a plan of steps, of which this rank gets its part."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from specforge_ext.records import PackedBatch


@dataclass(frozen=True)
class StepData:
    """This rank's part of one global step.

    step: index of the global step, from 0. micro_batches: any number, also none; ranks may differ.
    wait_s: seconds this rank stood still for the data. samples, tokens: counts of this rank's part.
    """

    step: int
    micro_batches: tuple[PackedBatch, ...]
    wait_s: float
    samples: int
    tokens: int


class StepSource(Protocol):
    """A data plan. The order is a pure function of the plan, so the step number is its whole state.

    total_steps: the same on every rank.
    """

    total_steps: int

    def iterate(self, start_step: int) -> Iterator[StepData]:
        """Steps start_step .. total_steps - 1, each once, in order. Batches may lie on the host."""
        ...
