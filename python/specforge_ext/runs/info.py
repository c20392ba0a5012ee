"""What this installation can do, each thing with the reason when it can not."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
from collections.abc import Iterator

import torch

from specforge_ext import _C, __version__
from specforge_ext.engines import ENGINES
from specforge_ext.methods import METHODS
from specforge_ext.store import STORES
from specforge_ext.store.direct import best, rungs
from specforge_ext.store.direct_facts import probe


def describe() -> str:
    """Several lines for a person: `name  what it is, or why it is not available`."""
    rows = [*_build(), *_devices(), *_kernels(), *_components(), *_transfer()]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {text}" for name, text in rows)


def _build() -> Iterator[tuple[str, str]]:
    yield "specforge_ext", f"{__version__}, commit {_C.__commit__}"
    yield "python", f"{platform.python_version()} on {platform.machine()}"
    for name in ("torch", "transformers", "safetensors"):
        yield name, importlib.metadata.version(name)


def _devices() -> Iterator[tuple[str, str]]:
    yield "cpu", f"{os.cpu_count()} cores, torch {torch.backends.cpu.get_cpu_capability()}"
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(index)
            yield f"cuda:{index}", f"{torch.cuda.get_device_name(index)}, sm_{major}{minor}"
    elif torch.version.cuda is None:
        yield "cuda", f"not available: torch {torch.__version__} is a build without CUDA"
    else:
        yield "cuda", "not available: torch sees no device or no driver"


def _kernels() -> Iterator[tuple[str, str]]:
    yield "kernels cpu", f"{_C.isa()} (OpenMP, shares torch's threads)"
    if _C.cuda_compiled:
        yield "kernels cuda", "sm_80, sm_90a, sm_100 and later by PTX"
    else:
        yield "kernels cuda", "not available: built without nvcc (SPECFORGE_EXT_CUDA=ON wants it)"


def _components() -> Iterator[tuple[str, str]]:
    for name in METHODS:
        yield f"method {name}", "available"
    for name in ENGINES:
        yield f"engine {name}", "available"
    for name in ("vllm", "sglang"):
        yield f"engine {name}", "not available: not part of this version"
    for name in STORES:
        reason = STORES.get(name).unavailable()
        yield f"store {name}", f"not available: {reason}" if reason else "available"


def _transfer() -> Iterator[tuple[str, str]]:
    """The ladder of `store.direct`, the best rung first."""
    facts = probe()
    rdma = ", ".join(map(str, facts.hcas))
    yield "rdma", rdma or "not available: no device in /sys/class/infiniband"
    ladder = rungs(facts)
    highest = best(ladder)
    for rung in ladder:
        mark = " <- the best here" if rung is highest else ""
        yield f"rung {rung.name}", f"{rung.describe()}{mark}"
