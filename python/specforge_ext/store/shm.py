"""Samples between processes of one host, through a pooled arena in shared memory.

One writer per arena, up to 16 reading processes at a time. The native arena (`csrc/transport`) owns
slots, leases and waiting; here samples become bytes in it, and bytes become tensors again without a
copy. S is the number of tokens of a sample.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Self

import torch
from pydantic import Field
from torch import Tensor

from specforge_ext import _C
from specforge_ext.config import Config
from specforge_ext.records import (
    DTYPE_NAMES,
    DTYPES,
    FeatureLayout,
    Prompt,
    Sample,
    SampleRef,
    TensorRef,
)
from specforge_ext.store.base import CorruptFeature, LayoutMismatch, StaleRef, StoreError
from specforge_ext.store.ref import check_ref, plan_tensors


class ShmConfig(Config):
    """capacity_bytes: payload of the arena, allocated and touched at once when it is opened.
    max_slots: samples that may lie in it at the same time.
    checksum: compute a crc32c of every tensor while it is copied in. Without one, readers cannot
        verify (stream.verify: false).
    """

    capacity_bytes: int = Field(default=256 << 20, gt=0, le=1 << 46)
    max_slots: int = Field(default=1024, gt=0, le=1 << 20)
    checksum: bool = True


@dataclass(frozen=True)
class ShmHealth:
    """An arena at one moment. used_bytes counts whole pages; draining slots are acknowledged, but
    still looked at."""

    capacity_bytes: int
    used_bytes: int
    largest_free_bytes: int
    slots_free: int
    slots_writing: int
    slots_ready: int
    slots_leased: int
    slots_draining: int
    num_readers: int


class ShmStore:
    """The registered store: opens either side of an arena."""

    Config = ShmConfig

    @staticmethod
    def writer(config: ShmConfig) -> ShmWriter:
        """A new, empty arena that lives as long as this process and its readers.

        RuntimeError if the memory is not to be had.
        """
        return ShmWriter(config)

    @staticmethod
    def reader(address: str) -> ShmReader:
        """Attach to a writer's `address()`, on the same host and as the same user.

        ProducerLost if it has ended or closed its arena; StoreError if 16 readers are attached
        already; ValueError if the address does not lead to an arena of this user.
        """
        return ShmReader(address)


class ShmWriter:
    """Any thread may put. Not usable in a forked child."""

    def __init__(self, config: ShmConfig) -> None:
        self._checksum = config.checksum
        self._open_arena: _C.ArenaProducer | None = _C.ArenaProducer(
            config.capacity_bytes, config.max_slots
        )
        self._store = _store_id(self._arena.epoch)

    @property
    def _arena(self) -> _C.ArenaProducer:
        if self._open_arena is None:
            raise StoreError("shm writer: wanted an open arena, but it was closed")
        return self._open_arena

    @property
    def capacity_bytes(self) -> int:
        return self.health().capacity_bytes

    def put(self, sample: Sample, *, layout_hash: str, timeout_s: float) -> SampleRef:
        """Copy a sample in and publish it; waits for room outside the GIL.

        features[name]: [S, width], any of DTYPES, CPU. ValueError for other tensors; StoreFull at
        once if it can never fit; TransferTimeout if readers free no room in `timeout_s`.
        """
        tensors = _tensors_of(sample)
        planned = _plan(sample.prompt, _shapes_of(tensors), self._store, layout_hash)
        slot = self._arena.acquire(planned.nbytes, timeout_s)
        try:
            written = tuple(
                replace(t, checksum=slot.write(t.offset, _bytes(tensors[t.name]), self._checksum))
                for t in planned.tensors
            )
            slot.publish()
        finally:
            if slot.is_open:
                slot.abort()
        return replace(planned, slot=slot.slot, generation=slot.generation, tensors=written)

    def reserve(self, prompt: Prompt, layout: FeatureLayout, *, timeout_s: float) -> ShmReservation:
        """Room for a sample whose features the caller writes. StoreFull, TransferTimeout."""
        num_tokens = len(prompt)
        shapes = {spec.name: (spec.dtype, (num_tokens, spec.width)) for spec in layout.features}
        planned = _plan(prompt, shapes, self._store, layout.hash)
        slot = self._arena.acquire(planned.nbytes, timeout_s)
        return ShmReservation(slot, planned, prompt, checksum=self._checksum)

    def discard(self, ref: SampleRef) -> None:
        """Nobody is going to read this sample any more: as a reader's `ack`. StaleRef."""
        _check_store(ref, self._store)
        self._arena.discard(ref.slot, ref.generation)

    def reap(self) -> int:
        """Take the leases of ended readers away; how many readers those were.

        Their samples can be opened again until they are acknowledged. `put` does so while it waits.
        """
        return self._arena.reap()

    def health(self) -> ShmHealth:
        return ShmHealth(**self._arena.stats())

    def address(self) -> str:
        """What `ShmStore.reader` wants: "shm:PID:START:FD:EPOCH"."""
        return self._arena.address

    def close(self) -> None:
        """No more samples, no more readers. Readers that are attached keep what was published."""
        self._open_arena = None


