"""The stores that the contract tests run over, and how their memory can be reached."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch

import fake_cuda  # in processes that tests start it installs itself
from specforge_ext.records import SampleRef
from specforge_ext.store import STORES, device_memory, direct_gpu
from specforge_ext.store.base import StaleRef
from specforge_ext.store.device_arena import DeviceArenaWriter
from store_cases import SLOWDOWN

OVER_MOONCAKE = ("mooncake_store", "mooncake_p2p")
PROTOCOL = os.environ.get("SPECFORGE_EXT_TEST_PROTOCOL", "tcp")
"""Of the Mooncake stores. With rdma only they are tested, by `make test-rdma`."""
LINK = {"protocol": PROTOCOL, "devices": os.environ.get("SPECFORGE_EXT_TEST_DEVICES", "")}
KINDS = (*(("shm", "shared_dir", "cuda_ipc") if PROTOCOL == "tcp" else ()), *OVER_MOONCAKE)
ON_GPU = "/gpu"
"""After the kind of a store over Mooncake: its samples lie in the memory of a GPU."""
VARIANTS = (*KINDS, *(f"{kind}{ON_GPU}" for kind in OVER_MOONCAKE))
CARRIERS = {"shm": "memory", "shared_dir": "file", "cuda_ipc": "cuda"} | dict.fromkeys(
    OVER_MOONCAKE, PROTOCOL
)


def settings_of(variant: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What its config needs here. Without a GPU cuda_ipc and ON_GPU get a driver made of memfds;
    skips with the reason where a variant cannot be had."""
    kind, on_gpu, _ = variant.partition(ON_GPU)
    settings: dict[str, Any] = dict(LINK) if kind in OVER_MOONCAKE else {}
    if kind == "cuda_ipc":
        settings["checksum"] = True
    if on_gpu:
        settings["direct"] = "on"
    if (on_gpu or kind == "cuda_ipc") and not torch.cuda.is_available():
        if fake_cuda.real_driver():
            pytest.skip("a CUDA driver without a GPU that torch can use")
        monkeypatch.setenv(fake_cuda.WANTED, "1")
        fake_cuda.install(monkeypatch.setattr)
    if (reason := STORES.get(kind).unavailable()) is not None:
        pytest.skip(reason)
    if on_gpu and (reason := direct_gpu.why_not(f"gpu_{PROTOCOL}", direct_gpu.probe_gpu(None))):
        pytest.skip(reason)
    return settings


@dataclass
class Opened:
    """Writers and readers of one kind for one test.

    Mooncake takes seconds to close one, so that those are kept for the next test, but emptied.
    """

    kind: str
    settings: dict[str, Any]
    kept: dict[object, list[Any]]
    _open: list[Any] = field(default_factory=list)

    def writer(self, capacity_bytes: int, **more: Any) -> Any:
        store = STORES.get(self.kind)
        config = store.Config(capacity_bytes=capacity_bytes, **{**self.settings, **more})
        return self._take(repr((self.kind, config)), lambda: store.writer(config))

    def reader(self, writer: Any) -> Any:
        address = writer.address()
        return self._take(address, lambda: STORES.get(self.kind).reader(address))

    def attach(self, address: str) -> Any:
        """A reader that no other test gets."""
        self._open.append(STORES.get(self.kind).reader(address))
        return self._open[-1]

    def close(self) -> None:
        while self._open:
            it = self._open.pop()
            if not any(it is kept for group in self.kept.values() for kept in group):
                it.close()
            elif hasattr(it, "put"):
                EMPTY[self.kind](it)

    def _take(self, key: str, make: Callable[[], Any]) -> Any:
        group = self.kept.setdefault(key, []) if self.kind in EMPTY else []
        free = [it for it in group if not any(it is used for used in self._open)]
        if not free:
            free = [make()]
            group += free
        self._open.append(free[0])
        return free[0]


def empty_mooncake_store(writer: Any) -> None:
    for generation in list(writer._published):
        assert writer._client.remove(writer._key(generation), True) in (0, -704)


def empty_arena(writer: Any) -> None:
    for slot, generation in enumerate(writer._put_generations.tolist()):
        if generation:
            with contextlib.suppress(StaleRef):
                writer._arena.free(slot, generation)


