"""Samples between processes on any hosts, through Mooncake's distributed store.

The writer owns a segment; a sample is one object in it, under a key that is never used again:
"put" to a key that exists keeps the old object and reports success. Objects are pinned, for others
are dropped when room gets short. Readers copy a sample into a registered pool of their own, so that
a lease holds up nobody, and an `ack` removes the object.
"""

from __future__ import annotations

import itertools
import logging
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from pydantic import Field
from torch import Tensor

from specforge_ext import _C
from specforge_ext.copies import copied
from specforge_ext.records import Sample, SampleRef, TensorRef
from specforge_ext.store import mooncake, payload
from specforge_ext.store import mooncake_objects as objects
from specforge_ext.store.base import (
    Capabilities,
    StoreError,
    StoreFull,
    TransferTimeout,
)
from specforge_ext.store.mooncake_master import Master
from specforge_ext.store.mooncake_segment import OwnSegment
from specforge_ext.store.mooncake_store_reader import MooncakeStoreReader

log = logging.getLogger(__name__)


class MooncakeStoreConfig(mooncake.MooncakeConfig):
    """master: "host:port" of a mooncake_master. None: the producer starts one on loopback and ends
    it with itself, for a run on one host.
    Objects lie on the host whatever `direct` says, for Mooncake makes its segments there: of the
    readers' pools it decides.
    """

    master: str | None = Field(default=None, pattern=r"^[^:\s]+:\d+$")


@dataclass(frozen=True)
class MooncakeStoreHealth:
    """Objects of this writer that nobody has acknowledged."""

    capacity_bytes: int
    used_bytes: int
    num_samples: int


class MooncakeStore:
    """The registered store."""

    Config = MooncakeStoreConfig

    @staticmethod
    def unavailable() -> str | None:
        """Why this host cannot have one, or None."""
        return mooncake.unavailable()

    @staticmethod
    def writer(config: MooncakeStoreConfig) -> MooncakeStoreWriter:
        """A segment of its own at the master. StoreError without package, device or master."""
        return MooncakeStoreWriter(config)

    @staticmethod
    def reader(address: str) -> MooncakeStoreReader:
        """ProducerLost if the writer or its master has ended; ValueError if that is no address."""
        return MooncakeStoreReader(address)


