"""Samples between processes on any hosts, through Mooncake's distributed store.

The writer owns a segment; a sample is one object in it, under a key that is never used again:
"put" to a key that exists keeps the old object and reports success. Objects are pinned, for others
are dropped when room gets short. Readers copy a sample into a registered pool of their own, so that
a lease holds up nobody, and an `ack` removes the object.
"""

from __future__ import annotations

import itertools
import logging
import re
import secrets
import threading
import time
from dataclasses import dataclass, replace
from typing import Any

from pydantic import Field

from specforge_ext import _C
from specforge_ext.config import Config, parse_json
from specforge_ext.records import Sample, SampleRef
from specforge_ext.store import mooncake, payload
from specforge_ext.store.base import (
    Capabilities,
    CorruptFeature,
    ProducerLost,
    StaleRef,
    StoreError,
    StoreFull,
    TransferTimeout,
)
from specforge_ext.store.mooncake_master import Master

log = logging.getLogger(__name__)

NO_SPACE = -200
TOO_SMALL = -600
NOT_FOUND = -704
TRANSIENT = (-703, -707, -800)
"""Replica not ready, object being written, transfer failed: worth another try."""
ATTEMPTS = 3
RETRY_PAUSE_S = 0.2
LATE_WRITES_S = 60.0
"""Mooncake gives a stalled transfer up after 30 s; its memory is left alone for longer."""
MASTER_S = 5.0
SEGMENT_STEP_BYTES = 16 << 20
LOOK_EVERY_S = (0.002, 0.05)


class MooncakeStoreConfig(mooncake.MooncakeConfig):
    """master: "host:port" of a mooncake_master. None: the producer starts one on loopback and ends
    it with itself, for a run on one host.
    """

    master: str | None = Field(default=None, pattern=r"^[^:\s]+:\d+$")


