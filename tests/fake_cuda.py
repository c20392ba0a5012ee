"""A CUDA driver made of memfds (tests/native/fake_cuda.cpp), for what a GPU is not needed for: who
maps what, in which process, for how long."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from native_program import FLAGS, ROOT, compile_all, digest_of
from specforge_ext.store import cuda_ipc, device_memory, direct_gpu
from specforge_ext.store.direct_facts import DRIVER, Facts, Hca, cuda_gpus

SOURCE = ROOT / "tests/native/fake_cuda.cpp"
WANTED = "SPECFORGE_EXT_TEST_FAKE_CUDA"
"""Set in the environment of processes that are to have the fake driver too."""

K_DL_CPU = 1


def library() -> Path:
    """The driver under its real name, in a folder of its own; built if it is not there yet."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ to compile the fake CUDA driver with")
    command = [compiler, *FLAGS, "-fPIC", "-shared", f"-Wl,-soname,{DRIVER}", f"-I{ROOT / 'csrc'}"]
    sources = [SOURCE, ROOT / "csrc/transport/cuda_driver.h"]
    folder = ROOT / "build/fake_cuda" / digest_of(command, sources)
    target = folder / DRIVER
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        fresh = folder / f"{DRIVER}.{os.getpid()}"
        compile_all([*command, str(SOURCE), "-o", str(fresh)], folder)
        fresh.rename(target)
    return target


def real_driver() -> bool:
    """Whether this machine has one; False as well once the fake one was loaded."""
    if "fake" in _loaded:
        return False
    try:
        ctypes.CDLL(DRIVER)
    except OSError:
        return False
    return True


_loaded: dict[str, ctypes.CDLL] = {}


def load() -> ctypes.CDLL:
    """The arena finds it from now on, by its name: a library of that name is loaded."""
    if "fake" not in _loaded:
        _loaded["fake"] = ctypes.CDLL(str(library()), mode=ctypes.RTLD_GLOBAL)
    return _loaded["fake"]


class TorchCuda:
    """As torch.cuda; its streams have nothing to wait for. calls: what was asked of them."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def is_initialized(self) -> bool:
        return True

    def device(self, index: int) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def default_stream(self) -> TorchCuda:
        return self

    current_stream = default_stream

    def synchronize(self) -> None:
        self.calls.append("synchronize")

    def query(self) -> bool:
        self.calls.append("query")
        return True


def with_everything(ordinal: int | None) -> Facts:
    """As `direct_gpu.probe_gpu`, of a machine that has all that a rung wants, and this driver."""
    gpus, no_gpu = cuda_gpus(str(library()))
    return Facts(
        no_gpu=no_gpu,
        gpus=gpus[ordinal or 0 :][:1],
        no_torch=None,
        no_kernels=None,
        hcas=(Hca("mlx5_0", "1", "ACTIVE", "InfiniBand"),),
        peer_memory="nvidia_peermem",
        memlock_bytes=None,
        no_mooncake=None,
        mooncake_cuda=True,
        container=False,
    )


def install(set_attribute: Callable[[object, str, object], None]) -> ctypes.CDLL:
    """Let cuda_ipc use it: its memory is the CPU's to torch. set_attribute: setattr, or one that is
    undone."""
    set_attribute(cuda_ipc, "unavailable", lambda: None)
    set_attribute(device_memory, "use_device", lambda ordinal: ordinal or 0)
    set_attribute(device_memory, "DLPACK_DEVICE", K_DL_CPU)
    set_attribute(direct_gpu, "probe_gpu", with_everything)
    set_attribute(direct_gpu, "cuda", TorchCuda())
    return load()


if os.environ.get(WANTED) == "1":  # a process that a test has started
    install(setattr)
