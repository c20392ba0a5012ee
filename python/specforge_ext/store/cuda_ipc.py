"""Samples between processes of one host that stay in the memory of a GPU.

The arena of the shm store with its payload on a GPU (`csrc/transport/device_memory.h`): slots,
leases and waits are the same code. The memory is shared by a file descriptor of the CUDA driver's
virtual memory management, so that it lives until the last process that maps it has ended.

A sample is published when the GPU has written it, which costs the producer a wait for its own
stream; readers then need no event. S is the number of tokens of a sample.
"""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from pydantic import Field
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from specforge_ext import _C
from specforge_ext.records import Sample, SampleRef, TensorRef
from specforge_ext.store import payload
from specforge_ext.store.base import Capabilities, StoreConfig, StoreError
from specforge_ext.store.direct import rungs
from specforge_ext.store.direct_facts import probe
from specforge_ext.store.shm import ShmHealth

DLPACK_DEVICE = 2
"""kDLCUDA: what the arena's bytes are to torch."""

CAPABILITIES = Capabilities(
    kind="cuda_ipc",
    protocol="cuda",
    zero_copy=True,
    across_hosts=False,
    outlives_producer=True,
    on_gpu=True,
)


class CudaIpcConfig(StoreConfig):
    """device: ordinal of the GPU that holds the samples; None: torch's current one. Readers may be
        on another one that reaches it.
    capacity_bytes: payload of the arena, allocated at once when it is opened.
    max_slots: samples that may lie in it at the same time.
    checksum: compute a crc32c of every tensor. It costs a copy to the host on either side; without
        one, readers cannot verify (stream.verify: off).
    high_watermark, low_watermark: as of the shm store.
    socket_path: where readers are let in, in a directory of this user's with mode 0700; for
        containers, on a volume that both see. None: a directory of the store's own, which a killed
        producer leaves behind.
    """

    device: int | None = Field(default=None, ge=0)
    capacity_bytes: int = Field(default=256 << 20, gt=0, le=1 << 46)
    max_slots: int = Field(default=1024, gt=0, le=1 << 20)
    checksum: bool = False
    high_watermark: float = Field(default=1.0, gt=0, le=1)
    low_watermark: float = Field(default=1.0, gt=0, le=1)
    socket_path: str | None = None


def unavailable() -> str | None:
    """Why this host cannot have one, or None."""
    [rung] = [rung for rung in rungs(probe()) if rung.name == "gpu_vmm"]
    return "; ".join(rung.why_not) or None


class CudaIpcStore:
    """The registered store."""

    Config = CudaIpcConfig

    @staticmethod
    def unavailable() -> str | None:
        """Why this host cannot have one, or None."""
        return unavailable()

    @staticmethod
    def writer(config: CudaIpcConfig) -> CudaIpcWriter:
        """A new, empty arena. StoreError without a GPU; RuntimeError if the memory is not there."""
        return CudaIpcWriter(config)

    @staticmethod
    def reader(address: str) -> CudaIpcReader:
        """Attach to a writer's `address()`, for torch's current device, as the same user.

        As the shm store's; RuntimeError if this device does not reach that memory.
        """
        return CudaIpcReader(address)