class ShmReservation:
    """Room for one sample. features[name]: [S, width] writable views, of unspecified content.

    Drop the views at `publish`: from then on the memory belongs to the readers.
    """

    def __init__(
        self, slot: _C.ArenaReservation, planned: SampleRef, prompt: Prompt, *, checksum: bool
    ) -> None:
        self._slot = slot
        self._checksum = checksum
        self._planned = replace(planned, slot=slot.slot, generation=slot.generation)
        self.features = _views(slot, planned)
        for name in ("input_ids", "loss_mask"):
            self.features.pop(name).copy_(getattr(prompt, name))

    def publish(self) -> SampleRef:
        """Make the sample readable. ValueError if that, or `abort`, was done before."""
        tensors = self._planned.tensors
        if self._checksum:
            crc32c = self._slot.crc32c
            tensors = tuple(replace(t, checksum=crc32c(t.offset, t.nbytes)) for t in tensors)
        self._slot.publish()
        self.features = {}
        return replace(self._planned, tensors=tensors)

    def abort(self) -> None:
        """Give the room back. ValueError if that, or `publish`, was done before."""
        self._slot.abort()
        self.features = {}


class ShmReader:
    """Any thread may open and acknowledge. Not usable in a forked child.

    Samples that were published stay readable when the producer dies.
    """

    def __init__(self, address: str) -> None:
        self._open_arena: _C.ArenaConsumer | None = _C.ArenaConsumer(address)
        self._store = _store_id(self._arena.epoch)

    @property
    def _arena(self) -> _C.ArenaConsumer:
        if self._open_arena is None:
            raise StoreError("shm reader: wanted an open arena, but it was closed")
        return self._open_arena

    @property
    def producer_alive(self) -> bool:
        return self._arena.producer_alive

    def open(self, ref: SampleRef, *, layout_hash: str, verify: bool) -> ShmLease:
        """Lease a sample; its tensors are views of read-only pages: writing to one faults.

        verify: compare the checksums, about 0.1 s per GB. ValueError for an impossible ref;
        LayoutMismatch, StaleRef, CorruptFeature.
        """
        check_ref(ref)
        _check_store(ref, self._store)
        if ref.layout_hash != layout_hash:
            raise LayoutMismatch(
                f"sample {ref.sample_id!r}: wanted layout {layout_hash!r}, got {ref.layout_hash!r}"
            )
        buffer = self._arena.lease(ref.slot, ref.generation)
        fault = _find_fault(buffer, ref, verify=verify)
        if fault is not None:
            del buffer  # else the lease would live as long as the error's traceback
            raise CorruptFeature(f"sample {ref.sample_id!r}: {fault}")
        return ShmLease(buffer, ref)

    def ack(self, ref: SampleRef) -> None:
        """The sample is done with: its memory is reused once no lease is left.

        StaleRef, also the second time.
        """
        check_ref(ref)
        _check_store(ref, self._store)
        self._arena.acknowledge(ref.slot, ref.generation)

    def close(self) -> None:
        """Leave the arena; it stays mapped while leases or views of it live."""
        self._open_arena = None


