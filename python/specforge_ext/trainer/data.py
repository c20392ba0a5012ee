"""What the trainer reads: a plan of steps, of which this rank gets its part."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from specforge_ext.loader import StepData

__all__ = ["StepData", "StepSource"]


class StepSource(Protocol):
    """A data plan: a pure function, so that the step number is its whole state."""

    @property
    def total_steps(self) -> int:
        """The same on every rank."""
        ...

    def iterate(self, start_step: int) -> Iterator[StepData]:
        """Steps start_step .. total_steps - 1, each once, in order. Batches may lie on the host."""
        ...
