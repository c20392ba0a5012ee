"""The ladder of ways between GPUs: a truth table of made-up machines, and this machine itself."""

from __future__ import annotations

import ctypes
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from specforge_ext.runs import info
from specforge_ext.store import direct_facts
from specforge_ext.store.direct import best, rungs
from specforge_ext.store.direct_facts import Facts, Gpu, Hca, cuda_gpus, probe

GPU = Gpu(
    index=0,
    name="GPU",
    compute_mode=0,
    vmm=True,
    vmm_fd=True,
    vmm_rdma=True,
    read_only_register=True,
    rdma=True,
    dma_buf=True,
    rdma_ordered=True,
    rdma_flush=True,
    ipc_event=True,
    peers=(1,),
)
CARD = Hca("mlx5_0", "1", "ACTIVE", "InfiniBand")
EVERYTHING = Facts(
    no_gpu=None,
    gpus=(GPU, replace(GPU, index=1, peers=(0,))),
    no_torch=None,
    no_kernels=None,
    hcas=(CARD,),
    peer_memory="nvidia_peermem",
    memlock_bytes=None,
    no_mooncake=None,
    mooncake_cuda=True,
    container=False,
)
NAMES = [
    "gpu_rdma",
    "gpu_vmm",
    "gpu_ipc",
    "host_rdma",
    "shm_page_locked",
    "shm",
    "gpu_tcp",
    "tcp",
]
OF_GPUS = ("gpu_rdma", "gpu_vmm", "gpu_ipc", "shm_page_locked", "gpu_tcp")
IN_ARENAS = ("gpu_rdma", "gpu_vmm", "gpu_tcp")
NEVER = {
    "gpu_ipc": ["not used: memory behind a cudaIpcMemHandle ends with its producer, that of "],
}
"""Rungs that no machine has yet: the issue names them, no store takes them."""


def with_gpus(**changes: object) -> Facts:
    return replace(EVERYTHING, gpus=tuple(replace(gpu, **changes) for gpu in EVERYTHING.gpus))


NO_GPU = replace(EVERYTHING, no_gpu="no CUDA driver: libcuda.so.1", gpus=(), no_torch="no CUDA")
ALONE = replace(EVERYTHING, gpus=(replace(GPU, peers=()),))

NO_FD = "no GPU's memory can be shared as a file descriptor (attributes 102, 103)"

