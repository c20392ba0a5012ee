"""A CUDA driver made of memfds (tests/native/fake_cuda.cpp), for what a GPU is not needed for: who
maps what, in which process, for how long."""

from __future__ import annotations

import ctypes
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from native_program import FLAGS, ROOT, compile_all, digest_of
from specforge_ext.store import cuda_ipc
from specforge_ext.store.direct_facts import DRIVER

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


def install(set_attribute: Callable[[object, str, object], None]) -> ctypes.CDLL:
    """Let cuda_ipc use it: its memory is the CPU's to torch. set_attribute: setattr, or one that is
    undone."""
    set_attribute(cuda_ipc, "unavailable", lambda: None)
    set_attribute(cuda_ipc, "use_device", lambda ordinal: ordinal or 0)
    set_attribute(cuda_ipc, "DLPACK_DEVICE", K_DL_CPU)
    return load()


if os.environ.get(WANTED) == "1":  # a process that a test has started
    install(setattr)
