"""What both Mooncake stores need: the package, the protocol that was asked for, registered memory.

Mooncake has no authentication: whoever reaches its ports reads and writes the samples. Its data
ports listen on every interface; keep them within a network that is trusted.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import resource
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar, overload

from pydantic import Field

from specforge_ext import _C
from specforge_ext.config import Switch
from specforge_ext.store import device_memory, payload
from specforge_ext.store.base import Capabilities, StoreConfig, StoreError, TransferTimeout

INFINIBAND = Path("/sys/class/infiniband")
HANDSHAKE = "P2PHANDSHAKE"
"""Mooncake's name for: no metadata server, peers ask each other."""
FORCE_TCP = "MC_FORCE_TCP"
PEER_MEMORY = "WITH_NVIDIA_PEERMEM"
"""How it registers GPU memory with a card: 1 (if not set) by nvidia_peermem, 0 by a dma_buf."""
POOL_SLOTS = 4096
T = TypeVar("T")
Protocol = Literal["tcp", "rdma"]
_ENVIRONMENT = threading.Lock()


class MooncakeConfig(StoreConfig):
    """protocol: what carries the bytes; rdma without a device is an error, never TCP instead.
    devices: RDMA devices, comma-separated ("": Mooncake chooses).
    host: name or address under which others reach the producer (None: the route to the master, or
        this host alone).
    capacity_bytes: payload that may lie in the store at the same time.
    pool_bytes: registered memory on the other side of a copy, which bounds the largest sample: each
        reader's, and in mooncake_store the writer's too (None: capacity_bytes).
    read_timeout_s: deadline of reading one sample, and of its wait for room in the reader's pool.
    direct: samples lie in the memory of a GPU, which Mooncake fills and (mooncake_p2p) reads: where
        that can be had (auto; the log says if not, and why), always (on: an error where it cannot
        be), never. Each side has to have a GPU for itself.
    gpu: ordinal of the producer's (None: torch's current one); readers take their current one.
    """

    protocol: Protocol = "tcp"
    devices: str = ""
    host: str | None = None
    capacity_bytes: int = Field(default=256 << 20, gt=0, le=1 << 46)
    pool_bytes: int | None = Field(default=None, gt=0, le=1 << 46)
    read_timeout_s: float = Field(default=60.0, gt=0)
    direct: Switch = "off"
    gpu: int | None = Field(default=None, ge=0)

    @property
    def pool_or_capacity_bytes(self) -> int:
        return self.pool_bytes or self.capacity_bytes


def unavailable() -> str | None:
    """Why Mooncake cannot be used here, or None."""
    try:
        for name in ("mooncake.store", "mooncake.engine"):
            importlib.import_module(name)
    except ImportError as error:
        return (
            f"{error}; wanted pip install '.[mooncake]' in a checkout, and the libraries "
            "libibverbs1 libnuma1 libcurl4"
        )
    return None


def built_with_cuda() -> bool:
    """Whether it can tell a GPU's memory from the host's: its engine is linked with CUDA's runtime.
    False too where there is none."""
    found = importlib.util.find_spec("mooncake")
    folders = found.submodule_search_locations if found is not None else None
    engines = [path for folder in folders or () for path in Path(folder).glob("engine*.so")]
    return any(b"libcudart.so" in path.read_bytes() for path in engines)


def register_gpu_memory(*, by_peer_memory: bool) -> None:
    """Say how, to engines that are made later, unless it was said in the environment."""
    os.environ.setdefault(PEER_MEMORY, str(int(by_peer_memory)))


def module(name: str) -> Any:
    """A module of Mooncake's. StoreError says what to install."""
    reason = unavailable()
    if reason is not None:
        raise StoreError(f"Mooncake is not available: {reason}")
    return importlib.import_module(name)