class MooncakeStoreWriter:
    """Any thread may put."""

    def __init__(self, config: MooncakeStoreConfig) -> None:
        mooncake.expect_protocol(config.protocol, config.devices)
        package = mooncake.module("mooncake.store")
        self._config = config
        self._epoch = secrets.token_hex(8)
        self._store = f"mooncake_store:{self._epoch}"
        self._generations = itertools.count(1)
        self._lock = threading.Lock()
        self._taken: dict[int, int] = {}  # bytes by generation
        self._published: set[int] = set()
        self._master: Master | None = None
        if config.master is None:
            self._master = Master()
            self._master_address = self._master.address
        else:
            self._master_address = config.master
        if not mooncake.is_reachable(self._master_address, timeout_s=objects.MASTER_S):
            raise StoreError(f"store.master: nobody listens at {self._master_address}")
        # Mooncake rounds sizes up to eighths of a power of two. One more step: the object that says
        # that we live, and room lost to fragmentation.
        rounded_bytes = config.capacity_bytes * 9 // 8
        steps = -(-rounded_bytes // objects.SEGMENT_STEP_BYTES) + 1
        self._client = objects.connect(
            package,
            config.host or mooncake.local_host(self._master_address.rpartition(":")[0]),
            self._master_address,
            protocol=config.protocol,
            devices=config.devices,
            segment_bytes=steps * objects.SEGMENT_STEP_BYTES,
        )
        self._pool: mooncake.Pool[_C.ArenaReservation] | None = None
        self._is_open = True
        self._placement = package.ReplicateConfig()
        self._placement.replica_num = 1
        self._placement.with_hard_pin = True
        self._placement.preferred_segment = self._client.get_hostname()
        self._alive = self._put_alive()
        self._segment = OwnSegment(self._client, objects.alive_key(self._epoch), self._alive)
        if not self._segment.is_known:
            log.warning("mooncake_store: samples take one more copy: the segment is not found here")

    @property
    def capacity_bytes(self) -> int:
        return self._config.capacity_bytes

    def put(
        self,
        sample: Sample,
        *,
        layout_hash: str,
        timeout_s: float,
        layers: Mapping[str, int] | None = None,
    ) -> SampleRef:
        """Copy a sample into the segment, once. Waits for readers to remove others.

        See `StoreWriter.put` for `sample`, `layers` and errors; StoreError after three attempts
        that Mooncake failed.
        """
        self._expect_open()
        planned, tensors = payload.plan_sample(
            sample,
            store=self._store,
            layout_hash=layout_hash,
            encoding=self._config.encoding,
            layers=layers,
        )
        size = objects.size_of(planned)
        largest = min(self.capacity_bytes, self._config.pool_or_capacity_bytes)
        if size > largest:
            raise StoreFull(size, largest)
        wait = mooncake.Pauses(*objects.LOOK_EVERY_S, timeout_s)
        generation = self._wait_for_room(size, wait)
        published = 0
        try:
            in_place = self._put_in_place(generation, planned, tensors, wait)
            if in_place is None:
                published, written = self._put_through(planned, tensors, wait)
            else:
                published, written = in_place
        finally:
            with self._lock:
                if published == 0:
                    self._taken.pop(generation)
                else:
                    self._taken[published] = self._taken.pop(generation)
                    self._published.add(published)
        return replace(planned, generation=published, tensors=written)

    def abort(self, ref: SampleRef) -> None:
        """Nobody is going to read this sample any more: as a reader's `ack`."""
        self._expect_open()
        payload.expect_ref(ref, store=self._store)
        objects.remove(self._client, self._key(ref.generation))

    def reap(self) -> int:
        """0: readers hold nothing here, and an ended writer's segment goes with its process."""
        self._expect_open()
        return 0

    def health(self) -> MooncakeStoreHealth:
        self._expect_open()
        with self._lock:
            self._collect()
            return MooncakeStoreHealth(
                self.capacity_bytes, sum(self._taken.values()), len(self._taken)
            )

    def capabilities(self) -> Capabilities:
        return mooncake.capabilities_over("mooncake_store", self._config.protocol)

    def address(self) -> str:
        """What `MooncakeStore.reader` wants: "mooncake_store:EPOCH:JSON"."""
        config = self._config
        address = objects.Address(
            master=self._master_address,
            protocol=config.protocol,
            devices=config.devices,
            pool_bytes=config.pool_or_capacity_bytes,
            read_timeout_s=config.read_timeout_s,
            direct=config.direct,
            alive_bytes=self._alive.hex(),
        )
        return f"{self._store}:{address.model_dump_json()}"

    def close(self) -> None:
        """The segment goes, and the master if it is ours. Open leases keep their bytes."""
        if not self._is_open:
            return
        self._is_open = False
        self._client.close()
        self._pool = None
        if self._master is not None:
            self._master.close()

    def _expect_open(self) -> None:
        if not self._is_open:
            raise StoreError("mooncake_store writer: wanted an open segment, but it was closed")

    def _registered(self) -> mooncake.Pool[_C.ArenaReservation]:
        """Memory as large as the segment: made when a sample first has to go through it."""
        with self._lock:
            if self._pool is None:
                size = self._config.pool_or_capacity_bytes
                self._pool = mooncake.Pool(size, self._client.register_buffer)
            return self._pool

    def _key(self, generation: int) -> str:
        return objects.key_of(self._epoch, generation)

    def _put_alive(self) -> bytes:
        """A readable object of our segment says that we live, without a clock of ours."""
        alive = secrets.token_bytes(objects.ALIVE_BYTES)
        self._first: mooncake.Pool[_C.ArenaReservation] = mooncake.Pool(
            len(alive), self._client.register_buffer
        )
        slot = self._first.acquire(len(alive), objects.MASTER_S)
        slot.write(0, memoryview(alive), False)
        code = self._copies_from(slot.address)(objects.alive_key(self._epoch), len(alive))
        slot.abort()
        if code != 0:
            raise StoreError(f"Mooncake refused a first object: error {code}")
        return alive

    def _put_in_place(
        self,
        generation: int,
        planned: SampleRef,
        tensors: Mapping[str, Tensor],
        wait: mooncake.Pauses,
    ) -> tuple[int, tuple[TensorRef, ...]] | None:
        """The generation under which it was put, and its tensors; None if it would not lie in our
        own segment. Until the ref is out, nobody knows that the object can be read already."""
        if not self._segment.is_known:
            return None
        generation = self._put(generation, objects.size_of(planned), wait, self._reserve)
        key = self._key(generation)
        try:
            if (room := self._segment.room(key)) is not None:
                checksum = self._config.checksum
                return generation, payload.write_into(room, planned, tensors, checksum=checksum)
        except BaseException:
            objects.remove(self._client, key)
            raise
        objects.remove(self._client, key)
        return None

    def _put_through(
        self, planned: SampleRef, tensors: Mapping[str, Tensor], wait: mooncake.Pauses
    ) -> tuple[int, tuple[TensorRef, ...]]:
        """The same by way of registered memory, to wherever Mooncake puts it."""
        size = objects.size_of(planned)
        slot = self._registered().acquire(size, wait.left_s)
        try:
            written = payload.write_into(slot, planned, tensors, checksum=self._config.checksum)
            once = self._copies_from(slot.address)
            generation = self._put(next(self._generations), size, wait, once)
            copied("transfer", payload.feature_bytes(planned))
            return generation, written
        finally:
            slot.abort()

    def _put(
        self, generation: int, size: int, wait: mooncake.Pauses, once: Callable[[str, int], int]
    ) -> int:
        """The generation under which it was put: a new one for each attempt that failed, because
        the failed one may still hold its key and its room."""
        for attempt in range(objects.ATTEMPTS):
            while (code := once(self._key(generation), size)) == objects.NO_SPACE:
                if not wait.sleep():
                    raise self._timeout(size, wait)
            if code == 0:
                return generation
            if code not in objects.TRANSIENT:
                break
            log.warning("put of %d bytes failed: error %d, attempt %d", size, code, attempt + 1)
            objects.remove(self._client, self._key(generation))
            time.sleep(objects.RETRY_PAUSE_S)
            generation = next(self._generations)
        raise StoreError(f"Mooncake could not put {size} bytes: error {code}")

    def _reserve(self, key: str, size: int) -> int:
        """An object with bytes of nobody; 0 or an error."""
        [code] = self._client.batch_put_session_start([key], [size], self._placement)
        if code == 0:
            [code] = self._client.batch_put_session_end([key])
        return int(code)

    def _copies_from(self, address: int) -> Callable[[str, int], int]:
        def put_once(key: str, size: int) -> int:
            [code] = self._client.batch_put_from([key], [address], [size], self._placement)
            return int(code)

        return put_once

    def _wait_for_room(self, nbytes: int, wait: mooncake.Pauses) -> int:
        """A generation whose bytes are counted."""
        while True:
            with self._lock:
                if not self._has_room(nbytes):
                    self._collect()
                if self._has_room(nbytes):
                    generation = next(self._generations)
                    self._taken[generation] = nbytes
                    return generation
            if not wait.sleep():
                raise self._timeout(nbytes, wait)

    def _has_room(self, nbytes: int) -> bool:
        return sum(self._taken.values()) + nbytes <= self.capacity_bytes

    def _timeout(self, nbytes: int, wait: mooncake.Pauses) -> TransferTimeout:
        with self._lock:
            used, count = sum(self._taken.values()), len(self._taken)
        return TransferTimeout(
            f"room for {nbytes} bytes in {self._store} "
            f"(used {used} of {self.capacity_bytes} bytes, {count} samples)",
            wait.waited_s,
        )

    def _collect(self) -> None:
        """Forget what readers have removed."""
        generations = sorted(self._published)
        if not generations:
            return
        there = self._client.batch_is_exist([self._key(g) for g in generations])
        for generation, exists in zip(generations, there, strict=True):
            if exists == 0:
                del self._taken[generation]
                self._published.remove(generation)
