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
    "DeviceArenaConsumer",
    "DeviceArenaLease",
    "DeviceArenaProducer",
    "DeviceArenaReservation",
    "advise_huge_pages",
    "available_isas",
    "block_mask",
    "bytes_crc",
    "cod_chains",
    "copy_crc32c",
    "copy_crc32c_by",
    "crc32c",
    "crc32c_by",
    "crc32c_combine",
    "crc32c_paths",
    "crc32c_table",
    "cuda_compiled",
    "draw_anchors",
    "fp8_encode",
    "fp8_pack",
    "fp8_unpack",
    "has_fast_bf16",
    "isa",
    "loss_rows",
    "own_keys_grads",
    "own_keys_merge",
    "pack_samples",
    "ref_from_bytes",
    "ref_is_valid",
    "ref_to_bytes",
    "row_stats",
    "set_isa",
    "step_sums",
    "stored_sample",
    "tensor_views",
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
    def address(self) -> int: ...
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
        *,
        high_watermark: typing.SupportsFloat | typing.SupportsIndex = 1.0,
        low_watermark: typing.SupportsFloat | typing.SupportsIndex = 1.0,
    ) -> None:
        """
        Stops admitting above the high mark, resumes at the low one (shares of the capacity).
        """
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
    def serve(self, path: str) -> str:
        """
        Let readers in at a unix socket as well; its address for them.
        """
    def stats(self) -> dict[str, int]: ...
    @property
    def address(self) -> str: ...
    @property
    def epoch(self) -> int: ...
    @property
    def regions(self) -> list[tuple[int, int]]:
        """
        (address, nbytes) of the slots' pages and of the payload.
        """

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
        shm:PID:... or shm:unix:... ProducerLost, TransferTimeout, ValueError.
        """
    def acknowledge(
        self,
        slot: typing.SupportsInt | typing.SupportsIndex,
        generation: typing.SupportsInt | typing.SupportsIndex,
    ) -> None: ...
    def before_unmap(self, call: collections.abc.Callable[[], None]) -> None:
        """
        Called once, when the last lease and this reader are gone.
        """
    def lease(
        self,
        slot: typing.SupportsInt | typing.SupportsIndex,
        generation: typing.SupportsInt | typing.SupportsIndex,
    ) -> ArenaLease:
        """
        The slot's bytes, until the last buffer of the result is gone. StaleRef.
        """
    def open(
        self, ref: typing.Any, store: str, layout_hash: str, from_dlpack: typing.Any
    ) -> typing.Any:
        """
        A leased StoredSample; None for a ref of another. StaleRef.
        """
    def reap(self) -> int:
        """
        Free the slots an ended producer was writing; how many they were.
        """
    @property
    def epoch(self) -> int: ...
    @property
    def producer_alive(self) -> bool: ...
    @property
    def regions(self) -> list[tuple[int, int]]:
        """
        (address, nbytes) of the slots' pages and of the payload.
        """

class DeviceArenaLease:
    def dlpack(
        self, device_type: typing.SupportsInt | typing.SupportsIndex = 2
    ) -> typing_extensions.CapsuleType:
        """
        The bytes as a DLPack capsule, which keeps the lease.
        """
    @property
    def nbytes(self) -> int: ...

class DeviceArenaConsumer:
    def __init__(self, device: typing.SupportsInt | typing.SupportsIndex, address: str) -> None:
        """
        shm:unix:PATH:EPOCH. ProducerLost, TransferTimeout, ValueError.
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
    ) -> DeviceArenaLease:
        """
        The slot's bytes, until the last view of the result is gone. StaleRef.
        """
    def reap(self) -> int: ...
    @property
    def epoch(self) -> int: ...
    @property
    def producer_alive(self) -> bool: ...

class DeviceArenaReservation:
    def abort(self) -> None: ...
    def dlpack(
        self, device_type: typing.SupportsInt | typing.SupportsIndex = 2
    ) -> typing_extensions.CapsuleType:
        """
        The bytes as a DLPack capsule. Drop what is made of it at `publish`.
        """
    def publish(self) -> None:
        """
        What was written must be complete: not queued on a stream.
        """
    @property
    def address(self) -> int: ...
    @property
    def generation(self) -> int: ...
    @property
    def is_open(self) -> bool: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def slot(self) -> int: ...

