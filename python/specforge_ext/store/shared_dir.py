"""Samples between processes that share a directory, on one host or on many: one file per sample.

    DIRECTORY/EPOCH/owner                  locked by the writer for as long as it lives
    DIRECTORY/EPOCH/SLOT-GENERATION        a sample's extent, raw; renamed into place when whole

A writer's folder is new with every start. The lock, which ends with its process however that ends,
says to readers and to later writers whether it lives; so no host has to know another's processes.
The file system must support flock(2) and atomic renames (local ones, NFSv4, Lustre with -o flock).
"""

from __future__ import annotations

import heapq
import os
import secrets
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import Field

from specforge_ext.records import Sample, SampleRef
from specforge_ext.store import payload
from specforge_ext.store import shared_dir_files as files
from specforge_ext.store.base import (
    Capabilities,
    ProducerLost,
    StaleRef,
    StoreConfig,
    StoreError,
    StoreFull,
    TransferTimeout,
)

CAPABILITIES = Capabilities(
    kind="shared_dir", protocol="file", zero_copy=True, across_hosts=True, outlives_producer=True
)
LOOK_EVERY_S = (0.002, 0.05)
"""A writer that waits for room looks so often, at first and in the end: files wake nobody."""


class SharedDirConfig(StoreConfig):
    """directory: where the writer makes its folder; readers must see it under the same path. None:
        one in the system's temporary directory, for a run on one host.
    capacity_bytes: payload that may lie there at the same time. max_slots: samples.
    """

    directory: Path | None = None
    capacity_bytes: int = Field(default=256 << 20, gt=0)
    max_slots: int = Field(default=1024, gt=0, le=1 << 20)


@dataclass(frozen=True)
class SharedDirHealth:
    """Files that have not been acknowledged, those being written included."""

    capacity_bytes: int
    used_bytes: int
    num_samples: int


class SharedDirStore:
    """The registered store: opens either side of a folder."""

    Config = SharedDirConfig

    @staticmethod
    def unavailable() -> str | None:
        """Why this host cannot have one, or None."""
        return None

    @staticmethod
    def writer(config: SharedDirConfig) -> SharedDirWriter:
        """A new, empty folder; what ended writers left beside it is removed.

        OSError if the directory cannot be made, written to or locked.
        """
        return SharedDirWriter(config)

    @staticmethod
    def reader(address: str) -> SharedDirReader:
        """Attach to a writer's `address()`, as the same user.

        ProducerLost if it has ended or closed; ValueError if that is no address, or another user's
        folder.
        """
        return SharedDirReader(address)


