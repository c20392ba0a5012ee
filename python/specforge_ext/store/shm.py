"""Samples between processes of one host, through a pooled arena in shared memory.

One writer per arena, up to 16 reading processes at a time. The native arena (`csrc/transport`) owns
slots, leases and waiting; here samples become bytes in it, and bytes become tensors again without a
copy. S is the number of tokens of a sample.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast, get_args

from pydantic import Field
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from specforge_ext import _C
from specforge_ext.config import Switch
from specforge_ext.records import FeatureLayout, Prompt, Sample, SampleRef
from specforge_ext.store import payload
from specforge_ext.store.base import Capabilities, StoreConfig, StoreError, StoreFull
from specforge_ext.store.page_lock import PageLockMode, lock_pages

PAGE_LOCK = "#page_lock="
"""In an address: what follows is for the reader itself."""

CAPABILITIES = Capabilities(
    kind="shm", protocol="memory", zero_copy=True, across_hosts=False, outlives_producer=True
)
PAGE_BYTES = 4096
"""Room is taken in whole pages, at least one a sample (csrc/transport/extents.h)."""


class ShmConfig(StoreConfig):
    """capacity_bytes: payload of the arena, allocated and touched at once when it is opened.
    max_slots: samples that may lie in it at the same time.
    high_watermark, low_watermark: shares of the capacity. Samples wait once they would lift what is
        used above the first, until no more than the second is used: no hysteresis where equal.
    page_lock: have readers register the payload with CUDA, so that copies to the GPU are
        asynchronous: where they use CUDA (auto), always (on: an error where it cannot be), never.
    socket_path: where readers in other pid namespaces (containers) are let in, in a directory of
        this user's with mode 0700. None: through /proc only.
    """

    capacity_bytes: int = Field(default=256 << 20, gt=0, le=1 << 46)
    max_slots: int = Field(default=1024, gt=0, le=1 << 20)
    high_watermark: float = Field(default=1.0, gt=0, le=1)
    low_watermark: float = Field(default=1.0, gt=0, le=1)
    page_lock: Switch = "auto"
    socket_path: str | None = None


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

    @property
    def num_samples(self) -> int:
        return self.slots_writing + self.slots_ready + self.slots_leased + self.slots_draining


class ShmStore:
    """The registered store: opens either side of an arena."""

    Config = ShmConfig

    @staticmethod
    def unavailable() -> str | None:
        """Why this host cannot have one, or None."""
        return None

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
        already, or its pages cannot be locked though page_lock is on; ValueError if the address
        does not lead to an arena of this user.
        """
        return ShmReader(address)


