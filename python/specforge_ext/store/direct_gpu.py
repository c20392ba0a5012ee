"""The GPU whose memory a network engine reads and fills: whether there is one, and when what was
written there can be seen. The rungs gpu_rdma and gpu_tcp of `direct`."""

from __future__ import annotations

import ctypes
import logging
from dataclasses import replace
from typing import Any

import torch

from specforge_ext.config import Switch
from specforge_ext.store import device_memory, mooncake
from specforge_ext.store.base import StoreError
from specforge_ext.store.direct import rungs
from specforge_ext.store.direct_facts import DRIVER, Facts, Gpu, probe

log = logging.getLogger(__name__)

CURRENT_CONTEXT, TO_OWNER = 0, 100
"""CUflushGPUDirectRDMAWritesTarget, CUflushGPUDirectRDMAWritesScope (cuda.h)."""

cuda: Any = torch.cuda
"""Parts of it have no types."""


def gpu_for(
    mode: Switch, protocol: mooncake.Protocol, ordinal: int | None, *, what: str
) -> Gpu | None:
    """The GPU of that ordinal (None: torch's current one) if samples are to lie in its memory; None
    if on the host, of which `auto` says in the log why. StoreError where it has to be the GPU."""
    if mode == "off":
        return None
    rung = f"gpu_{protocol}"
    if mode == "auto" and not cuda.is_initialized():
        # A trainer on the CPU has no use for batches on a GPU, nor a context there.
        log.info("%s: samples lie on the host, for this process does not use CUDA", what)
        return None
    facts = probe_gpu(ordinal)
    if reason := why_not(rung, facts):
        if mode == "on":
            raise StoreError(f"{what}: store.direct: wanted on, but no {rung}: {reason}")
        log.info("%s: samples lie on the host, no %s: %s", what, rung, reason)
        return None
    [gpu] = facts.gpus
    if protocol == "rdma":
        mooncake.register_gpu_memory(by_peer_memory=gpu.rdma and facts.peer_memory is not None)
    device_memory.use_device(gpu.index)
    log.info("%s: rung %s: samples lie in the memory of cuda:%d, %s", what, rung, *_names(gpu))
    return gpu


def probe_gpu(ordinal: int | None) -> Facts:
    """The facts of this machine, with that GPU alone, or with none."""
    facts = probe()
    if facts.no_gpu or facts.no_torch:
        return facts
    index = cuda.current_device() if ordinal is None else ordinal
    gpus = tuple(gpu for gpu in facts.gpus if gpu.index == index)
    no_gpu = None if gpus else f"store.gpu: wanted {index}, there are {len(facts.gpus)}"
    return replace(facts, gpus=gpus, no_gpu=no_gpu)


def why_not(rung: str, facts: Facts) -> str:
    """Everything that is missing; "" if nothing is."""
    [found] = [it for it in rungs(facts) if it.name == rung]
    return "; ".join(found.why_not)


def arrived(gpu: Gpu, protocol: mooncake.Protocol) -> None:
    """Work that is queued from now on sees what a transfer that is over wrote into the GPU.

    That it is over says only that the bytes are on their way to the GPU. By TCP they come by a copy
    on the default stream, which the host may have left behind. By RDMA they come over the bus, in
    an order that not every GPU keeps by itself.
    """
    with cuda.device(gpu.index):
        if protocol == "tcp":
            cuda.default_stream().synchronize()
        elif not gpu.rdma_ordered:
            cuda.current_stream().query()  # so that the context is this thread's
            flush_remote_writes()


def flush_remote_writes() -> None:
    """Those of network cards, to the GPU of the current context. StoreError."""
    code = ctypes.CDLL(DRIVER).cuFlushGPUDirectRDMAWrites(CURRENT_CONTEXT, TO_OWNER)
    if code != 0:
        raise StoreError(f"cuFlushGPUDirectRDMAWrites answered error {code} (CUresult, cuda.h)")


def _names(gpu: Gpu) -> tuple[int, str]:
    return gpu.index, gpu.name
