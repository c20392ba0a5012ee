"""Bytes of features copied on their way, counted by the code that copies them.

    with counting() as copies:
        ref = writer.put(sample, layout_hash=layout.hash, timeout_s=1.0)
    copies["put"], copies.total()

Counted are the bytes that a copy writes. Token ids and masks, checksums (which only read) and what
a network stack does inside are not. docs/stores.md has the table of who copies what.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal, get_args

Stage = Literal["gather", "engine", "encode", "put", "transfer", "collate", "device"]
"""gather: layers side by side, in the memory of the target's GPU. engine: out of the target's
activations, to where the sample lies. encode: into a buffer, by a store that cannot encode into its
own memory. put: from a sample's own tensors, or that buffer, into a store. transfer: between the
memories of a store. collate: into a packed batch. device: a batch to the GPU."""

STAGES: tuple[Stage, ...] = get_args(Stage)

_COUNTERS: ContextVar[tuple[Counter[Stage], ...]] = ContextVar("counters", default=())


@contextmanager
def counting() -> Iterator[Counter[Stage]]:
    """What this thread copies within the context, by stage. Contexts may lie in each other."""
    counter: Counter[Stage] = Counter()
    token = _COUNTERS.set((*_COUNTERS.get(), counter))
    try:
        yield counter
    finally:
        _COUNTERS.reset(token)


def copied(stage: Stage, nbytes: int) -> None:
    """For whoever copies features: so many bytes were written."""
    for counter in _COUNTERS.get():
        counter[stage] += nbytes


def copies_from(numbers: Mapping[str, Any]) -> Counter[Stage]:
    """The counter of another process. ValueError for a stage or a number that is none."""
    for stage, nbytes in numbers.items():
        if stage not in STAGES or not isinstance(nbytes, int) or nbytes < 0:
            raise ValueError(
                f"copied: wanted bytes by stage ({', '.join(STAGES)}), got {stage!r}: {nbytes!r}"
            )
    return Counter({stage: numbers[stage] for stage in STAGES if stage in numbers})
