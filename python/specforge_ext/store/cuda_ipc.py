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
from pathlib import Path

from specforge_ext import _C
from specforge_ext.records import SampleRef
from specforge_ext.store import device_memory, payload
from specforge_ext.store.base import Capabilities, StoreError
from specforge_ext.store.device_arena import DeviceArenaConfig, DeviceArenaWriter
from specforge_ext.store.direct import rungs
from specforge_ext.store.direct_facts import probe

CAPABILITIES = Capabilities(
    kind="cuda_ipc",
    protocol="cuda",
    zero_copy=True,
    across_hosts=False,
    outlives_producer=True,
    on_gpu=True,
)


class CudaIpcConfig(DeviceArenaConfig):
    """socket_path: where readers are let in, in a directory of this user's with mode 0700; for
    containers, on a volume that both see. None: a directory of the store's own, which a killed
    producer leaves behind. Readers may be on another GPU that reaches `device`.
    """

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


class CudaIpcWriter(DeviceArenaWriter):
    """Any thread may put. Not usable in a forked child."""

    def __init__(self, config: CudaIpcConfig) -> None:
        _expect_available()
        super().__init__(config, kind="cuda_ipc")
        self._remove = _nothing
        path = config.socket_path
        if path is None:
            folder = Path(tempfile.mkdtemp(prefix="specforge-arena-"))
            self._remove = weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
            path = str(folder / "socket")
        self._address = self._arena.serve(path)

    def capabilities(self) -> Capabilities:
        return CAPABILITIES

    def address(self) -> str:
        """What `CudaIpcStore.reader` wants: "shm:unix:PATH:EPOCH"."""
        self._arena  # noqa: B018 - a closed store has none
        return self._address

    def close(self) -> None:
        """As the arena's; the socket goes."""
        super().close()
        self._remove()


class CudaIpcReader:
    """Any thread may open and acknowledge. Not usable in a forked child.

    Samples that were published stay readable when the producer dies.
    """

    def __init__(self, address: str) -> None:
        _expect_available()
        self._device = device_memory.use_device(None)
        self._open_arena: _C.DeviceArenaConsumer | None = _C.DeviceArenaConsumer(
            self._device, address
        )
        self._store = f"cuda_ipc:{self._arena.epoch:016x}"

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

        verify: compare the checksums, which the GPU computes. ValueError for an impossible ref;
        LayoutMismatch, StaleRef, CorruptFeature.
        """
        payload.expect_ref(ref, store=self._store)
        payload.expect_layout(ref, layout_hash)
        with device_memory.own_stream(self._device):
            return payload.lease(self._extent(ref), ref, verify=verify)

    def _extent(self, ref: SampleRef) -> payload.TensorExtent:
        lease = self._arena.lease(ref.slot, ref.generation)
        return payload.TensorExtent(device_memory.device_bytes(lease))

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


def _expect_available() -> None:
    reason = unavailable()
    if reason is not None:
        raise StoreError(f"cuda_ipc is not available: {reason}")


def _nothing() -> None:
    """Where there is nothing to remove."""