# Facts, and what they add to the reasons: rung -> the beginnings of the reasons, in order.
TABLE: dict[str, tuple[Facts, dict[str, list[str]]]] = {
    "everything": (EVERYTHING, {}),
    "no GPU": (
        NO_GPU,
        {name: ["no CUDA driver: libcuda.so.1", "no CUDA"] for name in OF_GPUS},
    ),
    "torch without CUDA": (
        replace(EVERYTHING, no_torch="torch 2.13 is a build without CUDA"),
        {name: ["torch 2.13 is a build without CUDA"] for name in OF_GPUS},
    ),
    "no kernels": (
        replace(EVERYTHING, no_kernels="built without CUDA kernels"),
        {name: ["built without CUDA kernels"] for name in IN_ARENAS},
    ),
    "no network card": (
        replace(EVERYTHING, hcas=()),
        {name: ["no RDMA device in /sys/class/infiniband"] for name in ("gpu_rdma", "host_rdma")},
    ),
    "a card whose port is down": (
        replace(EVERYTHING, hcas=(replace(CARD, state="DOWN"),)),
        {
            name: ["no RDMA port is active: mlx5_0 port 1 (InfiniBand, DOWN)"]
            for name in ("gpu_rdma", "host_rdma")
        },
    ),
    "two ports, one down": (replace(EVERYTHING, hcas=(replace(CARD, state="DOWN"), CARD)), {}),
    "no Mooncake": (
        replace(EVERYTHING, no_mooncake="No module named 'mooncake'"),
        {
            name: ["Mooncake: No module named 'mooncake'"]
            for name in ("gpu_rdma", "host_rdma", "gpu_tcp", "tcp")
        },
    ),
    "Mooncake without CUDA": (
        replace(EVERYTHING, mooncake_cuda=False),
        {name: ["this build of Mooncake has no CUDA"] for name in ("gpu_rdma", "gpu_tcp")},
    ),
    "a dma_buf needs no module": (replace(EVERYTHING, peer_memory=None), {}),
    "the module needs no dma_buf": (with_gpus(dma_buf=False), {}),
    "neither module nor dma_buf": (
        replace(with_gpus(dma_buf=False), peer_memory=None),
        {"gpu_rdma": ["no GPU offers a dma_buf (attribute 124), and nvidia_peermem is not loaded"]},
    ),
    "a GPU that lets no card in": (
        with_gpus(dma_buf=False, rdma=False),
        {"gpu_rdma": ["no GPU lets a network card in (attributes 124 and 116 are 0)"]},
    ),
    "cards reach no memory of cuMemCreate": (
        with_gpus(vmm_rdma=False),
        {"gpu_rdma": ["no network card reaches memory of cuMemCreate (attribute 110)"]},
    ),
    "what cards write is in order": (with_gpus(rdma_flush=False), {}),
    "what cards write can be flushed": (with_gpus(rdma_ordered=False), {}),
    "what cards write may never be seen": (
        with_gpus(rdma_ordered=False, rdma_flush=False),
        {"gpu_rdma": ["kernels may not see what a network card has written (attributes 117 and"]},
    ),
    "no VMM": (with_gpus(vmm=False), {name: [NO_FD] for name in IN_ARENAS}),
    "no file descriptors": (with_gpus(vmm_fd=False), {name: [NO_FD] for name in IN_ARENAS}),
    "no read-only registration": (
        with_gpus(read_only_register=False),
        {"shm_page_locked": ["no GPU registers memory that is mapped read-only (attribute 113)"]},
    ),
    "the only GPU takes one process": (
        replace(ALONE, gpus=(replace(GPU, compute_mode=3),)),
        {
            name: ["compute mode EXCLUSIVE_PROCESS: the only GPU takes one process"]
            for name in ("gpu_vmm", "gpu_ipc")
        },
    ),
    "two GPUs of one process each": (with_gpus(compute_mode=3), {}),
    "prohibited": (
        with_gpus(compute_mode=2),
        {
            name: ["compute mode PROHIBITED: no process may use a GPU"]
            for name in ("gpu_vmm", "gpu_ipc")
        },
    ),
    "a small memlock limit": (
        replace(EVERYTHING, memlock_bytes=8 << 20),
        {"host_rdma": ["RLIMIT_MEMLOCK is 8388608 bytes, wanted 268435456: ulimit -l unlimited"]},
    ),
    "memlock limit just enough": (replace(EVERYTHING, memlock_bytes=256 << 20), {}),
}


@pytest.mark.parametrize("case", TABLE)
def test_reasons(case: str) -> None:
    facts, reasons = TABLE[case]
    ladder = rungs(facts)
    assert [rung.name for rung in ladder] == NAMES
    for rung in ladder:
        wanted = [*reasons.get(rung.name, []), *NEVER.get(rung.name, [])]
        assert len(rung.why_not) == len(wanted), (rung, wanted)
        assert all(map(str.startswith, rung.why_not, wanted)), (rung, wanted)
        assert rung.available == (not wanted)
        assert bool(rung.ask) or rung.name in NEVER


@pytest.mark.parametrize(
    ("facts", "name"),
    [
        (EVERYTHING, "gpu_rdma"),
        (replace(EVERYTHING, hcas=()), "gpu_vmm"),
        (replace(EVERYTHING, mooncake_cuda=False), "gpu_vmm"),
        (with_gpus(vmm=False), "host_rdma"),
        (replace(with_gpus(vmm=False), hcas=()), "shm_page_locked"),
        (replace(NO_GPU, hcas=()), "shm"),
        (replace(NO_GPU, hcas=(), no_mooncake="not installed"), "shm"),
    ],
)
def test_best(facts: Facts, name: str) -> None:
    assert best(rungs(facts)).name == name


def test_notes_say_what_else_has_to_hold() -> None:
    def note(facts: Facts) -> str:
        return {rung.name: rung for rung in rungs(facts)}["gpu_vmm"].note

    assert note(EVERYTHING) == ""
    assert note(ALONE) == ""
    assert note(with_gpus(peers=())) == "both sides on one GPU: no peer access between 0-1"
    assert "store.socket_path on a volume" in note(replace(EVERYTHING, container=True))