class DeviceArenaProducer:
    def __init__(
        self,
        device: typing.SupportsInt | typing.SupportsIndex,
        capacity_bytes: typing.SupportsInt | typing.SupportsIndex,
        max_slots: typing.SupportsInt | typing.SupportsIndex,
        *,
        high_watermark: typing.SupportsFloat | typing.SupportsIndex = 1.0,
        low_watermark: typing.SupportsFloat | typing.SupportsIndex = 1.0,
    ) -> None:
        """
        Payload in the memory of the GPU of this ordinal. RuntimeError without driver or room.
        """
    def acquire(
        self,
        nbytes: typing.SupportsInt | typing.SupportsIndex,
        timeout_s: typing.SupportsFloat | typing.SupportsIndex,
    ) -> DeviceArenaReservation:
        """
        A slot to write to. Waits without the GIL. StoreFull, TransferTimeout.
        """
    def discard(
        self,
        slot: typing.SupportsInt | typing.SupportsIndex,
        generation: typing.SupportsInt | typing.SupportsIndex,
    ) -> None: ...
    def reader(self) -> DeviceArenaConsumer:
        """
        One in this process, of the same addresses: no second mapping of the memory.
        """
    def reap(self) -> int:
        """
        Return the leases of ended readers; the number of those readers.
        """
    def serve(self, path: str) -> str:
        """
        Let readers in at a unix socket; its address for them.
        """
    def stats(self) -> dict[str, int]: ...
    @property
    def epoch(self) -> int: ...
    @property
    def regions(self) -> list[tuple[int, int]]: ...

def advise_huge_pages(tensor: torch.Tensor) -> None: ...
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
def bytes_crc(
    data: torch.Tensor,
    part_crc: torch.Tensor,
    crc: torch.Tensor,
    stream: typing.SupportsInt | typing.SupportsIndex = 0,
) -> None:
    """
    part_crc: one for each 64 KiB that were begun.
    """

def cod_chains(
    loss_mask: torch.Tensor,
    cu_seqlens: torch.Tensor,
    sample_keys: torch.Tensor,
    seed: typing.SupportsInt | typing.SupportsIndex,
    step: typing.SupportsInt | typing.SupportsIndex,
    ratio: typing.SupportsFloat | typing.SupportsIndex,
    min_ratio: typing.SupportsFloat | typing.SupportsIndex,
    anchors: torch.Tensor,
    cu_depths: torch.Tensor,
) -> None: ...
def copy_crc32c(
    dst: torch.Tensor, src: torch.Tensor, crc: typing.SupportsInt | typing.SupportsIndex = 0
) -> int: ...
def copy_crc32c_by(
    path: str,
    dst: torch.Tensor,
    src: torch.Tensor,
    crc: typing.SupportsInt | typing.SupportsIndex = 0,
    streams: bool = False,
) -> int: ...
def crc32c(
    data: typing_extensions.Buffer, crc: typing.SupportsInt | typing.SupportsIndex = 0
) -> int: ...
def crc32c_by(
    path: str, data: torch.Tensor, crc: typing.SupportsInt | typing.SupportsIndex = 0
) -> int: ...
def crc32c_combine(
    crc_a: typing.SupportsInt | typing.SupportsIndex,
    crc_b: typing.SupportsInt | typing.SupportsIndex,
    nbytes_b: typing.SupportsInt | typing.SupportsIndex,
) -> int: ...
def crc32c_paths() -> list[str]:
    """
    For tests: the implementations this CPU can run.
    """

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
def fp8_encode(x: torch.Tensor, q: torch.Tensor) -> None:
    """
    For tests.
    """

