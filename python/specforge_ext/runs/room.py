"""Whether the steps that ranks ask for at a time fit into the store."""

from __future__ import annotations

from collections.abc import Sequence

from specforge_ext.loader import GlobalStep

IDS_AND_MASK_BYTES = 4 + 1
"""Of a token, beside its features."""
SAMPLE_SLACK_BYTES = 8192
"""What rounding to whole pages and the alignment of tensors may cost a sample."""


def room_needed(tokens: int, *, num_samples: int, bytes_per_token: int, in_flight: int) -> int:
    """Bytes of a store for in_flight steps of so many tokens and samples, all ranks'.

    bytes_per_token: of features, as they lie in the store.
    """
    return in_flight * (
        tokens * (bytes_per_token + IDS_AND_MASK_BYTES) + num_samples * SAMPLE_SLACK_BYTES
    )


def check_room(
    steps: Sequence[GlobalStep],
    lengths: Sequence[int],
    bytes_per_token: int,
    *,
    in_flight: int,
    capacity_bytes: int,
) -> None:
    """ValueError if the steps that ranks ask for together could fill the store and never leave it.

    bytes_per_token: of features, as they lie in the store.
    in_flight: steps a rank has asked for at a time, the one it receives included.
    """
    largest = max(steps, key=lambda step: sum(lengths[i] for i in step.samples))
    tokens = sum(lengths[i] for i in largest.samples)
    needed = room_needed(
        tokens,
        num_samples=len(largest.samples),
        bytes_per_token=bytes_per_token,
        in_flight=in_flight,
    )
    if needed > capacity_bytes:
        raise ValueError(
            f"store.capacity_bytes: wanted at least {needed} for {in_flight} steps of up to "
            f"{tokens} tokens (stream.in_flight_steps + 1), got {capacity_bytes}"
        )
