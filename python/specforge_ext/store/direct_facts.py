"""What this machine says of its GPUs, network cards and limits: the facts that `direct` judges.

Asked of the CUDA driver itself, not of torch: a build of torch without CUDA must not hide a GPU.
Nothing here makes a CUDA context.
"""

from __future__ import annotations

import ctypes
import resource
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from specforge_ext import _C
from specforge_ext.store import mooncake

DRIVER = "libcuda.so.1"
ATTRIBUTES = {
    "compute_mode": 20,
    "vmm": 102,
    "vmm_fd": 103,
    "vmm_rdma": 110,
    "read_only_register": 113,
    "rdma": 116,
    "rdma_flush": 117,
    "rdma_ordered": 118,
    "dma_buf": 124,
    "ipc_event": 125,
}
"""Numbers of CUdevice_attribute (cuda.h)."""

NUMBERS = ("compute_mode", "rdma_flush", "rdma_ordered")
"""Those that say more than yes or no."""

PEER_MEMORY = ("nvidia_peermem", "nv_peer_mem")
"""Kernel modules, the driver's own and its predecessor, that let network cards read GPU memory."""
FLUSH_BY_HOST = 1
"""Of the bits of attribute 117 (CUflushGPUDirectRDMAWritesOptions)."""
ORDERED_FOR_OWNER = 100
"""Of attribute 118: from here on the GPU's own kernels need no flush."""
CAP_IPC_LOCK = 14
INITIAL_PID_NAMESPACE = "pid:[4026531836]"
CONTAINER_MARKS = (".dockerenv", "run/.containerenv")


@dataclass(frozen=True)
class Gpu:
    """A visible GPU. compute_mode: 0 shared, 2 prohibited, 3 one process at a time.

    vmm, vmm_fd: memory by cuMemCreate, and its export as a file descriptor. rdma, dma_buf: network
    cards may reach it, through nvidia_peermem or a dma_buf; vmm_rdma: memory by cuMemCreate too.
    rdma_ordered: what they have written is seen by kernels that start later; rdma_flush: by a call
    of the driver.
    read_only_register: pages that are mapped read-only can be page-locked. peers: indices of GPUs
    whose memory it reaches.
    """

    index: int
    name: str
    compute_mode: int
    vmm: bool
    vmm_fd: bool
    vmm_rdma: bool
    read_only_register: bool
    rdma: bool
    dma_buf: bool
    rdma_ordered: bool
    rdma_flush: bool
    ipc_event: bool
    peers: tuple[int, ...]


@dataclass(frozen=True)
class Hca:
    """A port of an RDMA device. state: "ACTIVE" if it can be used. link: InfiniBand or Ethernet."""

    device: str
    port: str
    state: str
    link: str

    def __str__(self) -> str:
        return f"{self.device} port {self.port} ({self.link}, {self.state})"


@dataclass(frozen=True)
class Facts:
    """no_gpu, no_torch, no_mooncake, no_kernels: why not, or None.

    peer_memory: the kernel module that is loaded, or None. memlock_bytes: memory that a process
    may lock for a network card, None for any. mooncake_cuda: its build can register GPU memory.
    container: this process seems to run in one.
    """

    no_gpu: str | None
    gpus: tuple[Gpu, ...]
    no_torch: str | None
    no_kernels: str | None
    hcas: tuple[Hca, ...]
    peer_memory: str | None
    memlock_bytes: int | None
    no_mooncake: str | None
    mooncake_cuda: bool
    container: bool


def probe(root: Path = Path("/")) -> Facts:
    """The facts of this machine; of its files under another root, for tests."""
    gpus, no_gpu = cuda_gpus()
    return Facts(
        no_gpu=no_gpu,
        gpus=gpus,
        no_torch=no_torch_cuda(),
        no_kernels=None if _C.cuda_compiled else "specforge_ext was built without CUDA kernels",
        hcas=hcas(root),
        peer_memory=peer_memory(root),
        memlock_bytes=memlock_bytes(root),
        no_mooncake=mooncake.unavailable(),
        mooncake_cuda=mooncake.built_with_cuda(),
        container=in_container(root),
    )


