"""Samples in the memory of a GPU: what the stores share that keep them there.

The arena of the shm store with its payload on a GPU (`csrc/transport/device_memory.h`): slots,
leases and waits are the same code. A sample is published when the GPU has written it, which costs
the producer a wait for its own stream; readers then need no event.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from pydantic import Field
from torch import Tensor

from specforge_ext import _C
from specforge_ext.copies import copied
from specforge_ext.records import Sample, SampleRef, TensorRef
from specforge_ext.store import device_memory, payload
from specforge_ext.store.base import StoreConfig, StoreError
from specforge_ext.store.shm import ShmHealth


class DeviceArenaConfig(StoreConfig):
    """device: ordinal of the GPU that holds the samples; None: torch's current one.
    capacity_bytes: payload of the arena, allocated at once when it is opened.
    max_slots: samples that may lie in it at the same time.
    checksum: compute a crc32c of every tensor. Without one, readers cannot verify
        (stream.verify: off).
    high_watermark, low_watermark: as of the shm store.
    """

    device: int | None = Field(default=None, ge=0)
    capacity_bytes: int = Field(default=256 << 20, gt=0, le=1 << 46)
    max_slots: int = Field(default=1024, gt=0, le=1 << 20)
    checksum: bool = False
    high_watermark: float = Field(default=1.0, gt=0, le=1)
    low_watermark: float = Field(default=1.0, gt=0, le=1)


class DeviceArenaWriter:
    """Samples into an arena on a GPU, whoever lets readers in. Any thread may put. Not usable in a
    forked child."""

    def __init__(self, config: DeviceArenaConfig, *, kind: str) -> None:
        self._kind = kind
        self._config = config
        self._open_arena: _C.DeviceArenaProducer | None = _C.DeviceArenaProducer(
            device_memory.use_device(config.device),
            config.capacity_bytes,
            config.max_slots,
            high_watermark=config.high_watermark,
            low_watermark=config.low_watermark,
        )
        self._store = f"{kind}:{self._arena.epoch:016x}"

    @property
    def _arena(self) -> _C.DeviceArenaProducer:
        if self._open_arena is None:
            raise StoreError(f"{self._kind} writer: wanted an open arena, but it was closed")
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
            written = _write(
                device_memory.device_bytes(slot),
                planned,
                tensors,
                checksum=self._config.checksum,
            )
            slot.publish()
        finally:
            if slot.is_open:
                slot.abort()
        return replace(planned, slot=slot.slot, generation=slot.generation, tensors=written)

    def abort(self, ref: SampleRef) -> None:
        """Nobody is going to read this sample any more: as a reader's `ack`. StaleRef."""
        payload.expect_ref(ref, store=self._store)
        self.free(ref.slot, ref.generation)

    def free(self, slot: int, generation: int) -> None:
        """As `abort`, for who keeps a ledger of slots. StaleRef."""
        self._arena.discard(slot, generation)

    @property
    def store(self) -> str:
        """What the refs say of the store."""
        return self._store

    @property
    def epoch(self) -> int:
        return self._arena.epoch

    @property
    def regions(self) -> list[tuple[int, int]]:
        """(address, nbytes) of the slots' pages, on the host, and of the payload, on the GPU."""
        return self._arena.regions

    def reap(self) -> int:
        """Take the leases of ended readers away; how many readers those were."""
        return self._arena.reap()

    def health(self) -> ShmHealth:
        return ShmHealth(**self._arena.stats())

    def close(self) -> None:
        """No more samples, no more readers. Readers that are attached keep what was published."""
        self._open_arena = None


def _write(
    whole: Tensor, planned: SampleRef, tensors: dict[str, Tensor], *, checksum: bool
) -> tuple[TensorRef, ...]:
    """Returns when the device has done it, also if it raises: the slot is free for others then."""
    copied("put", payload.feature_bytes(planned))
    try:
        return payload.copy_into(payload.TensorExtent(whole), planned, tensors, checksum=checksum)
    finally:
        device_memory.wait_for_stream(whole)