class SharedDirWriter:
    """Any thread may put."""

    def __init__(self, config: SharedDirConfig) -> None:
        self._config = config
        self._base = files.base_of(config.directory)
        self._epoch = secrets.token_hex(8)
        self._folder = self._base / self._epoch
        self._store = f"shared_dir:{self._epoch}"
        self._lock = threading.Lock()
        self._free = list(range(config.max_slots))
        self._generations = [0] * config.max_slots
        self._taken: dict[int, _Taken] = {}
        files.reap(self._base)
        self._owner: int | None = files.make_folder(self._base, self._epoch)

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
        """Write a sample's file and rename it into place. Waits for readers to remove others.

        See `StoreWriter.put` for `sample`, `layers` and errors; StoreError if the disk is full.
        """
        self._expect_open()
        planned, tensors = payload.plan_sample(
            sample,
            store=self._store,
            layout_hash=layout_hash,
            encoding=self._config.encoding,
            layers=layers,
        )
        slot, generation = self._wait_for_room(planned.nbytes, timeout_s)
        planned = replace(planned, slot=slot, generation=generation)
        path = self._folder / files.name_of(planned)
        try:
            written = files.write(path, planned, tensors, checksum=self._config.checksum)
        except BaseException:
            with self._lock:
                self._give_back(slot)
            raise
        with self._lock:
            self._taken[slot].published = True
        return replace(planned, tensors=written)

    def abort(self, ref: SampleRef) -> None:
        """Nobody is going to read this sample any more: as a reader's `ack`. StaleRef."""
        self._expect_open()
        payload.expect_ref(ref, store=self._store)
        files.remove(self._folder, ref)

    def reap(self) -> int:
        """Remove what ended writers left in the directory; how many writers those were."""
        self._expect_open()
        return files.reap(self._base)

    def health(self) -> SharedDirHealth:
        self._expect_open()
        with self._lock:
            self._collect()
            return SharedDirHealth(self.capacity_bytes, self._used_bytes(), len(self._taken))

    def capabilities(self) -> Capabilities:
        return CAPABILITIES

    def address(self) -> str:
        """What `SharedDirStore.reader` wants: "shared_dir:EPOCH:DIRECTORY"."""
        return f"shared_dir:{self._epoch}:{self._base}"

    def close(self) -> None:
        """No more samples, no more readers; the files are removed. Open leases keep theirs."""
        if self._owner is None:
            return
        owner, self._owner = self._owner, None
        files.remove_folder(self._folder)
        os.close(owner)

    def _expect_open(self) -> None:
        if self._owner is None:
            raise StoreError("shared_dir writer: wanted an open folder, but it was closed")

    def _wait_for_room(self, nbytes: int, timeout_s: float) -> tuple[int, int]:
        """A slot and its new generation."""
        if nbytes > self.capacity_bytes:
            raise StoreFull(nbytes, self.capacity_bytes)
        start = time.monotonic()
        pause_s = LOOK_EVERY_S[0]
        while True:
            with self._lock:
                if (slot := self._take(nbytes)) is not None:
                    return slot, self._generations[slot]
                state = (
                    f"used {self._used_bytes()} of {self.capacity_bytes} bytes, "
                    f"{len(self._taken)} of {self._config.max_slots} samples"
                )
            waited_s = time.monotonic() - start
            if waited_s >= timeout_s:
                raise TransferTimeout(
                    f"room for {nbytes} bytes in {self._folder} ({state})", waited_s
                )
            time.sleep(min(pause_s, timeout_s - waited_s))
            pause_s = min(pause_s * 1.5, LOOK_EVERY_S[1])

    def _take(self, nbytes: int) -> int | None:
        if not self._has_room(nbytes):
            self._collect()
        if not self._has_room(nbytes):
            return None
        slot = heapq.heappop(self._free)
        self._generations[slot] += 1
        self._taken[slot] = _Taken(nbytes)
        return slot

    def _has_room(self, nbytes: int) -> bool:
        return bool(self._free) and self._used_bytes() + nbytes <= self.capacity_bytes

    def _used_bytes(self) -> int:
        return sum(taken.nbytes for taken in self._taken.values())

    def _collect(self) -> None:
        """Forget what readers have removed."""
        there = {int(p.name[:8], 16) for p in self._folder.glob("*-*") if p.name[0] != "."}
        for slot in [s for s, taken in self._taken.items() if taken.published]:
            if slot not in there:
                self._give_back(slot)

    def _give_back(self, slot: int) -> None:
        del self._taken[slot]
        heapq.heappush(self._free, slot)


@dataclass
class _Taken:
    nbytes: int
    published: bool = False


class SharedDirReader:
    """Any thread may open and acknowledge. What was put stays readable when the producer dies."""

    def __init__(self, address: str) -> None:
        kind, _, rest = address.partition(":")
        epoch, _, directory = rest.partition(":")
        if kind != "shared_dir" or len(epoch) != 16 or not Path(directory).is_absolute():
            raise ValueError(
                f"shared_dir: address must be shared_dir:EPOCH:DIRECTORY, got {address[:96]!r}"
            )
        self._folder = Path(directory) / epoch
        self._store = f"shared_dir:{epoch}"
        files.expect_own(self._folder)
        if not self.producer_alive:
            raise ProducerLost(f"{self._folder}: its producer has ended")

    @property
    def producer_alive(self) -> bool:
        return files.is_locked(self._folder)

    def open(self, ref: SampleRef, *, layout_hash: str, verify: bool) -> payload.SampleLease:
        """Map a sample's file; its tensors are private views: writing to one changes no file.

        verify: compare the checksums. ValueError for an impossible ref; LayoutMismatch, StaleRef,
        CorruptFeature; ProducerLost if the folder was removed.
        """
        payload.expect_ref(ref, store=self._store)
        payload.expect_layout(ref, layout_hash)
        return payload.lease(self._map(ref), ref, verify=verify)

    def ack(self, ref: SampleRef) -> None:
        """Remove the sample's file; leases keep their bytes. StaleRef, also the second time."""
        payload.expect_ref(ref, store=self._store)
        try:
            files.remove(self._folder, ref)
        except StaleRef as error:
            self._expect_folder()
            raise error from None

    def capabilities(self) -> Capabilities:
        return CAPABILITIES

    def close(self) -> None:
        """Nothing is held but by leases."""

    def _map(self, ref: SampleRef) -> files.MappedFile:
        path = self._folder / files.name_of(ref)
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            self._expect_folder()
            raise files.stale(ref) from None
        try:
            return files.MappedFile(fd, os.fstat(fd).st_size)
        finally:
            os.close(fd)

    def _expect_folder(self) -> None:
        if not self._folder.is_dir():
            raise ProducerLost(f"{self._folder}: removed, its producer has ended or closed it")