def test_descriptions() -> None:
    told = {rung.name: rung.describe() for rung in rungs(replace(NO_GPU, container=True))}
    assert told["shm"] == "available: store.kind=shm"
    assert told["gpu_vmm"] == "not available: no CUDA driver: libcuda.so.1; no CUDA"
    told = {rung.name: rung.describe() for rung in rungs(replace(EVERYTHING, container=True))}
    assert told["gpu_vmm"].startswith("available: store.kind=cuda_ipc (in a container:")


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """The root of a machine with two RDMA ports and the kernel module."""
    for port, (state, link) in {"1": ("4: ACTIVE", "InfiniBand"), "2": ("1: DOWN", "")}.items():
        folder = tmp_path / "sys/class/infiniband/mlx5_0/ports" / port
        folder.mkdir(parents=True)
        (folder / "state").write_text(f"{state}\n")
        (folder / "link_layer").write_text(f"{link}\n")
    (tmp_path / "proc/self/ns").mkdir(parents=True)
    (tmp_path / "proc/modules").write_text("nvidia_peermem 16384 0 - Live 0x0\nnvidia 1 2 -\n")
    (tmp_path / "proc/self/status").write_text("Name:\tx\nCapEff:\t0000000000000000\n")
    (tmp_path / "proc/self/ns/pid").symlink_to(direct_facts.INITIAL_PID_NAMESPACE)
    return tmp_path


def test_files_of_a_machine(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct_facts.resource, "getrlimit", lambda _: (65536, 1 << 40))
    facts = probe(machine)
    assert facts.hcas == (CARD, Hca("mlx5_0", "2", "DOWN", ""))
    assert facts.peer_memory == "nvidia_peermem"
    assert facts.memlock_bytes == 65536
    assert not facts.container


def test_what_lifts_the_memlock_limit(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = [65536]
    monkeypatch.setattr(direct_facts.resource, "getrlimit", lambda _: (limit[0], -1))
    (machine / "proc/self/status").write_text("CapEff:\t0000000000004000\n")
    assert direct_facts.memlock_bytes(machine) is None
    (machine / "proc/self/status").write_text("CapEff:\t000001ffffffbfff\n")
    assert direct_facts.memlock_bytes(machine) == 65536
    limit[0] = direct_facts.resource.RLIM_INFINITY
    assert direct_facts.memlock_bytes(machine) is None


@pytest.mark.parametrize("hint", ["namespace", ".dockerenv", "run/.containerenv"])
def test_container_hints(machine: Path, hint: str) -> None:
    if hint == "namespace":
        (machine / "proc/self/ns/pid").unlink()
        (machine / "proc/self/ns/pid").symlink_to("pid:[4026532201]")
    else:
        (machine / hint).parent.mkdir(exist_ok=True)
        (machine / hint).touch()
    assert probe(machine).container


def test_a_machine_without_any_of_it(tmp_path: Path) -> None:
    facts = probe(tmp_path)
    assert (facts.hcas, facts.peer_memory, facts.container) == ((), None, False)


def test_no_driver_says_so() -> None:
    gpus, reason = cuda_gpus("libcuda_that_is_not_there.so.1")
    assert gpus == ()
    assert reason is not None
    assert reason.startswith("no CUDA driver: libcuda_that_is_not_there.so.1: cannot open")


def test_this_machine() -> None:
    """Whatever it is: facts and ladder agree, and shm is always there."""
    facts = probe()
    ladder = {rung.name: rung for rung in rungs(facts)}
    assert ladder["shm"].available
    assert bool(facts.gpus) == (facts.no_gpu is None)
    has_driver = _loads(direct_facts.DRIVER)
    assert has_driver or facts.no_gpu is not None
    if not facts.gpus:
        reasons = ladder["gpu_vmm"].why_not
        assert facts.no_gpu in reasons
    assert (
        bool(facts.hcas) or "no RDMA device in /sys/class/infiniband" in ladder["host_rdma"].why_not
    )
    if shutil.which("nvidia-smi") is None and not has_driver:
        assert best(rungs(facts)).name in ("host_rdma", "shm")


def _loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def test_info_names_the_rung_and_why_not_the_higher_ones() -> None:
    lines = [line for line in info.describe().splitlines() if line.startswith("rung ")]
    assert [line.split()[1] for line in lines] == NAMES
    chosen = [i for i, line in enumerate(lines) if line.endswith("<- the best here")]
    assert len(chosen) == 1
    assert all(" not available: " in line for line in lines[: chosen[0]])
