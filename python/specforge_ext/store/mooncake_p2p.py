"""Samples between hosts without a server: readers read the producer's arena through Mooncake.

The producer's memory is the arena of the shm store, registered once: its slots, its payload, and a
table of acknowledgements, an 8-byte generation per slot. A reader reads the slot's word, then the
payload into a registered pool of its own, then the word again: what was recycled meanwhile is
stale. To acknowledge it writes the generation into the table; the producer looks there when it
wants room. Nothing runs on the producer's side for any of this.

With `direct` the payload lies on the producer's GPU, and the pool on the reader's: the same, but
for the words, which stay on the host.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
from pydantic import Field

from specforge_ext.records import FeatureLayout, Prompt, Sample, SampleRef
from specforge_ext.store import device_memory, mooncake, payload
from specforge_ext.store.base import (
    Capabilities,
    StaleRef,
    StoreError,
)
from specforge_ext.store.device_arena import DeviceArenaConfig, DeviceArenaWriter
from specforge_ext.store.direct_facts import Gpu
from specforge_ext.store.direct_gpu import gpu_for
from specforge_ext.store.mooncake_p2p_reader import MooncakeP2PReader
from specforge_ext.store.mooncake_slots import Address
from specforge_ext.store.reserving import ForwardedReservation
from specforge_ext.store.shm import ShmConfig, ShmHealth, ShmWriter

log = logging.getLogger(__name__)

LOOK_EVERY_S = (0.002, 0.05)
Arena = ShmWriter | DeviceArenaWriter


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
        gpu = gpu_for(config.direct, config.protocol, config.gpu, what="mooncake_p2p writer")
        host = config.host or "127.0.0.1"
        self._engine = mooncake.transfer_engine(host, config.protocol, config.devices)
        self._open_arena: Arena | None = _arena_for(config, gpu)
        self._lock = threading.Lock()
        self._acks = np.zeros(config.max_slots, dtype=np.uint64)
        self._put_generations = np.zeros(config.max_slots, dtype=np.uint64)
        self._registered: list[int] = []
        slots, data = self._arena.regions
        device = None if gpu is None else gpu.index
        self._register(*slots)
        self._register(*data, device=device)
        self._register(self._acks.ctypes.data, self._acks.nbytes)
        self._probe = None if config.direct == "off" else device_memory.Probe(device)
        if self._probe is not None:
            self._register(self._probe.address, device_memory.PROBE_BYTES, device=device)
        self._store = f"mooncake_p2p:{self._arena.epoch:016x}"
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
            direct=config.direct,
            probe=0 if self._probe is None else self._probe.address,
            probe_bytes="" if self._probe is None else self._probe.content.hex(),
        )

    def _register(self, address: int, nbytes: int, *, device: int | None = None) -> None:
        if (code := self._engine.register_memory(address, nbytes)) != 0:
            raise mooncake.registration_error(nbytes, code, device=device)
        self._registered.append(address)

    @property
    def _arena(self) -> Arena:
        if self._open_arena is None:
            raise StoreError("mooncake_p2p writer: wanted an open arena, but it was closed")
        return self._open_arena

    @property
    def capacity_bytes(self) -> int:
        return self._arena.capacity_bytes

    def put(
        self,
        sample: Sample,
        *,
        layout_hash: str,
        timeout_s: float,
        layers: Mapping[str, int] | None = None,
    ) -> SampleRef:
        """As the shm store's: StoreFull at once, TransferTimeout after `timeout_s`.

        As `DeviceArenaWriter.put` where the arena is on a GPU.
        """
        put = partial(
            self._arena.put, sample, layout_hash=layout_hash, timeout_s=0.0, layers=layers
        )
        wait = mooncake.Pauses(*LOOK_EVERY_S, timeout_s)
        return self._published(mooncake.wait_for_room(put, self._collect, wait))

    @property
    def writes_in_place(self) -> bool:
        arena = self._arena
        return isinstance(arena, ShmWriter) and arena.writes_in_place

    def expect_room(self, prompts: Sequence[Prompt], layout: FeatureLayout) -> None:
        """As the shm store's: StoreFull, StoreError."""
        self._on_host().expect_room(prompts, layout)

    def reserve(
        self, prompt: Prompt, layout: FeatureLayout, *, timeout_s: float
    ) -> ForwardedReservation:
        """As the shm store's: StoreFull, TransferTimeout."""
        reserve = partial(self._on_host().reserve, prompt, layout, timeout_s=0.0)
        wait = mooncake.Pauses(*LOOK_EVERY_S, timeout_s)
        room = mooncake.wait_for_room(reserve, self._collect, wait)
        return ForwardedReservation(room, self._published)

    def _on_host(self) -> ShmWriter:
        """The arena, whose memory others may write to. ValueError if it is a GPU's."""
        arena = self._arena
        if not isinstance(arena, ShmWriter):
            raise ValueError(
                "store.direct: wanted an arena on the host for features that are written in place, "
                "it is on a GPU: put them"
            )
        return arena

    def abort(self, ref: SampleRef) -> None:
        """Nobody is going to read this sample any more. StaleRef."""
        payload.expect_ref(ref, store=self._store)
        self._collect()
        self._arena.abort(replace(ref, store=self._arena.store))

    def reap(self) -> int:
        """Take back what readers have acknowledged; how many samples. Ended readers hold nothing
        here: what they did not acknowledge can be opened again."""
        return self._collect()

    def health(self) -> ShmHealth:
        self._collect()
        return self._arena.health()

    def capabilities(self) -> Capabilities:
        on_gpu = isinstance(self._arena, DeviceArenaWriter)
        return mooncake.capabilities_over("mooncake_p2p", self._config.protocol, on_gpu=on_gpu)

    def address(self) -> str:
        """What `MooncakeP2PStore.reader` wants: "mooncake_p2p:EPOCH:JSON"."""
        self._arena  # noqa: B018 - a closed store has none
        return f"{self._store}:{self._address.model_dump_json()}"

    def close(self) -> None:
        """No more samples, no more readers."""
        if self._open_arena is None:
            return
        while self._registered:
            self._engine.unregister_memory(self._registered.pop())
        self._open_arena = None
        self._engine = None

    def _published(self, ref: SampleRef) -> SampleRef:
        with self._lock:
            self._put_generations[ref.slot] = ref.generation
        return replace(ref, store=self._store)

    def _collect(self) -> int:
        """Free the slots whose acknowledgement is of the generation that lies there."""
        arena = self._arena
        num_freed = 0
        with self._lock:
            generations = self._put_generations
            acked = np.flatnonzero((self._acks == generations) & (generations != 0))
            for slot in acked.tolist():
                generation = int(generations[slot])
                generations[slot] = 0  # before another thread may put there
                with contextlib.suppress(StaleRef):  # `abort` was faster
                    arena.free(slot, generation)
                    num_freed += 1
        return num_freed


def _arena_for(config: MooncakeP2PConfig, gpu: Gpu | None) -> Arena:
    """With its payload on the GPU, or on the host."""
    if gpu is None:
        return ShmWriter(
            ShmConfig(
                capacity_bytes=config.capacity_bytes,
                max_slots=config.max_slots,
                checksum=config.checksum,
                encoding=config.encoding,
            )
        )
    on_gpu = DeviceArenaConfig(
        device=gpu.index,
        capacity_bytes=config.capacity_bytes,
        max_slots=config.max_slots,
        checksum=config.checksum,
        encoding=config.encoding,
    )
    return DeviceArenaWriter(on_gpu, kind="mooncake_p2p")
