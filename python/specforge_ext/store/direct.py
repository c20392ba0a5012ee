"""The ladder of ways between GPUs: which rungs this machine has, and why not the others.

Judging is a pure function of `Facts`, so that machines that nobody here has can be asked about.
"""

from __future__ import annotations

from dataclasses import dataclass

from specforge_ext.store.direct_facts import Facts, Gpu

PROHIBITED, ONE_PROCESS = 2, 3
"""Compute modes of a GPU (CUcomputemode)."""


@dataclass(frozen=True)
class Rung:
    """One way for samples to travel.

    ask: the settings that choose it. why_not: everything that is missing; empty: available.
    note: what holds of it here.
    """

    name: str
    ask: str
    why_not: tuple[str, ...] = ()
    note: str = ""

    @property
    def available(self) -> bool:
        return not self.why_not

    def describe(self) -> str:
        """For a person: "not available: ..." or "available: ..."."""
        if self.why_not:
            return f"not available: {'; '.join(self.why_not)}"
        return f"available: {self.ask}{f' ({self.note})' if self.note else ''}"


def rungs(facts: Facts, *, locked_bytes: int = 256 << 20) -> list[Rung]:
    """The whole ladder, the best first; the lowest always holds.

    locked_bytes: what a network card would have to lock, a store's `capacity_bytes`.
    """
    return [
        _gpu_rdma(facts),
        _gpu_vmm(facts),
        _gpu_ipc(facts),
        _host_rdma(facts, locked_bytes),
        _shm_page_locked(facts),
        Rung("shm", "store.kind=shm"),
        _gpu_tcp(facts),
        Rung("tcp", "store.kind=mooncake_p2p store.protocol=tcp", _mooncake(facts)),
    ]


def best(ladder: list[Rung]) -> Rung:
    """The highest rung that is available: shm at worst."""
    return next(rung for rung in ladder if rung.available)


def _gpu_rdma(facts: Facts) -> Rung:
    missing = [*_gpu_arena(facts), *_network(facts), *_mooncake_with_cuda(facts)]
    reachable = [gpu for gpu in facts.gpus if gpu.dma_buf or (gpu.rdma and facts.peer_memory)]
    if facts.gpus and not reachable:
        missing.append(_unreachable(facts))
    elif facts.gpus and not any(gpu.vmm_rdma for gpu in reachable):
        missing.append("no network card reaches memory of cuMemCreate (attribute 110)")
    elif facts.gpus and not any(gpu.rdma_ordered or gpu.rdma_flush for gpu in reachable):
        missing.append(
            "kernels may not see what a network card has written (attributes 117 and 118)"
        )
    ask = "store.kind=mooncake_p2p store.protocol=rdma store.direct=on"
    return Rung("gpu_rdma", ask, tuple(missing))


def _gpu_tcp(facts: Facts) -> Rung:
    missing = [*_gpu_arena(facts), *_mooncake_with_cuda(facts)]
    ask = "store.kind=mooncake_p2p store.protocol=tcp store.direct=on"
    return Rung("gpu_tcp", ask, tuple(missing), "by way of the host, at either end")


def _gpu_arena(facts: Facts) -> list[str]:
    """What keeps samples from lying in the memory of a GPU."""
    missing = _gpu(facts)
    if facts.no_kernels:
        missing.append(facts.no_kernels)
    if facts.gpus and not any(gpu.vmm and gpu.vmm_fd for gpu in facts.gpus):
        missing.append("no GPU's memory can be shared as a file descriptor (attributes 102, 103)")
    return missing


def _mooncake_with_cuda(facts: Facts) -> list[str]:
    if not facts.no_mooncake and not facts.mooncake_cuda:
        return ["this build of Mooncake has no CUDA and cannot register GPU memory"]
    return list(_mooncake(facts))


def _unreachable(facts: Facts) -> str:
    if any(gpu.rdma for gpu in facts.gpus):
        return "no GPU offers a dma_buf (attribute 124), and nvidia_peermem is not loaded"
    return "no GPU lets a network card in (attributes 124 and 116 are 0)"


def _gpu_vmm(facts: Facts) -> Rung:
    missing = [*_gpu_arena(facts), *_two_processes(facts)]
    shared = [gpu for gpu in facts.gpus if gpu.vmm and gpu.vmm_fd]
    return Rung("gpu_vmm", "store.kind=cuda_ipc", tuple(missing), _vmm_note(facts, shared))


def _vmm_note(facts: Facts, shared: list[Gpu]) -> str:
    notes = []
    apart = [f"{a.index}-{b.index}" for a in shared for b in shared if _apart(a, b)]
    if apart:
        notes.append(f"both sides on one GPU: no peer access between {', '.join(apart)}")
    if facts.container:
        notes.append("in a container: store.socket_path on a volume that both sides see")
    return "; ".join(notes)


def _apart(a: Gpu, b: Gpu) -> bool:
    return a.index < b.index and not (b.index in a.peers and a.index in b.peers)


def _gpu_ipc(facts: Facts) -> Rung:
    missing = [*_gpu(facts), *_two_processes(facts)]
    missing.append(
        "not used: memory behind a cudaIpcMemHandle ends with its producer, that of gpu_vmm does "
        "not"
    )
    return Rung("gpu_ipc", "", tuple(missing))


def _host_rdma(facts: Facts, locked_bytes: int) -> Rung:
    missing = [*_network(facts), *_mooncake(facts)]
    limit = facts.memlock_bytes
    if facts.hcas and limit is not None and limit < locked_bytes:
        missing.append(
            f"RLIMIT_MEMLOCK is {limit} bytes, wanted {locked_bytes}: ulimit -l unlimited, or "
            "CAP_IPC_LOCK"
        )
    note = "page-locked for the card, not for CUDA: the copy to the GPU goes through the batch"
    ask = "store.kind=mooncake_p2p store.protocol=rdma"
    return Rung("host_rdma", ask, tuple(missing), "" if _gpu(facts) else note)


def _shm_page_locked(facts: Facts) -> Rung:
    missing = _gpu(facts)
    # Readers map the payload read-only, which is what keeps them from writing into it.
    if facts.gpus and not any(gpu.read_only_register for gpu in facts.gpus):
        missing.append("no GPU registers memory that is mapped read-only (attribute 113)")
    return Rung("shm_page_locked", "store.kind=shm store.page_lock=on", tuple(missing))


def _gpu(facts: Facts) -> list[str]:
    return [reason for reason in (facts.no_gpu, facts.no_torch) if reason]


def _two_processes(facts: Facts) -> list[str]:
    modes = {gpu.compute_mode for gpu in facts.gpus}
    if facts.gpus and modes == {PROHIBITED}:
        return ["compute mode PROHIBITED: no process may use a GPU"]
    if len(facts.gpus) == 1 and modes == {ONE_PROCESS}:
        return ["compute mode EXCLUSIVE_PROCESS: the only GPU takes one process"]
    return []


def _network(facts: Facts) -> list[str]:
    if not facts.hcas:
        return ["no RDMA device in /sys/class/infiniband"]
    if any(hca.state == "ACTIVE" for hca in facts.hcas):
        return []
    return [f"no RDMA port is active: {', '.join(map(str, facts.hcas))}"]


def _mooncake(facts: Facts) -> tuple[str, ...]:
    return (f"Mooncake: {facts.no_mooncake}",) if facts.no_mooncake else ()