class ShmLease:
    """Ends when `release` was called (or the lease dropped) and no view of it lives any more."""

    def __init__(self, buffer: _C.ArenaLease, ref: SampleRef) -> None:
        views = _views(buffer, ref)
        prompt = Prompt(ref.sample_id, views.pop("input_ids"), views.pop("loss_mask"))
        self._sample_id = ref.sample_id
        # A sample without a single byte has no view that would keep the buffer.
        self._held: tuple[_C.ArenaLease, Sample] | None = (buffer, Sample(prompt, views))

    @property
    def sample(self) -> Sample:
        if self._held is None:
            raise StoreError(f"lease of sample {self._sample_id!r}: wanted before its release")
        return self._held[1]

    def release(self) -> None:
        """May be called more than once."""
        self._held = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.release()


def _store_id(epoch: int) -> str:
    return f"shm:{epoch:016x}"


def _check_store(ref: SampleRef, store: str) -> None:
    if ref.store != store:
        raise StaleRef(f"sample {ref.sample_id!r}: wanted store {store!r}, got {ref.store!r}")


def _tensors_of(sample: Sample) -> dict[str, Tensor]:
    prompt = {"input_ids": sample.prompt.input_ids, "loss_mask": sample.prompt.loss_mask}
    if clash := prompt.keys() & sample.features.keys():
        raise ValueError(f"Sample.features: wanted no name of the prompt's, got {sorted(clash)}")
    for name, tensor in sample.features.items():
        if tensor.device.type != "cpu" or tensor.dtype not in DTYPE_NAMES:
            raise ValueError(
                f"Sample.features[{name!r}]: wanted one of {sorted(DTYPES)} on the CPU, "
                f"got {tensor.dtype} on {tensor.device}"
            )
    return {**prompt, **sample.features}


def _shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {
        name: (DTYPE_NAMES[tensor.dtype], tuple(tensor.shape))
        for name, tensor in tensors.items()
        if name not in ("input_ids", "loss_mask")
    }


def _plan(
    prompt: Prompt,
    features: Mapping[str, tuple[str, tuple[int, ...]]],
    store: str,
    layout_hash: str,
) -> SampleRef:
    """The sample's ref but for slot, generation and checksums. ValueError if it cannot be read."""
    shapes = {
        "input_ids": ("int32", (len(prompt),)),
        "loss_mask": ("uint8", (len(prompt),)),
        **features,
    }
    tensors = plan_tensors((name, dtype, shape) for name, (dtype, shape) in shapes.items())
    ref = SampleRef(
        sample_id=prompt.sample_id,
        store=store,
        slot=0,
        generation=1,
        layout_hash=layout_hash,
        num_tokens=len(prompt),
        nbytes=tensors[-1].offset + tensors[-1].nbytes,
        tensors=tensors,
    )
    check_ref(ref)
    return ref


def _bytes(tensor: Tensor) -> memoryview:
    """The bytes of a CPU tensor; a copy of it only if it is not contiguous."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _find_fault(buffer: _C.ArenaLease, ref: SampleRef, *, verify: bool) -> str | None:
    if buffer.nbytes != ref.nbytes:
        return f"wanted {ref.nbytes} bytes, the arena holds {buffer.nbytes}"
    return next(filter(None, (_bad_sum(buffer, t) for t in ref.tensors if verify)), None)


def _bad_sum(buffer: _C.ArenaLease, tensor: TensorRef) -> str | None:
    if tensor.checksum is None:
        return f"{tensor.name}: wanted a checksum to verify, the ref has none"
    came = buffer.crc32c(tensor.offset, tensor.nbytes)
    if came == tensor.checksum:
        return None
    return f"{tensor.name}: wanted crc32c {tensor.checksum:08x}, got {came:08x}"


def _views(buffer: _C.ArenaLease | _C.ArenaReservation, ref: SampleRef) -> dict[str, Tensor]:
    return {tensor.name: _view(buffer, tensor) for tensor in ref.tensors}


def _view(buffer: _C.ArenaLease | _C.ArenaReservation, ref: TensorRef) -> Tensor:
    dtype = DTYPES[ref.dtype]
    if ref.nbytes == 0:
        return torch.empty(ref.shape, dtype=dtype)  # frombuffer refuses to see nothing
    count = ref.nbytes // dtype.itemsize
    return torch.frombuffer(buffer, dtype=dtype, count=count, offset=ref.offset).view(ref.shape)
