"""Samples between hosts without a server: readers read the producer's arena through Mooncake.

The producer's memory is the arena of the shm store, registered once: its slots, its payload, and a
table of acknowledgements, an 8-byte generation per slot. A reader reads the slot's word, then the
payload into a registered pool of its own, then the word again: what was recycled meanwhile is
stale. To acknowledge it writes the generation into the table; the producer looks there when it
wants room. Nothing runs on the producer's side for any of this.
"""

from __future__ import annotations

import contextlib
import logging
import re
import struct
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from pydantic import Field

from specforge_ext import _C
from specforge_ext.config import parse_json
from specforge_ext.copies import copied
from specforge_ext.records import FeatureLayout, Prompt, Sample, SampleRef
from specforge_ext.store import mooncake, payload
from specforge_ext.store.base import (
    Capabilities,
    CorruptFeature,
    ProducerLost,
    StaleRef,
    StoreError,
    TransferTimeout,
)
from specforge_ext.store.mooncake_slots import EPOCH_AT, PAGE_BYTES, READY, SLOT_BYTES, Address
from specforge_ext.store.reserving import ForwardedReservation
from specforge_ext.store.shm import ShmConfig, ShmHealth, ShmWriter

log = logging.getLogger(__name__)

LOOK_EVERY_S = (0.002, 0.05)
POLL_EVERY_S = (0.00005, 0.001)
LOST_EVERY_S = 1.0


class MooncakeP2PConfig(mooncake.MooncakeConfig):
    """max_slots: samples that may lie in the arena at the same time."""

    max_slots: int = Field(default=1024, gt=0, le=1 << 20)


class MooncakeP2PStore:
    """The registered store."""

    Config = MooncakeP2PConfig

    @staticmethod
    def unavailable() -> str | None:
        """Why this host cannot have one, or None."""
        return mooncake.unavailable()

    @staticmethod
    def writer(config: MooncakeP2PConfig) -> MooncakeP2PWriter:
        """A new, empty arena, registered. StoreError without package or device."""
        return MooncakeP2PWriter(config)

    @staticmethod
    def reader(address: str) -> MooncakeP2PReader:
        """ProducerLost if the writer has ended; ValueError if that is no address."""
        return MooncakeP2PReader(address)


class MooncakeP2PWriter:
    """Any thread may put. Not usable in a forked child."""

    def __init__(self, config: MooncakeP2PConfig) -> None:
        self._config = config
        host = config.host or "127.0.0.1"
        self._engine = mooncake.transfer_engine(host, config.protocol, config.devices)
        self._open_shm: ShmWriter | None = ShmWriter(
            ShmConfig(
                capacity_bytes=config.capacity_bytes,
                max_slots=config.max_slots,
                checksum=config.checksum,
                encoding=config.encoding,
            )
        )
        self._lock = threading.Lock()
        self._acks = np.zeros(config.max_slots, dtype=np.uint64)
        self._put_generations = np.zeros(config.max_slots, dtype=np.uint64)
        slots, data = self._shm.regions
        for address, nbytes in (slots, data, (self._acks.ctypes.data, self._acks.nbytes)):
            if (code := self._engine.register_memory(address, nbytes)) != 0:
                raise mooncake.registration_error(nbytes, code)
        self._store = f"mooncake_p2p:{self._shm.epoch:016x}"
        self._address = Address(
            peer=f"{host}:{self._engine.get_rpc_port()}",
            protocol=config.protocol,
            devices=config.devices,
            slots=slots[0],
            payload=data[0],
            acks=self._acks.ctypes.data,
            max_slots=config.max_slots,
            payload_bytes=data[1],
            pool_bytes=config.pool_or_capacity_bytes,
            read_timeout_s=config.read_timeout_s,
        )

    @property
    def _shm(self) -> ShmWriter:
        if self._open_shm is None:
            raise StoreError("mooncake_p2p writer: wanted an open arena, but it was closed")
        return self._open_shm

    @property
    def capacity_bytes(self) -> int:
        return self._shm.capacity_bytes

    def put(
        self,
        sample: Sample,
        *,
        layout_hash: str,
        timeout_s: float,
        layers: Mapping[str, int] | None = None,
    ) -> SampleRef:
        """As the shm store's: StoreFull at once, TransferTimeout after `timeout_s`."""
        put = partial(self._shm.put, sample, layout_hash=layout_hash, timeout_s=0.0, layers=layers)
        wait = mooncake.Pauses(*LOOK_EVERY_S, timeout_s)
        return self._published(mooncake.wait_for_room(put, self._collect, wait))

    @property
    def writes_in_place(self) -> bool:
        return self._shm.writes_in_place

    def expect_room(self, prompts: Sequence[Prompt], layout: FeatureLayout) -> None:
        """As the shm store's: StoreFull, StoreError."""
        self._shm.expect_room(prompts, layout)

    def reserve(
        self, prompt: Prompt, layout: FeatureLayout, *, timeout_s: float
    ) -> ForwardedReservation:
        """As the shm store's: StoreFull, TransferTimeout."""
        reserve = partial(self._shm.reserve, prompt, layout, timeout_s=0.0)
        wait = mooncake.Pauses(*LOOK_EVERY_S, timeout_s)
        room = mooncake.wait_for_room(reserve, self._collect, wait)
        return ForwardedReservation(room, self._published)

    def abort(self, ref: SampleRef) -> None:
        """Nobody is going to read this sample any more. StaleRef."""
        payload.expect_ref(ref, store=self._store)
        self._collect()
        self._shm.abort(replace(ref, store=self._shm.store))

    def reap(self) -> int:
        """Take back what readers have acknowledged; how many samples. Ended readers hold nothing
        here: what they did not acknowledge can be opened again."""
        return self._collect()

    def health(self) -> ShmHealth:
        self._collect()
        return self._shm.health()

    def capabilities(self) -> Capabilities:
        return mooncake.capabilities_over("mooncake_p2p", self._config.protocol)

    def address(self) -> str:
        """What `MooncakeP2PStore.reader` wants: "mooncake_p2p:EPOCH:JSON"."""
        self._shm  # noqa: B018 - a closed store has none
        return f"{self._store}:{self._address.model_dump_json()}"

    def close(self) -> None:
        """No more samples, no more readers."""
        if self._open_shm is None:
            return
        slots, data = self._open_shm.regions
        for address in (slots[0], data[0], self._acks.ctypes.data):
            self._engine.unregister_memory(address)
        self._open_shm = None
        self._engine = None

    def _published(self, ref: SampleRef) -> SampleRef:
        with self._lock:
            self._put_generations[ref.slot] = ref.generation
        return replace(ref, store=self._store)

    def _collect(self) -> int:
        """Free the slots whose acknowledgement is of the generation that lies there."""
        shm = self._shm
        num_freed = 0
        with self._lock:
            generations = self._put_generations
            acked = np.flatnonzero((self._acks == generations) & (generations != 0))
            for slot in acked.tolist():
                generation = int(generations[slot])
                generations[slot] = 0  # before another thread may put there
                with contextlib.suppress(StaleRef):  # `abort` was faster
                    shm.free(slot, generation)
                    num_freed += 1
        return num_freed