class ShmWriter:
    """Any thread may put. Not usable in a forked child."""

    def __init__(self, config: ShmConfig) -> None:
        self._config = config
        self._open_arena: _C.ArenaProducer | None = _C.ArenaProducer(
            config.capacity_bytes,
            config.max_slots,
            high_watermark=config.high_watermark,
            low_watermark=config.low_watermark,
        )
        path = config.socket_path
        self._socket_address = None if path is None else self._arena.serve(path)
        self._store = _store_id(self._arena.epoch)
        self._published_views: list[Mapping[str, Tensor]] = []

    @property
    def _arena(self) -> _C.ArenaProducer:
        if self._open_arena is None:
            raise StoreError("shm writer: wanted an open arena, but it was closed")
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
        """Copy a sample in and publish it; waits for room outside the GIL.

        See `StoreWriter.put` for `sample`, `layers` and errors. Encodes straight into the arena.
        """
        planned, tensors = payload.plan_sample(
            sample,
            store=self._store,
            layout_hash=layout_hash,
            encoding=self._config.encoding,
            layers=layers,
        )
        slot = self._arena.acquire(planned.nbytes, timeout_s)
        try:
            written = payload.write_into(slot, planned, tensors, checksum=self._config.checksum)
            slot.publish()
        finally:
            if slot.is_open:
                slot.abort()
        return replace(planned, slot=slot.slot, generation=slot.generation, tensors=written)

    @property
    def writes_in_place(self) -> bool:
        return self._config.encoding == "none"

    def expect_room(self, prompts: Sequence[Prompt], layout: FeatureLayout) -> None:
        """StoreFull if these samples could never be reserved together; StoreError for too many."""
        if len(prompts) > self._config.max_slots:
            raise StoreError(
                f"request of {len(prompts)} samples does not fit a store of "
                f"{self._config.max_slots} slots (store.max_slots)"
            )
        sizes = [self._plan(prompt, layout).nbytes for prompt in prompts]
        needed = sum(max(1, -(-size // PAGE_BYTES)) * PAGE_BYTES for size in sizes)
        # The mark holds for all but the first sample in an empty arena.
        share = self._config.high_watermark if len(prompts) > 1 else 1.0
        if needed > (available := int(share * self.capacity_bytes)):
            raise StoreFull(needed, available, f"request ({len(prompts)} samples)")

    def reserve(self, prompt: Prompt, layout: FeatureLayout, *, timeout_s: float) -> ShmReservation:
        """Room for a sample whose features the caller writes. StoreFull, TransferTimeout.

        ValueError from a store with an encoding: there is nothing yet to be encoded.
        """
        if not self.writes_in_place:
            raise ValueError(
                "store.encoding: wanted none for features that are written in place, "
                f"got {self._config.encoding}: put them"
            )
        self._published_views.clear()
        planned = self._plan(prompt, layout)
        slot = self._arena.acquire(planned.nbytes, timeout_s)
        return ShmReservation(
            slot,
            planned,
            prompt,
            checksum=self._config.checksum,
            retire=self._published_views.append,
        )

    def _plan(self, prompt: Prompt, layout: FeatureLayout) -> SampleRef:
        shapes = {spec.name: (spec.dtype, (len(prompt), spec.width)) for spec in layout.features}
        return payload.plan(prompt, shapes, self._store, layout.hash, num_scales={})

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
        """(address, nbytes) of the slots' pages and of the payload, for network engines."""
        return self._arena.regions

    def reap(self) -> int:
        """Take the leases of ended readers away; how many readers those were.

        Their samples can be opened again until they are acknowledged. `put` does so while it waits.
        """
        return self._arena.reap()

    def health(self) -> ShmHealth:
        return ShmHealth(**self._arena.stats())

    def capabilities(self) -> Capabilities:
        return CAPABILITIES

    def address(self) -> str:
        """What `ShmStore.reader` wants: "shm:PID:START:FD:EPOCH" or "shm:unix:PATH:EPOCH", and
        "#page_lock=MODE" unless that is auto."""
        arena, mode = self._arena, self._config.page_lock
        address = self._socket_address or arena.address
        return address if mode == "auto" else f"{address}{PAGE_LOCK}{mode}"

    def close(self) -> None:
        """No more samples, no more readers. Readers that are attached keep what was published."""
        self._open_arena = None
        self._published_views.clear()


class ShmReservation:
    """Room for one sample. features[name]: [S, width] writable views, of unspecified content.

    Drop the views at `publish`: from then on the memory belongs to the readers. retire: takes our
    own at that moment, for to free them costs as much time as to publish.
    """

    def __init__(
        self,
        slot: _C.ArenaReservation,
        planned: SampleRef,
        prompt: Prompt,
        *,
        checksum: bool,
        retire: Callable[[Mapping[str, Tensor]], None],
    ) -> None:
        self._slot = slot
        self._retire = retire
        self._checksum = checksum
        self._planned = replace(planned, slot=slot.slot, generation=slot.generation)
        self.features = payload.views(slot, planned)
        for name in ("input_ids", "loss_mask"):
            self.features.pop(name).copy_(getattr(prompt, name))

    def publish(self) -> SampleRef:
        """Make the sample readable. ValueError if that, or `abort`, was done before."""
        ref = self._planned
        if self._checksum:
            crc32c = self._slot.crc32c
            tensors = (replace(t, checksum=crc32c(t.offset, t.nbytes)) for t in ref.tensors)
            ref = replace(ref, tensors=tuple(tensors))
        self._slot.publish()
        self._retire(self.features)
        self.features = {}
        return ref

    def abort(self) -> None:
        """Give the room back. ValueError if that, or `publish`, was done before."""
        self._slot.abort()
        self.features = {}


class ShmReader:
    """Any thread may open and acknowledge. Not usable in a forked child.

    Samples that were published stay readable when the producer dies. page_locked: a GPU reads the
    views by itself. A view, or its lease, has to be kept until a copy that was queued is over.
    """

    def __init__(self, address: str) -> None:
        address, mode = split_address(address)
        self._open_arena: _C.ArenaConsumer | None = _C.ArenaConsumer(address)
        self._store = _store_id(self._arena.epoch)
        unlock = lock_pages(mode, *self._arena.regions[1], what=self._store)
        self.page_locked = unlock is not None
        if unlock is not None:
            self._arena.before_unmap(unlock)

    @property
    def _arena(self) -> _C.ArenaConsumer:
        if self._open_arena is None:
            raise StoreError("shm reader: wanted an open arena, but it was closed")
        return self._open_arena

    @property
    def producer_alive(self) -> bool:
        return self._arena.producer_alive

    def open(self, ref: SampleRef, *, layout_hash: str, verify: bool) -> payload.SampleLease:
        """Lease a sample; its tensors are views of read-only pages: writing to one faults.

        verify: compare the checksums, about 0.1 s per GB. ValueError for an impossible ref;
        LayoutMismatch, StaleRef, CorruptFeature.
        """
        if not verify:
            sample = self._arena.open(ref, self._store, layout_hash, from_dlpack)
            if sample is not None:
                return payload.SampleLease(sample)
        payload.expect_ref(ref, store=self._store)
        payload.expect_layout(ref, layout_hash)
        return payload.lease(self._arena.lease(ref.slot, ref.generation), ref, verify=verify)

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


def split_address(address: str) -> tuple[str, PageLockMode]:
    """The arena's own address, and the mode of page_lock. ValueError for an unknown mode."""
    arena, mark, mode = address.partition(PAGE_LOCK)
    if mark and mode not in get_args(PageLockMode):
        raise ValueError(
            f"shm: address must end with {PAGE_LOCK} and one of {get_args(PageLockMode)}, "
            f"got {address[-32:]!r}"
        )
    return arena, cast(PageLockMode, mode or "auto")


def _store_id(epoch: int) -> str:
    return f"shm:{epoch:016x}"