class Address(Config):
    """What a reader has to know."""

    master: str
    protocol: mooncake.Protocol
    devices: str
    pool_bytes: int = Field(gt=0, le=1 << 46)
    read_timeout_s: float = Field(gt=0)


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
        mooncake.expect_protocol(config.protocol)
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
        if not mooncake.is_reachable(self._master_address, timeout_s=MASTER_S):
            raise StoreError(f"store.master: nobody listens at {self._master_address}")
        # One more step: the object that says that we live, and room lost to fragmentation.
        steps = -(-config.capacity_bytes // SEGMENT_STEP_BYTES) + 1
        self._client = _connect(
            package,
            config.host or mooncake.local_host(self._master_address.rpartition(":")[0]),
            self._master_address,
            protocol=config.protocol,
            devices=config.devices,
            segment_bytes=steps * SEGMENT_STEP_BYTES,
        )
        self._pool: mooncake.Pool | None = mooncake.Pool(
            config.pool_or_capacity_bytes, self._client.register_buffer
        )
        self._placement = package.ReplicateConfig()
        self._placement.replica_num = 1
        self._placement.with_hard_pin = True
        self._placement.preferred_segment = self._client.get_hostname()
        self._put_alive()

    @property
    def capacity_bytes(self) -> int:
        return self._config.capacity_bytes

    def put(self, sample: Sample, *, layout_hash: str, timeout_s: float) -> SampleRef:
        """Copy a sample into the segment, in one call. Waits for readers to remove others.

        features[name]: [S, width], any of DTYPES, CPU. ValueError for other tensors; StoreFull at
        once if it can never fit; TransferTimeout if readers free no room in `timeout_s`;
        StoreError after three attempts that Mooncake failed.
        """
        pool = self._open_pool()
        tensors = payload.tensors_of(sample)
        shapes = payload.shapes_of(tensors)
        planned = payload.plan(sample.prompt, shapes, self._store, layout_hash)
        size = _size(planned)
        largest = min(self.capacity_bytes, self._config.pool_or_capacity_bytes)
        if size > largest:
            raise StoreFull(size, largest)
        wait = mooncake.Pauses(*LOOK_EVERY_S, timeout_s)
        generation = self._wait_for_room(size, wait)
        published = 0
        try:
            slot = pool.acquire(size, wait.left_s)
            try:
                written = payload.write_into(slot, planned, tensors, checksum=self._config.checksum)
                published = self._put(generation, slot.address, size, wait)
            finally:
                slot.abort()
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
        self._open_pool()
        payload.expect_ref(ref, store=self._store)
        _remove(self._client, self._key(ref.generation))

    def reap(self) -> int:
        """0: readers hold nothing here, and an ended writer's segment goes with its process."""
        self._open_pool()
        return 0

    def health(self) -> MooncakeStoreHealth:
        self._open_pool()
        with self._lock:
            self._collect()
            return MooncakeStoreHealth(
                self.capacity_bytes, sum(self._taken.values()), len(self._taken)
            )

    def capabilities(self) -> Capabilities:
        return _capabilities(self._config.protocol)

    def address(self) -> str:
        """What `MooncakeStore.reader` wants: "mooncake_store:EPOCH:JSON"."""
        config = self._config
        address = Address(
            master=self._master_address,
            protocol=config.protocol,
            devices=config.devices,
            pool_bytes=config.pool_or_capacity_bytes,
            read_timeout_s=config.read_timeout_s,
        )
        return f"{self._store}:{address.model_dump_json()}"

    def close(self) -> None:
        """The segment goes, and the master if it is ours. Open leases keep their bytes."""
        if self._pool is None:
            return
        self._client.close()
        self._pool = None
        if self._master is not None:
            self._master.close()

    def _open_pool(self) -> mooncake.Pool:
        if self._pool is None:
            raise StoreError("mooncake_store writer: wanted an open segment, but it was closed")
        return self._pool

    def _key(self, generation: int) -> str:
        return _key(self._epoch, generation)

    def _put_alive(self) -> None:
        """A readable object of our segment says that we live, without a clock of ours."""
        slot = self._open_pool().acquire(1, MASTER_S)
        code = self._put_once(_alive_key(self._epoch), slot.address, 1)
        slot.abort()
        if code != 0:
            raise StoreError(f"Mooncake refused a first object: error {code}")

    def _put(self, generation: int, address: int, size: int, wait: mooncake.Pauses) -> int:
        """The generation under which it was put: a new one for each attempt that failed, because
        the failed one may still hold its key and its room."""
        for attempt in range(ATTEMPTS):
            while (code := self._put_once(self._key(generation), address, size)) == NO_SPACE:
                if not wait.sleep():
                    raise self._timeout(size, wait)
            if code == 0:
                return generation
            if code not in TRANSIENT:
                break
            log.warning("put of %d bytes failed: error %d, attempt %d", size, code, attempt + 1)
            _remove(self._client, self._key(generation))
            time.sleep(RETRY_PAUSE_S)
            generation = next(self._generations)
        raise StoreError(f"Mooncake could not put {size} bytes: error {code}")

    def _put_once(self, key: str, address: int, size: int) -> int:
        [code] = self._client.batch_put_from([key], [address], [size], self._placement)
        return int(code)

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


class MooncakeStoreReader:
    """Any thread may open and acknowledge."""

    def __init__(self, address: str) -> None:
        match = re.fullmatch(r"mooncake_store:([0-9a-f]{16}):(\{.*\})", address)
        if match is None:
            raise ValueError(
                f"mooncake_store: address must be mooncake_store:EPOCH:JSON, got {address[:96]!r}"
            )
        self._epoch = match[1]
        self._store = f"mooncake_store:{self._epoch}"
        self._address = parse_json(Address, match[2], where="address")
        mooncake.expect_protocol(self._address.protocol)
        package = mooncake.module("mooncake.store")
        master = self._address.master
        if not mooncake.is_reachable(master, timeout_s=MASTER_S):
            raise ProducerLost(f"{self._store}: its master at {master} has ended")
        self._client = _connect(
            package,
            mooncake.local_host(master.rpartition(":")[0]),
            master,
            protocol=self._address.protocol,
            devices=self._address.devices,
            segment_bytes=0,
        )
        self._pool: mooncake.Pool | None = mooncake.Pool(
            self._address.pool_bytes, self._client.register_buffer
        )
        if not self.producer_alive:
            self.close()
            raise ProducerLost(f"{self._store}: its producer has ended")

    @property
    def producer_alive(self) -> bool:
        """Asks by reading; takes about a second when it is not."""
        pool = self._open_pool()
        slot = pool.acquire(1, self._address.read_timeout_s)
        code = self._get_once(_alive_key(self._epoch), slot, 1)
        _leave(pool, slot, code)
        return code == 1

    def open(self, ref: SampleRef, *, layout_hash: str, verify: bool) -> payload.SampleLease:
        """Copy a sample into the pool, in one call, and lease that.

        verify: compare the checksums. ValueError for an impossible ref; LayoutMismatch, StaleRef,
        CorruptFeature; ProducerLost with the producer's segment; TransferTimeout if leases leave no
        room in the pool; StoreError after three attempts that Mooncake failed.
        """
        payload.expect_ref(ref, store=self._store)
        payload.expect_layout(ref, layout_hash)
        pool = self._open_pool()
        for attempt in range(ATTEMPTS):
            slot = pool.acquire(ref.nbytes, self._address.read_timeout_s)
            code = self._get_once(_key(self._epoch, ref.generation), slot, _size(ref))
            if code == _size(ref):
                return payload.lease(pool.lease(slot), ref, verify=verify)
            _leave(pool, slot, code)
            if code not in TRANSIENT or not self.producer_alive:
                break
            log.warning("read of %s failed: error %d, attempt %d", ref.sample_id, code, attempt + 1)
            time.sleep(RETRY_PAUSE_S)
        raise self._explain(ref, code)

    def ack(self, ref: SampleRef) -> None:
        """Remove the object; leases keep their bytes. Again is nothing, for a repeated request to
        the master must be. ProducerLost when the master is gone."""
        self._open_pool()
        payload.expect_ref(ref, store=self._store)
        _remove(self._client, _key(self._epoch, ref.generation))

    def capabilities(self) -> Capabilities:
        return _capabilities(self._address.protocol)

    def close(self) -> None:
        """Leases keep their bytes."""
        if self._pool is not None:
            self._client.close()
            self._pool = None

    def _open_pool(self) -> mooncake.Pool:
        if self._pool is None:
            raise StoreError("mooncake_store reader: wanted an open pool, but it was closed")
        return self._pool

    def _get_once(self, key: str, slot: _C.ArenaReservation, size: int) -> int:
        """Bytes of the object, or an error."""
        [code] = self._client.batch_get_into([key], [slot.address], [size])
        return int(code)

    def _explain(self, ref: SampleRef, code: int) -> StoreError:
        """What a read that gave `code` means."""
        name = f"sample {ref.sample_id!r}"
        if code >= 0 or code == TOO_SMALL:
            size = code if code >= 0 else self._client.get_size(_key(self._epoch, ref.generation))
            return CorruptFeature(f"{name}: wanted {ref.nbytes} bytes, the store holds {size}")
        if not self.producer_alive:
            return ProducerLost(f"{name}: the producer of {self._store} has ended (error {code})")
        if code == NOT_FOUND:
            return StaleRef(f"{name}: generation {ref.generation} was acknowledged already")
        return StoreError(f"{name}: Mooncake could not read {ref.nbytes} bytes: error {code}")


def _connect(
    package: Any, host: str, master: str, *, protocol: str, devices: str, segment_bytes: int
) -> Any:
    client = package.MooncakeDistributedStore()
    code = client.setup(host, mooncake.HANDSHAKE, segment_bytes, 0, protocol, devices, master)
    if code != 0:
        raise StoreError(f"Mooncake could not join {master} over {protocol}: error {code}")
    return client


def _capabilities(protocol: str) -> Capabilities:
    return Capabilities(
        kind="mooncake_store",
        protocol=protocol,
        zero_copy=False,
        across_hosts=True,
        outlives_producer=False,
    )


def _key(epoch: str, generation: int) -> str:
    return f"specforge/{epoch}/{generation:x}"


def _alive_key(epoch: str) -> str:
    return f"specforge/{epoch}/alive"


def _size(ref: SampleRef) -> int:
    """Of the object: Mooncake has none without a byte."""
    return max(1, ref.nbytes)


def _leave(pool: mooncake.Pool, slot: _C.ArenaReservation, code: int) -> None:
    """Give room back after a read; what a failed transfer may still write to is not used again."""
    if code not in TRANSIENT:
        slot.abort()
        return
    until = time.monotonic() + LATE_WRITES_S
    pool.quarantine(slot, lambda: time.monotonic() > until)


def _remove(client: Any, key: str) -> None:
    """By force, for whoever looked at an object has a lease on it. Gone is as good as removed."""
    code = client.remove(key, True)
    if code not in (0, NOT_FOUND):
        raise ProducerLost(f"Mooncake could not remove {key}: error {code}")