class CudaIpcWriter:
    """Any thread may put. Not usable in a forked child."""

    def __init__(self, config: CudaIpcConfig) -> None:
        _expect_available()
        self._config = config
        self._open_arena: _C.DeviceArenaProducer | None = _C.DeviceArenaProducer(
            use_device(config.device),
            config.capacity_bytes,
            config.max_slots,
            high_watermark=config.high_watermark,
            low_watermark=config.low_watermark,
        )
        self._store = _store_id(self._arena.epoch)
        self._remove = _nothing
        path = config.socket_path
        if path is None:
            folder = Path(tempfile.mkdtemp(prefix="specforge-arena-"))
            self._remove = weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
            path = str(folder / "socket")
        self._address = self._arena.serve(path)

    @property
    def _arena(self) -> _C.DeviceArenaProducer:
        if self._open_arena is None:
            raise StoreError("cuda_ipc writer: wanted an open arena, but it was closed")
        return self._open_arena

    @property
    def capacity_bytes(self) -> int:
        return self.health().capacity_bytes

    def put(
        self,
        sample: Sample,
        *,
        layout_hash: str,
        timeout_s: float,
        layers: Mapping[str, int] | None = None,
    ) -> SampleRef:
        """Copy a sample in on the current stream, wait for that, and publish it.

        As `StoreWriter.put`, and features may be on a GPU; the arena's encodes them.
        """
        planned, tensors = payload.plan_sample(
            sample,
            store=self._store,
            layout_hash=layout_hash,
            encoding=self._config.encoding,
            layers=layers,
            on_gpu=True,
        )
        slot = self._arena.acquire(planned.nbytes, timeout_s)
        try:
            written = _write(device_bytes(slot), planned, tensors, checksum=self._config.checksum)
            slot.publish()
        finally:
            if slot.is_open:
                slot.abort()
        return replace(planned, slot=slot.slot, generation=slot.generation, tensors=written)

    def abort(self, ref: SampleRef) -> None:
        """Nobody is going to read this sample any more: as a reader's `ack`. StaleRef."""
        payload.expect_ref(ref, store=self._store)
        self._arena.discard(ref.slot, ref.generation)

    def reap(self) -> int:
        """Take the leases of ended readers away; how many readers those were."""
        return self._arena.reap()

    def health(self) -> ShmHealth:
        return ShmHealth(**self._arena.stats())

    def capabilities(self) -> Capabilities:
        return CAPABILITIES

    def address(self) -> str:
        """What `CudaIpcStore.reader` wants: "shm:unix:PATH:EPOCH"."""
        self._arena  # noqa: B018 - a closed store has none
        return self._address

    def close(self) -> None:
        """No more samples, no more readers. Readers that are attached keep what was published."""
        self._open_arena = None
        self._remove()


class CudaIpcReader:
    """Any thread may open and acknowledge. Not usable in a forked child.

    Samples that were published stay readable when the producer dies.
    """

    def __init__(self, address: str) -> None:
        _expect_available()
        self._open_arena: _C.DeviceArenaConsumer | None = _C.DeviceArenaConsumer(
            use_device(None), address
        )
        self._store = _store_id(self._arena.epoch)

    @property
    def _arena(self) -> _C.DeviceArenaConsumer:
        if self._open_arena is None:
            raise StoreError("cuda_ipc reader: wanted an open arena, but it was closed")
        return self._open_arena

    @property
    def producer_alive(self) -> bool:
        return self._arena.producer_alive

    def open(self, ref: SampleRef, *, layout_hash: str, verify: bool) -> payload.SampleLease:
        """Lease a sample: features are views of the GPU's memory, which must not be written to;
        the prompt is a copy on the CPU.

        verify: compare the checksums, on the host. ValueError for an impossible ref;
        LayoutMismatch, StaleRef, CorruptFeature.
        """
        payload.expect_ref(ref, store=self._store)
        payload.expect_layout(ref, layout_hash)
        extent = payload.TensorExtent(device_bytes(self._arena.lease(ref.slot, ref.generation)))
        return payload.lease(extent, ref, verify=verify)

    def ack(self, ref: SampleRef) -> None:
        """The sample is done with: its memory is reused once no lease is left.

        StaleRef, also the second time.
        """
        payload.expect_ref(ref, store=self._store)
        self._arena.acknowledge(ref.slot, ref.generation)

    def capabilities(self) -> Capabilities:
        return CAPABILITIES

    def close(self) -> None:
        """Leave the arena; it stays mapped while leases or views of it live."""
        self._open_arena = None


def device_bytes(slot: _C.DeviceArenaReservation | _C.DeviceArenaLease) -> Tensor:
    """[nbytes] uint8 on the arena's device, which keeps the slot as it is."""
    if slot.nbytes == 0:
        return torch.empty(0, dtype=torch.uint8)
    whole: Tensor = from_dlpack(slot.dlpack(DLPACK_DEVICE))
    return whole


def use_device(ordinal: int | None) -> int:
    """That device, or torch's current one, with a context, in which memory can be mapped."""
    device = torch.cuda.current_device() if ordinal is None else ordinal
    torch.cuda.synchronize(device)
    return device


def _write(
    whole: Tensor, planned: SampleRef, tensors: dict[str, Tensor], *, checksum: bool
) -> tuple[TensorRef, ...]:
    """Returns when the device has done it, also if it raises: the slot is free for others then."""
    try:
        return payload.copy_into(payload.TensorExtent(whole), planned, tensors, checksum=checksum)
    finally:
        if whole.is_cuda:
            torch.cuda.current_stream(whole.device).synchronize()


def _expect_available() -> None:
    reason = unavailable()
    if reason is not None:
        raise StoreError(f"cuda_ipc is not available: {reason}")


def _nothing() -> None:
    """Where there is nothing to remove."""


def _store_id(epoch: int) -> str:
    return f"cuda_ipc:{epoch:016x}"