def no_torch_cuda() -> str | None:
    """Why torch has no CUDA here, or None."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a build without CUDA"
    return None if torch.cuda.is_available() else "torch sees no CUDA device"


def cuda_gpus(library: str = DRIVER) -> tuple[tuple[Gpu, ...], str | None]:
    """The GPUs that the driver shows to this process, or why there is none."""
    try:
        driver = ctypes.CDLL(library)
    except OSError as error:
        return (), f"no CUDA driver: {error}"
    try:
        _call(driver.cuInit, 0)
        count = _number(driver.cuDeviceGetCount)
        gpus = tuple(_gpu(driver, index, count) for index in range(count))
    except _DriverError as error:
        return (), str(error)
    return gpus, None if gpus else f"{library} shows no GPU"


class _DriverError(RuntimeError):
    """A call of the driver failed."""


def _gpu(driver: ctypes.CDLL, index: int, count: int) -> Gpu:
    device = _number(driver.cuDeviceGet, index)
    name = ctypes.create_string_buffer(256)
    _call(driver.cuDeviceGetName, name, len(name), device)

    def attribute(key: str) -> int:
        return _number(driver.cuDeviceGetAttribute, ATTRIBUTES[key], device)

    others = [other for other in range(count) if other != index]
    reach = {i: _number(driver.cuDeviceCanAccessPeer, device, i) for i in others}
    return Gpu(
        index=index,
        name=name.value.decode(errors="replace"),
        compute_mode=attribute("compute_mode"),
        peers=tuple(i for i, reached in reach.items() if reached),
        rdma_ordered=attribute("rdma_ordered") >= ORDERED_FOR_OWNER,
        rdma_flush=bool(attribute("rdma_flush") & FLUSH_BY_HOST),
        **{key: bool(attribute(key)) for key in ATTRIBUTES if key not in NUMBERS},
    )


def _number(function: Callable[..., int], *arguments: object) -> int:
    """What a call writes through its first argument. Unknown attributes (an old driver) are 0."""
    value = ctypes.c_int(0)
    invalid_value = 1
    _call(function, ctypes.byref(value), *arguments, allowed=(0, invalid_value))
    return value.value


def _call(
    function: Callable[..., int], *arguments: object, allowed: tuple[int, ...] = (0,)
) -> None:
    code = function(*arguments)
    if code not in allowed:
        name = getattr(function, "__name__", "CUDA driver")
        raise _DriverError(f"{name} answered error {code} (CUresult, cuda.h)")


def hcas(root: Path) -> tuple[Hca, ...]:
    """Every port of every RDMA device."""
    ports = sorted((root / "sys/class/infiniband").glob("*/ports/*"))
    return tuple(
        Hca(
            device=port.parent.parent.name,
            port=port.name,
            state=_read(port / "state").rpartition(" ")[2],  # "4: ACTIVE"
            link=_read(port / "link_layer"),
        )
        for port in ports
    )


def peer_memory(root: Path) -> str | None:
    """The loaded kernel module that lets network cards read GPU memory, or None."""
    loaded = {line.split(" ", 1)[0] for line in _read(root / "proc/modules").splitlines()}
    return next((name for name in PEER_MEMORY if name in loaded), None)


def memlock_bytes(root: Path) -> int | None:
    """What may be locked for a network card (not by CUDA, which has no such limit), or None."""
    for line in _read(root / "proc/self/status").splitlines():
        if line.startswith("CapEff:") and int(line.split()[1], 16) >> CAP_IPC_LOCK & 1:
            return None
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return None if soft == resource.RLIM_INFINITY else soft


def in_container(root: Path) -> bool:
    """A hint: its own pid namespace, or a mark that Docker or Podman leave."""
    namespace = root / "proc/self/ns/pid"
    own = namespace.is_symlink() and str(namespace.readlink()) != INITIAL_PID_NAMESPACE
    return own or any((root / mark).exists() for mark in CONTAINER_MARKS)


def _read(path: Path) -> str:
    """A file of the kernel's without its last line break; "" where there is none."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