def fp8_pack(
    x: torch.Tensor,
    payload: torch.Tensor,
    scale: torch.Tensor,
    row_crc: torch.Tensor,
    summary: torch.Tensor,
    checksum: bool,
    stream: typing.SupportsInt | typing.SupportsIndex = 0,
) -> None: ...
def fp8_unpack(
    payload: torch.Tensor,
    scale: torch.Tensor,
    y: torch.Tensor,
    row_crc: torch.Tensor,
    summary: torch.Tensor,
    checksum: bool,
    stream: typing.SupportsInt | typing.SupportsIndex = 0,
) -> None: ...
def has_fast_bf16() -> bool: ...
def isa() -> str: ...
def loss_rows(
    logits: torch.Tensor,
    teacher: torch.Tensor | None,
    row_to_teacher: torch.Tensor,
    weight: torch.Tensor,
    loss: torch.Tensor,
    accepted: torch.Tensor,
    correct: torch.Tensor,
    top_prob: torch.Tensor,
    entropy: torch.Tensor,
    *,
    kind: str,
    temperature: typing.SupportsFloat | typing.SupportsIndex,
    beta: typing.SupportsFloat | typing.SupportsIndex,
    hard_weight: typing.SupportsFloat | typing.SupportsIndex,
    writes_gradient: bool,
    teacher_lse: torch.Tensor | None = None,
    teacher_argmax: torch.Tensor | None = None,
    label: torch.Tensor | None = None,
    kl_weight: torch.Tensor | None = None,
    stream: typing.SupportsInt | typing.SupportsIndex = 0,
) -> None: ...
def own_keys_grads(
    grad_out: torch.Tensor,
    query: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    grad_query: torch.Tensor,
    keys: collections.abc.Sequence[torch.Tensor],
    values: collections.abc.Sequence[torch.Tensor],
    rows: collections.abc.Sequence[torch.Tensor | None],
    grad_keys: collections.abc.Sequence[torch.Tensor],
    grad_values: collections.abc.Sequence[torch.Tensor],
    scale: typing.SupportsFloat | typing.SupportsIndex,
    stream: typing.SupportsInt | typing.SupportsIndex = 0,
) -> None: ...
def own_keys_merge(
    query: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    keys: collections.abc.Sequence[torch.Tensor],
    values: collections.abc.Sequence[torch.Tensor],
    rows: collections.abc.Sequence[torch.Tensor | None],
    scale: typing.SupportsFloat | typing.SupportsIndex,
    stream: typing.SupportsInt | typing.SupportsIndex = 0,
) -> None: ...
def pack_samples(
    ids: collections.abc.Sequence[torch.Tensor],
    masks: collections.abc.Sequence[torch.Tensor],
    features: collections.abc.Sequence[collections.abc.Sequence[torch.Tensor]],
    scales: collections.abc.Sequence[collections.abc.Sequence[torch.Tensor | None]],
    out_ids: torch.Tensor,
    out_mask: torch.Tensor,
    positions: torch.Tensor,
    cu_seqlens: torch.Tensor,
    out_features: collections.abc.Sequence[torch.Tensor],
    stream: typing.SupportsInt | typing.SupportsIndex = 0,
) -> None: ...
def ref_from_bytes(data: bytes) -> typing.Any:
    """
    A SampleRef; None for other bytes than ref_to_bytes makes.
    """

def ref_is_valid(ref: typing.Any) -> bool:
    """
    False also for texts beyond ASCII and values of subclasses. AttributeError for no ref.
    """

def ref_to_bytes(ref: typing.Any) -> bytes | None:
    """
    None where ref_is_valid says False.
    """

def row_stats(
    logits: torch.Tensor,
    lse: torch.Tensor,
    argmax: torch.Tensor,
    stream: typing.SupportsInt | typing.SupportsIndex = 0,
) -> None: ...
def set_isa(name: str) -> None: ...
def step_sums(
    loss: torch.Tensor,
    accepted: torch.Tensor,
    correct: torch.Tensor,
    top_prob: torch.Tensor,
    entropy: torch.Tensor,
    weight: torch.Tensor,
    step: torch.Tensor,
    sums: torch.Tensor,
    stream: typing.SupportsInt | typing.SupportsIndex = 0,
) -> None: ...
def stored_sample(extent: typing.Any, ref: typing.Any, from_dlpack: typing.Any) -> typing.Any:
    """
    A StoredSample of such views. ValueError for what does not lie in the buffer.
    """

def tensor_views(
    extent: typing.Any, tensors: tuple[typing.Any, ...], from_dlpack: typing.Any
) -> list[typing.Any]:
    """
    Views of a buffer, for each of a ref's tensors; codes, then scales of encoded ones.
    """

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
