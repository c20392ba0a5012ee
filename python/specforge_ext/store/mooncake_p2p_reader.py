"""The reading side of the mooncake_p2p store."""

from __future__ import annotations

import re
import struct
from collections.abc import Sequence
from typing import Any

from specforge_ext import _C
from specforge_ext.config import parse_json
from specforge_ext.copies import copied
from specforge_ext.records import SampleRef
from specforge_ext.store import device_memory, direct_gpu, mooncake, payload
from specforge_ext.store.base import (
    Capabilities,
    CorruptFeature,
    ProducerLost,
    StaleRef,
    StoreError,
    TransferTimeout,
)
from specforge_ext.store.mooncake_slots import EPOCH_AT, PAGE_BYTES, READY, SLOT_BYTES, Address

POLL_EVERY_S = (0.00005, 0.001)
LOST_EVERY_S = 1.0
WORDS_BYTES = 1 << 20
"""Registered on the host beside a pool on a GPU."""


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
        self._gpu = direct_gpu.gpu_for(self._at.direct, self._at.protocol, None, what=self._store)
        host = mooncake.local_host(self._at.peer.rpartition(":")[0])
        self._engine = mooncake.transfer_engine(host, self._at.protocol, self._at.devices)
        register = self._engine.register_memory
        self._open_pool: mooncake.Pool[mooncake.Room] | None = mooncake.Pool(
            self._at.pool_bytes, register, device=None if self._gpu is None else self._gpu.index
        )
        # Of words that this process looks at, which it cannot in the memory of a GPU.
        self._word_pool = None if self._gpu is None else mooncake.Pool(WORDS_BYTES, register)
        if not self.producer_alive:
            raise ProducerLost(f"{self._store}: its producer at {self._at.peer} has ended")
        [epoch] = self._read_words("the arena's header", [self._at.slots + EPOCH_AT])
        if epoch != self._epoch:
            raise ProducerLost(f"{self._store}: its producer has ended, {epoch:016x} is there now")
        if self._at.probe:
            self._expect_probe()

    @property
    def _pool(self) -> mooncake.Pool[mooncake.Room]:
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
            if self._gpu is not None:
                direct_gpu.arrived(self._gpu, self._at.protocol)
            self._locate(ref)
        except StoreError:
            slot.abort()
            raise
        with device_memory.own_stream(self._pool.device):
            return payload.lease(self._pool.lease(slot), ref, verify=verify)

    def ack(self, ref: SampleRef) -> None:
        """Write the generation where the producer looks; leases keep their bytes. StaleRef, also
        the second time."""
        payload.expect_ref(ref, store=self._store)
        self._locate(ref)
        slot = self._acquire_words(8)
        slot.write(0, memoryview(struct.pack("<Q", ref.generation)), False)
        target = self._at.acks + 8 * ref.slot
        what = f"the acknowledgement of sample {ref.sample_id!r}"
        self._transfer(what, slot, [(target, 8)], write=True)
        slot.abort()

    def capabilities(self) -> Capabilities:
        on_gpu = self._gpu is not None
        return mooncake.capabilities_over("mooncake_p2p", self._at.protocol, on_gpu=on_gpu)

    def close(self) -> None:
        """Leases keep their bytes."""
        if self._open_pool is not None:
            self._engine.unregister_memory(self._open_pool.region[0])
            if self._word_pool is not None:
                self._engine.unregister_memory(self._word_pool.region[0])
            self._open_pool = self._word_pool = None
            self._engine = None

    def _expect_probe(self) -> None:
        """StoreError unless a transfer brings the producer's bytes to where samples are read."""
        wanted = bytes.fromhex(self._at.probe_bytes)
        slot = self._pool.acquire(len(wanted), self._at.read_timeout_s)
        what = "the bytes to try with"
        self._transfer(what, slot, [(self._at.probe, len(wanted))])
        if self._gpu is not None:
            direct_gpu.arrived(self._gpu, self._at.protocol)
        came = self._pool.content(slot)
        slot.abort()
        if came != wanted:
            raise mooncake.other_bytes(self._store, self._at.protocol)

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

    def _acquire_words(self, nbytes: int) -> _C.ArenaReservation:
        pool = self._word_pool or self._pool
        slot = pool.acquire(nbytes, self._at.read_timeout_s)
        assert isinstance(slot, _C.ArenaReservation)
        return slot

    def _read_words(self, what: str, addresses: Sequence[int]) -> tuple[int, ...]:
        slot = self._acquire_words(8 * len(addresses))
        self._transfer(what, slot, [(address, 8) for address in addresses])
        buffer: Any = slot  # no type of Python 3.11 says so
        words: tuple[int, ...] = struct.unpack_from(f"<{len(addresses)}Q", buffer)
        slot.abort()
        return words

    def _transfer(
        self,
        what: str,
        slot: mooncake.Room,
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