class MooncakeP2PReader:
    """Any thread may open and acknowledge."""

    def __init__(self, address: str) -> None:
        match = re.fullmatch(r"mooncake_p2p:([0-9a-f]{16}):(\{.*\})", address)
        if match is None:
            raise ValueError(
                f"mooncake_p2p: address must be mooncake_p2p:EPOCH:JSON, got {address[:96]!r}"
            )
        self._epoch = int(match[1], 16)
        self._store = f"mooncake_p2p:{match[1]}"
        self._at = parse_json(Address, match[2], where="address")
        host = mooncake.local_host(self._at.peer.rpartition(":")[0])
        self._engine = mooncake.transfer_engine(host, self._at.protocol, self._at.devices)
        self._open_pool: mooncake.Pool | None = mooncake.Pool(
            self._at.pool_bytes, self._engine.register_memory
        )
        if not self.producer_alive:
            raise ProducerLost(f"{self._store}: its producer at {self._at.peer} has ended")
        [epoch] = self._read_words("the arena's header", [self._at.slots + EPOCH_AT])
        if epoch != self._epoch:
            raise ProducerLost(f"{self._store}: its producer has ended, {epoch:016x} is there now")

    @property
    def _pool(self) -> mooncake.Pool:
        if self._open_pool is None:
            raise StoreError("mooncake_p2p reader: wanted an open pool, but it was closed")
        return self._open_pool

    @property
    def producer_alive(self) -> bool:
        return int(self._engine.send_probe(self._at.peer)) == 0

    def open(self, ref: SampleRef, *, layout_hash: str, verify: bool) -> payload.SampleLease:
        """Read a sample into the pool and lease that.

        verify: compare the checksums. ValueError for an impossible ref; LayoutMismatch, StaleRef,
        CorruptFeature; ProducerLost; TransferTimeout names what was read, or what leases leave no
        room for.
        """
        payload.expect_ref(ref, store=self._store)
        payload.expect_layout(ref, layout_hash)
        offset, nbytes = self._locate(ref)
        slot = self._pool.acquire(nbytes, self._at.read_timeout_s)
        self._transfer(
            f"sample {ref.sample_id!r}, {nbytes} bytes", slot, [(self._at.payload + offset, nbytes)]
        )
        copied("transfer", payload.feature_bytes(ref))
        try:
            self._locate(ref)
        except StoreError:
            slot.abort()
            raise
        return payload.lease(self._pool.lease(slot), ref, verify=verify)

    def ack(self, ref: SampleRef) -> None:
        """Write the generation where the producer looks; leases keep their bytes. StaleRef, also
        the second time."""
        payload.expect_ref(ref, store=self._store)
        self._locate(ref)
        slot = self._pool.acquire(8, self._at.read_timeout_s)
        slot.write(0, struct.pack("<Q", ref.generation), False)
        target = self._at.acks + 8 * ref.slot
        what = f"the acknowledgement of sample {ref.sample_id!r}"
        self._transfer(what, slot, [(target, 8)], write=True)
        slot.abort()

    def capabilities(self) -> Capabilities:
        return mooncake.capabilities_over("mooncake_p2p", self._at.protocol)

    def close(self) -> None:
        """Leases keep their bytes."""
        if self._open_pool is not None:
            self._engine.unregister_memory(self._open_pool.region[0])
            self._open_pool = None
            self._engine = None

    def _locate(self, ref: SampleRef) -> tuple[int, int]:
        """Offset and size of a sample that can be read. StaleRef, CorruptFeature."""
        name = f"sample {ref.sample_id!r}"
        if ref.slot >= self._at.max_slots:
            raise StaleRef(f"{name}: slot {ref.slot} of {self._at.max_slots}")
        entry = self._at.slots + PAGE_BYTES + SLOT_BYTES * ref.slot
        ack = self._at.acks + 8 * ref.slot
        epoch = self._at.slots + EPOCH_AT
        found, word, offset, nbytes, acked = self._read_words(
            f"the slot of {name}", [epoch, entry, entry + 8, entry + 16, ack]
        )
        if found != self._epoch:
            raise ProducerLost(f"{name}: its producer has ended, {found:016x} is there now")
        generation, state = word >> 24, (word >> 16) & 0xFF
        if generation != ref.generation:
            raise StaleRef(
                f"{name}: slot {ref.slot} holds generation {generation}, "
                f"wanted generation {ref.generation}"
            )
        if state not in READY or acked == ref.generation:
            raise StaleRef(
                f"{name}: generation {generation} of slot {ref.slot} was acknowledged already"
            )
        if nbytes != ref.nbytes:
            raise CorruptFeature(f"{name}: wanted {ref.nbytes} bytes, the store holds {nbytes}")
        if offset > self._at.payload_bytes or nbytes > self._at.payload_bytes - offset:
            raise CorruptFeature(
                f"{name}: slot {ref.slot} claims {nbytes} bytes at {offset} of a payload of "
                f"{self._at.payload_bytes}"
            )
        return offset, nbytes

    def _read_words(self, what: str, addresses: Sequence[int]) -> tuple[int, ...]:
        slot = self._pool.acquire(8 * len(addresses), self._at.read_timeout_s)
        self._transfer(what, slot, [(address, 8) for address in addresses])
        buffer: Any = slot  # no type of Python 3.11 says so
        words: tuple[int, ...] = struct.unpack_from(f"<{len(addresses)}Q", buffer)
        slot.abort()
        return words

    def _transfer(
        self,
        what: str,
        slot: _C.ArenaReservation,
        remote: Sequence[tuple[int, int]],
        *,
        write: bool = False,
    ) -> None:
        """(address, nbytes) in the producer's memory, to or from the slot end to end.

        The slot stays the caller's, but when this raises: then it is free again once the engine
        has let go of it.
        """
        engine = self._engine
        submit = engine.batch_transfer_async_write if write else engine.batch_transfer_async_read
        pending: list[int] = []
        at, failed = slot.address, False
        for address, nbytes in remote:
            # One transfer each: of several in a batch, the status is that of the first.
            batch = submit(self._at.peer, [at], [address], [nbytes]) if nbytes else None
            at += nbytes
            if batch is not None and batch > 0:
                pending.append(batch)
            failed = failed or (batch is not None and batch <= 0)
        try:
            failed = self._wait(what, pending) or failed
        except StoreError:
            self._pool.quarantine(slot, lambda: self._is_over(pending))
            raise
        if failed:
            slot.abort()
            raise self._lost(what)

    def _wait(self, what: str, pending: list[int]) -> bool:
        """Until none is left; whether any failed. TransferTimeout; ProducerLost, for an RDMA read
        of a process that was killed may stay without an answer."""
        wait = mooncake.Pauses(*POLL_EVERY_S, self._at.read_timeout_s)
        look_s, failed = LOST_EVERY_S, False
        while True:
            failed = -1 in self._poll(pending) or failed
            if not pending:
                return failed
            if wait.waited_s > look_s:
                look_s = wait.waited_s + LOST_EVERY_S
                if mooncake.has_ended(self._at.peer):
                    raise ProducerLost(f"{what}: the producer at {self._at.peer} has ended")
            if not wait.sleep():
                raise TransferTimeout(f"{what} at {self._at.peer}", wait.waited_s)

    def _is_over(self, pending: list[int]) -> bool:
        self._poll(pending)
        return not pending

    def _poll(self, pending: list[int]) -> set[int]:
        """Take out of `pending` what has ended, well (1) or not (-1): its number is not valid any
        more."""
        ended = set()
        for batch in list(pending):
            status = int(self._engine.transfer_check_status(batch))
            if status != 0:
                pending.remove(batch)
                ended.add(1 if status == 1 else -1)
        return ended

    def _lost(self, what: str) -> StoreError:
        if self.producer_alive:
            return StoreError(f"{what}: {self._at.peer} refused the transfer")
        return ProducerLost(f"{what}: the producer at {self._at.peer} has ended")