def transfer_engine(host: str, protocol: Protocol, devices: str) -> Any:
    """Mooncake's engine, listening. StoreError without package or device."""
    expect_protocol(protocol, devices)
    engine = module("mooncake.engine").TransferEngine()
    with only(protocol):
        code = engine.initialize(host, HANDSHAKE, protocol, devices)
    if code != 0:
        raise StoreError(f"Mooncake could not listen on {host} over {protocol}: error {code}")
    return engine


def expect_protocol(protocol: Protocol, devices: str) -> None:
    """StoreError if it is not to be had: Mooncake itself would use TCP and say nothing."""
    if protocol != "rdma":
        return
    if FORCE_TCP in os.environ:
        raise StoreError(f"store.protocol: wanted rdma, but {FORCE_TCP} is set")
    found = sorted(path.name for path in INFINIBAND.iterdir()) if INFINIBAND.is_dir() else []
    if not found:
        raise StoreError(
            f"store.protocol: wanted rdma, but {INFINIBAND} has no device; tcp has to be asked for"
        )
    wanted = devices.split(",") if devices else found
    if missing := set(wanted) - set(found):
        raise StoreError(
            f"store.devices: wanted {', '.join(sorted(missing))}, "
            f"but {INFINIBAND} has {', '.join(found)}"
        )
    if not any(_has_active_port(INFINIBAND / name) for name in wanted):
        raise StoreError(
            f"store.protocol: wanted rdma, but no port of {', '.join(wanted)} is active"
        )


def registration_error(nbytes: int, code: int, *, device: int | None = None) -> StoreError:
    """device: ordinal of the GPU whose memory it was."""
    if device is None:
        where, why = "", memlock_limit()
    else:
        where, why = f" of cuda:{device}", f"{PEER_MEMORY}={os.environ.get(PEER_MEMORY)}"
    return StoreError(f"Mooncake refused to register {nbytes} bytes{where}: error {code}, {why}")


def other_bytes(store: str, protocol: str) -> StoreError:
    """For who has looked at what a transfer brought to, or from, a GPU."""
    return StoreError(
        f"{store}: store.direct: Mooncake reported success over {protocol}, but brought other "
        "bytes than lie in the producer's memory"
    )


def memlock_limit() -> str:
    """For errors: RDMA locks what is registered, and only root may lock as much as it wants."""
    nbytes, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return f"memlock limit {'none' if nbytes == resource.RLIM_INFINITY else nbytes}"


@contextmanager
def only(protocol: Protocol) -> Iterator[None]:
    """For the making of an engine, which does not heed the protocol that it is given: it uses RDMA
    where there is a device, but for an environment variable."""
    with _ENVIRONMENT:
        if protocol == "rdma" or FORCE_TCP in os.environ:
            yield
            return
        os.environ[FORCE_TCP] = "1"
        try:
            yield
        finally:
            del os.environ[FORCE_TCP]


def _has_active_port(device: Path) -> bool:
    states = (device / "ports").glob("*/state")
    return any(state.read_text().strip().endswith("ACTIVE") for state in states)


def capabilities_over(kind: str, protocol: str, *, on_gpu: bool = False) -> Capabilities:
    return Capabilities(
        kind=kind,
        protocol=protocol,
        zero_copy=False,
        across_hosts=True,
        outlives_producer=False,
        on_gpu=on_gpu,
    )


def local_host(towards: str) -> str:
    """The address of this host on its way to another one. Sends nothing."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.connect((towards, 9))
        return str(sock.getsockname()[0])


def is_reachable(address: str, *, timeout_s: float) -> bool:
    """Whether somebody listens at "host:port"."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=timeout_s).close()
    except OSError:
        return False
    return True