EMPTY: dict[str, Callable[[Any], None]] = {
    "mooncake_store": empty_mooncake_store,
    "mooncake_p2p": empty_arena,
}


def flip(writer: Any, ref: SampleRef, at: int, bit: int | None = None) -> None:
    """Change a bit of a sample's byte behind the store's back; the second time changes it back."""
    FLIP[ref.store.partition(":")[0]](writer, ref, at, at % 8 if bit is None else bit)


def flip_in_file(fd: int, at: int, bit: int) -> None:
    [byte] = os.pread(fd, 1, at)
    os.pwrite(fd, bytes([byte ^ (1 << bit)]), at)


def flip_in_arena(writer: Any, ref: SampleRef, at: int, bit: int) -> None:
    fd = int(writer.address().split(":")[3])
    control = 4096 + 4096 * (64 * 1024 // 4096)  # the header, and 1024 slots of 64 bytes
    slot = 4096 + 64 * ref.slot
    offset = int.from_bytes(os.pread(fd, 8, slot + 8), "little")
    flip_in_file(fd, control + offset + at, bit)


def flip_in_registered_arena(writer: Any, ref: SampleRef, at: int, bit: int) -> None:
    if isinstance(writer._arena, DeviceArenaWriter):
        flip_on_gpu(writer._arena, ref, at, bit)
    else:
        flip_in_arena(writer._arena, ref, at, bit)


def flip_on_gpu(writer: Any, ref: SampleRef, at: int, bit: int) -> None:
    reader = writer._arena.reader()
    whole = device_memory.device_bytes(reader.lease(ref.slot, ref.generation))
    whole[at] ^= 1 << bit
    if whole.is_cuda:
        torch.cuda.synchronize()


def flip_in_folder(writer: Any, ref: SampleRef, at: int, bit: int) -> None:
    _, epoch, base = writer.address().split(":", 2)
    path = Path(base) / epoch / f"{ref.slot:08x}-{ref.generation:010x}"
    fd = os.open(path, os.O_RDWR)
    flip_in_file(fd, at, bit)
    os.close(fd)


def flip_in_mooncake(writer: Any, ref: SampleRef, at: int, bit: int) -> None:
    """Another object under the same key."""
    client, key = writer._client, f"specforge/{ref.store.split(':')[1]}/{ref.generation:x}"
    slot = writer._registered().acquire(ref.nbytes, 1.0)
    assert client.batch_get_into([key], [slot.address], [ref.nbytes]) == [ref.nbytes]
    ctypes.c_ubyte.from_address(slot.address + at).value ^= 1 << bit
    assert client.remove(key, True) == 0
    assert client.batch_put_from([key], [slot.address], [ref.nbytes], writer._placement) == [0]
    slot.abort()


FLIP: dict[str, Callable[[Any, SampleRef, int, int], None]] = {
    "shm": flip_in_arena,
    "shared_dir": flip_in_folder,
    "mooncake_p2p": flip_in_registered_arena,
    "mooncake_store": flip_in_mooncake,
    "cuda_ipc": flip_on_gpu,
}


def receive(pipe: Connection) -> Any:
    wait_s = 60.0 * SLOWDOWN
    assert pipe.poll(wait_s), f"nothing came from the other process in {wait_s:.0f} s"
    return pipe.recv()


START = "spawn" if SLOWDOWN == 1 else "forkserver"
"""Where importing takes a minute it is done once, by a process that does nothing else."""
multiprocessing.set_forkserver_preload(["pytest", "torch", "specforge_ext.store"])


@contextmanager
def started(
    child: Callable[..., None], *arguments: object
) -> Iterator[tuple[BaseProcess, Connection]]:
    """A fresh process with one end of a pipe; killed at the end if it still runs."""
    context = multiprocessing.get_context(START)
    ours, theirs = context.Pipe()
    process = context.Process(target=child, args=(theirs, *arguments))
    process.start()
    theirs.close()
    try:
        yield process, ours
    finally:
        process.kill()
        process.join(20)
        ours.close()


def kill(process: BaseProcess) -> None:
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join(20)
    assert process.exitcode == -signal.SIGKILL
