"""Where the loader's samples come from: a link to whoever fills the store."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from specforge_ext.copies import Stage
from specforge_ext.records import SampleRef


@dataclass(frozen=True)
class Skipped:
    """A sample that could not be produced, at its place in the order."""

    sample_id: str
    reason: str


@dataclass(frozen=True)
class Delivery:
    """The samples of one rank's share of one step: in the store, or named with why not.

    copied: bytes of features that the producer copied for it, by stage (copies.py).
    """

    step: int
    refs: tuple[SampleRef, ...]
    skipped: tuple[Skipped, ...]
    copied: Mapping[Stage, int] = field(default_factory=dict)


class FeatureLink(Protocol):
    """One rank's connection to a producer. Requests are answered in the order they were made."""

    def request(self, step: int, sample_ids: Sequence[str]) -> None: ...

    def receive(self, *, timeout_s: float) -> Delivery:
        """The answer to the oldest open request. ProducerLost; TransferTimeout at the deadline."""
        ...

    def close(self) -> None: ...