def has_ended(address: str) -> bool:
    """Whether the host says that nobody listens at "host:port". One that says nothing may only be
    slow."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=1.0).close()
    except ConnectionRefusedError:
        return True
    except OSError:
        return False
    return False


Room = _C.ArenaReservation | _C.DeviceArenaReservation
HeldRoom = TypeVar("HeldRoom", bound=Room)


@dataclass(frozen=True)
class _Quarantined:
    slot: Room
    is_over: Callable[[], bool]


class Pool(Generic[HeldRoom]):
    """Memory of this process, registered once, from which samples get extents.

    It is an arena that nobody else attaches to: the same allocator, the same lifetime of views.
    device: ordinal of the GPU in whose memory it lies; None: the host's.
    """

    @overload
    def __init__(
        self: Pool[_C.ArenaReservation], nbytes: int, register: Callable[[int, int], int]
    ) -> None: ...

    @overload
    def __init__(
        self: Pool[Room], nbytes: int, register: Callable[[int, int], int], *, device: int | None
    ) -> None: ...

    def __init__(
        self, nbytes: int, register: Callable[[int, int], int], *, device: int | None = None
    ) -> None:
        self.device = device
        self._arena: Any
        self._views: Any
        if device is None:
            self._arena = _C.ArenaProducer(nbytes, POOL_SLOTS)
            self._views = _C.ArenaConsumer(self._arena.address)
        else:
            self._arena = _C.DeviceArenaProducer(device, nbytes, POOL_SLOTS)
            self._views = self._arena.reader()
        self._quarantine: list[_Quarantined] = []
        self.region: tuple[int, int] = self._arena.regions[1]
        code = register(*self.region)
        if code != 0:
            raise registration_error(nbytes, code, device=device)

    def acquire(self, nbytes: int, timeout_s: float) -> HeldRoom:
        """Room to write to. StoreFull, TransferTimeout."""
        self._quarantine = [q for q in self._quarantine if not self._freed(q)]
        room: HeldRoom = self._arena.acquire(nbytes, timeout_s)
        return room

    def lease(self, slot: Room) -> payload.Extent:
        """What was written, until the last view of it is gone; then the room is free again."""
        slot.publish()
        lease: _C.ArenaLease | _C.DeviceArenaLease
        lease = self._views.lease(slot.slot, slot.generation)
        self._arena.discard(slot.slot, slot.generation)
        if isinstance(lease, _C.ArenaLease):
            return lease
        return payload.TensorExtent(device_memory.device_bytes(lease))

    @staticmethod
    def content(slot: Room) -> bytes:
        """What was written, copied to the host."""
        if isinstance(slot, _C.ArenaReservation):
            buffer: Any = slot  # no type of Python 3.11 says so
            return bytes(buffer)
        return device_memory.device_bytes(slot).cpu().numpy().tobytes()

    def quarantine(self, slot: Room, is_over: Callable[[], bool]) -> None:
        """Something may still write there: the room is not used again until `is_over` says so."""
        self._quarantine.append(_Quarantined(slot, is_over))

    @staticmethod
    def _freed(quarantined: _Quarantined) -> bool:
        if not quarantined.is_over():
            return False
        quarantined.slot.abort()
        return True


class Pauses:
    """Sleeps that grow, up to a deadline."""

    def __init__(self, first_s: float, longest_s: float, timeout_s: float) -> None:
        self._pause_s = first_s
        self._longest_s = longest_s
        self._timeout_s = timeout_s
        self._began = time.monotonic()

    @property
    def waited_s(self) -> float:
        return time.monotonic() - self._began

    @property
    def left_s(self) -> float:
        return max(0.0, self._timeout_s - self.waited_s)

    def sleep(self) -> bool:
        """False, at once, when the time is over."""
        left_s = self.left_s
        if left_s == 0.0:
            return False
        time.sleep(min(self._pause_s, left_s))
        self._pause_s = min(self._pause_s * 1.5, self._longest_s)
        return True


def wait_for_room(attempt: Callable[[], T], collect: Callable[[], object], wait: Pauses) -> T:
    """What `attempt` gives once it no longer ends in TransferTimeout, `collect` called before each;
    with the last one's at the deadline."""
    while True:
        collect()
        try:
            return attempt()
        except TransferTimeout as error:
            if not wait.sleep():
                raise TransferTimeout(error.what, wait.waited_s) from None
