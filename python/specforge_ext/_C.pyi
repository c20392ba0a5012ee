"""
Native kernels and transport of specforge_ext. Use specforge_ext.ops and .store instead.
"""

from __future__ import annotations

import collections.abc
import typing

import torch
import typing_extensions

__all__: list[str] = [
    "ArenaConsumer",
    "ArenaLease",
    "ArenaProducer",
    "ArenaReservation",
    "available_isas",
    "block_mask",
    "copy_crc32c",
    "crc32c",
    "crc32c_table",
    "cuda_compiled",
    "draw_anchors",
    "has_fast_bf16",
    "isa",
    "pack_samples",
    "row_stats",
    "set_isa",
    "soft_ce_rows",
    "step_sums",
    "ttt_counts",
    "ttt_fill",
]

class ArenaReservation:
    def abort(self) -> None: ...
    def crc32c(
        self,
        offset: typing.SupportsInt | typing.SupportsIndex,
        nbytes: typing.SupportsInt | typing.SupportsIndex,
    ) -> int: ...
    def publish(self) -> None: ...
    def write(
        self,
        offset: typing.SupportsInt | typing.SupportsIndex,
        source: typing_extensions.Buffer,
        checksum: bool,
    ) -> int | None:
        """
        Copy contiguous bytes in; their crc32c if `checksum`. Runs without the GIL.
        """
    @property
    def generation(self) -> int: ...
    @property
    def is_open(self) -> bool: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def slot(self) -> int: ...

class ArenaProducer:
    def __init__(
        self,
        capacity_bytes: typing.SupportsInt | typing.SupportsIndex,
        max_slots: typing.SupportsInt | typing.SupportsIndex,
    ) -> None: ...
    def acquire(
        self,
        nbytes: typing.SupportsInt | typing.SupportsIndex,
        timeout_s: typing.SupportsFloat | typing.SupportsIndex,
    ) -> ArenaReservation:
        """
        A writable slot. Waits without the GIL. StoreFull, TransferTimeout.
        """
    def discard(
        self,
        slot: typing.SupportsInt | typing.SupportsIndex,
        generation: typing.SupportsInt | typing.SupportsIndex,
    ) -> None: ...
    def reap(self) -> int:
        """
        Return the leases of ended readers; the number of those readers.
        """
    def stats(self) -> dict[str, int]: ...
    @property
    def address(self) -> str: ...
    @property
    def epoch(self) -> int: ...

class ArenaLease:
    def crc32c(
        self,
        offset: typing.SupportsInt | typing.SupportsIndex,
        nbytes: typing.SupportsInt | typing.SupportsIndex,
    ) -> int: ...
    @property
    def nbytes(self) -> int: ...

class ArenaConsumer:
    def __init__(self, address: str) -> None:
        """
        ProducerLost, ValueError if it is not an arena of this user.
        """
    def acknowledge(
        self,
        slot: typing.SupportsInt | typing.SupportsIndex,
        generation: typing.SupportsInt | typing.SupportsIndex,
    ) -> None: ...
    def lease(
        self,
        slot: typing.SupportsInt | typing.SupportsIndex,
        generation: typing.SupportsInt | typing.SupportsIndex,
    ) -> ArenaLease:
        """
        The slot's bytes, until the last buffer of the result is gone. StaleRef.
        """
    @property
    def epoch(self) -> int: ...
    @property
    def producer_alive(self) -> bool: ...

def available_isas() -> list[str]: ...
def block_mask(
    anchors: torch.Tensor,
    cu_anchors: torch.Tensor,
    cu_seqlens: torch.Tensor,
    context: typing.SupportsInt | typing.SupportsIndex,
    block_size: typing.SupportsInt | typing.SupportsIndex,
    window: typing.SupportsInt | typing.SupportsIndex,
    q_tile: typing.SupportsInt | typing.SupportsIndex,
    kv_tile: typing.SupportsInt | typing.SupportsIndex,
    kv: collections.abc.Sequence[torch.Tensor],
    q: collections.abc.Sequence[torch.Tensor],
    stream: typing.SupportsInt | typing.SupportsIndex = 0,
) -> None: ...
def copy_crc32c(
    dst: torch.Tensor, src: torch.Tensor, crc: typing.SupportsInt | typing.SupportsIndex = 0
) -> int: ...
def crc32c(
    data: typing_extensions.Buffer, crc: typing.SupportsInt | typing.SupportsIndex = 0
) -> int: ...
def crc32c_table(
    data: typing_extensions.Buffer, crc: typing.SupportsInt | typing.SupportsIndex = 0
) -> int: ...
def draw_anchors(
    loss_mask: torch.Tensor,
    cu_seqlens: torch.Tensor,
    sample_keys: torch.Tensor,
    seed: typing.SupportsInt | typing.SupportsIndex,
    step: typing.SupportsInt | typing.SupportsIndex,
    max_anchors: typing.SupportsInt | typing.SupportsIndex,
    anchors: torch.Tensor,
    cu_anchors: torch.Tensor,
) -> None: ...
def has_fast_bf16() -> bool: ...
def isa() -> str: ...
def pack_samples(
    ids: collections.abc.Sequence[torch.Tensor],
    masks: collections.abc.Sequence[torch.Tensor],
    features: collections.abc.Sequence[collections.abc.Sequence[torch.Tensor]],
    out_ids: torch.Tensor,
    out_mask: torch.Tensor,
    positions: torch.Tensor,
    cu_seqlens: torch.Tensor,
    out_features: collections.abc.Sequence[torch.Tensor],
) -> None: ...
def row_stats(
    logits: torch.Tensor,
    lse: torch.Tensor,
    argmax: torch.Tensor,
    stream: typing.SupportsInt | typing.SupportsIndex = 0,
) -> None: ...
def set_isa(name: str) -> None: ...
def soft_ce_rows(
    logits: torch.Tensor,
    teacher: torch.Tensor,
    row_to_teacher: torch.Tensor,
    weight: torch.Tensor,
    teacher_lse: torch.Tensor,
    loss: torch.Tensor,
    accepted: torch.Tensor,
    correct: torch.Tensor,
    stream: typing.SupportsInt | typing.SupportsIndex = 0,
) -> None: ...
def step_sums(
    loss: torch.Tensor,
    accepted: torch.Tensor,
    correct: torch.Tensor,
    weight: torch.Tensor,
    step: torch.Tensor,
    sums: torch.Tensor,
    stream: typing.SupportsInt | typing.SupportsIndex = 0,
) -> None: ...
def ttt_counts(
    mask: torch.Tensor,
    cu_seqlens: torch.Tensor,
    counts: torch.Tensor,
    stream: typing.SupportsInt | typing.SupportsIndex = 0,
) -> None: ...
def ttt_fill(
    mask: torch.Tensor,
    cu_seqlens: torch.Tensor,
    counts: torch.Tensor,
    active: torch.Tensor,
    parent: torch.Tensor,
    pair_source: torch.Tensor,
    pair_step: torch.Tensor,
    pair_teacher: torch.Tensor,
    teacher_rows: torch.Tensor,
    stream: typing.SupportsInt | typing.SupportsIndex = 0,
) -> None: ...

__commit__: str
__version__: str
cuda_compiled: bool
