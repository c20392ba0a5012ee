"""store.page_lock without a GPU: what is asked of the CUDA runtime, when, and what it answers."""

from __future__ import annotations

import gc
import logging
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from specforge_ext import _C
from specforge_ext.records import SampleRef
from specforge_ext.store import page_lock
from specforge_ext.store.base import StoreError
from specforge_ext.store.shm import ShmConfig, ShmReader, ShmStore, ShmWriter, split_address
from store_cases import LAYOUT_HASH, TIMEOUT_S, make_sample, same_sample
from store_kinds import started
from test_direct import GPU

CAPACITY = 1 << 19


class Runtime:
    """What page_lock uses of torch.cuda.cudart()."""

    def __init__(self, error: int = 0) -> None:
        self.error = error
        self.calls: list[tuple[Any, ...]] = []

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:  # noqa: N802
        self.calls.append(("register", address, nbytes, flags))
        return self.error

    def cudaHostUnregister(self, address: int) -> int:  # noqa: N802
        self.calls.append(("unregister", address))
        return self.error

    def cudaGetErrorString(self, error: int) -> str:  # noqa: N802
        return f"error {error}"

    def synchronize(self) -> None:
        self.calls.append(("synchronize",))


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Runtime:
    """A machine with one GPU, as far as page_lock can see."""
    runtime = Runtime()
    monkeypatch.setattr(page_lock, "no_torch_cuda", lambda: None)
    monkeypatch.setattr(page_lock, "cuda_gpus", lambda: ((GPU,), None))
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(torch.cuda, "synchronize", runtime.synchronize)
    return runtime


@pytest.fixture
def no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_lock, "no_torch_cuda", lambda: "torch sees no CUDA device")


@pytest.fixture
def arena() -> Iterator[tuple[ShmWriter, SampleRef]]:
    writer = ShmStore.writer(ShmConfig(capacity_bytes=CAPACITY))
    ref = writer.put(make_sample(1), layout_hash=LAYOUT_HASH, timeout_s=TIMEOUT_S)
    yield writer, ref
    writer.close()


def with_mode(address: str, mode: str) -> str:
    return f"{address}#page_lock={mode}"


def read_all(reader: ShmReader, ref: SampleRef) -> None:
    with reader.open(ref, layout_hash=LAYOUT_HASH, verify=True) as lease:
        assert same_sample(lease.sample, make_sample(1))


def test_auto_without_cuda(
    no_cuda: None, arena: tuple[ShmWriter, SampleRef], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG):
        reader = ShmStore.reader(arena[0].address())
    assert not reader.page_locked
    assert "not page-locked: torch sees no CUDA device" in caplog.text
    assert not [r for r in caplog.records if r.levelno > logging.DEBUG]
    read_all(reader, arena[1])


def test_on_without_cuda(no_cuda: None, arena: tuple[ShmWriter, SampleRef]) -> None:
    with pytest.raises(
        StoreError,
        match=r"shm:\w+: store.page_lock: wanted on, but torch sees no CUDA device",
    ):
        ShmStore.reader(with_mode(arena[0].address(), "on"))
    assert arena[0].health().num_readers == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here: test_gpu_transfer covers it")
def test_on_without_a_gpu_of_this_machine(arena: tuple[ShmWriter, SampleRef]) -> None:
    with pytest.raises(StoreError, match=r"wanted on, but torch (.* without CUDA|sees no CUDA)"):
        ShmStore.reader(with_mode(arena[0].address(), "on"))


def test_auto_in_a_process_that_does_not_use_cuda(
    runtime: Runtime,
    arena: tuple[ShmWriter, SampleRef],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    with caplog.at_level(logging.DEBUG):
        assert not ShmStore.reader(arena[0].address()).page_locked
    assert "this process does not use CUDA" in caplog.text
    assert runtime.calls == []
    assert ShmStore.reader(with_mode(arena[0].address(), "on")).page_locked


def test_off_asks_nobody(runtime: Runtime, arena: tuple[ShmWriter, SampleRef]) -> None:
    assert not ShmStore.reader(with_mode(arena[0].address(), "off")).page_locked
    assert runtime.calls == []


def test_the_payload_and_only_that_is_registered_read_only(
    runtime: Runtime, arena: tuple[ShmWriter, SampleRef]
) -> None:
    reader = ShmStore.reader(arena[0].address())
    assert reader.page_locked
    [(call, address, nbytes, flags)] = runtime.calls
    assert (call, nbytes, flags) == ("register", CAPACITY, 0x01 | 0x08)
    with reader.open(arena[1], layout_hash=LAYOUT_HASH, verify=False) as lease:
        for tensor in (lease.sample.prompt.input_ids, *lease.sample.features.values()):
            assert tensor.numel() == 0 or address <= tensor.data_ptr() < address + nbytes


@pytest.mark.parametrize("held", ["nothing", "lease", "view"])
def test_registration_outlives_every_view(
    runtime: Runtime, arena: tuple[ShmWriter, SampleRef], held: str
) -> None:
    reader = ShmStore.reader(arena[0].address())
    address = runtime.calls[0][1]
    kept: Any = None
    if held != "nothing":
        kept = reader.open(arena[1], layout_hash=LAYOUT_HASH, verify=False)
    if held == "view":
        kept = kept.sample.features["float32"][1:2]
    reader.close()
    del reader
    gc.collect()
    if held != "nothing":
        assert len(runtime.calls) == 1
        del kept
        gc.collect()
    assert runtime.calls[1:] == [("synchronize",), ("unregister", address)]


def test_at_the_end_of_the_process_nobody_is_asked(
    runtime: Runtime, arena: tuple[ShmWriter, SampleRef], monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = ShmStore.reader(arena[0].address())
    monkeypatch.setattr(sys, "is_finalizing", lambda: True)
    del reader
    gc.collect()
    assert len(runtime.calls) == 1


def test_refusals_of_the_runtime(
    runtime: Runtime, arena: tuple[ShmWriter, SampleRef], caplog: pytest.LogCaptureFixture
) -> None:
    runtime.error = 801
    with caplog.at_level(logging.INFO):
        reader = ShmStore.reader(arena[0].address())
    assert not reader.page_locked
    assert f"not page-locked: cudaHostRegister of {CAPACITY} bytes: error 801" in caplog.text
    with pytest.raises(StoreError, match=r"wanted on, but cudaHostRegister of \d+ .* 801"):
        ShmStore.reader(with_mode(arena[0].address(), "on"))


def test_a_refusal_to_unregister_is_said(
    runtime: Runtime, arena: tuple[ShmWriter, SampleRef], caplog: pytest.LogCaptureFixture
) -> None:
    reader = ShmStore.reader(arena[0].address())
    runtime.error = 713
    with caplog.at_level(logging.WARNING):
        del reader
        gc.collect()
    assert "cudaHostUnregister: error 713" in caplog.text


def test_a_gpu_that_registers_nothing_read_only(
    runtime: Runtime, arena: tuple[ShmWriter, SampleRef], monkeypatch: pytest.MonkeyPatch
) -> None:
    old = replace(GPU, name="Old", read_only_register=False)
    monkeypatch.setattr(page_lock, "cuda_gpus", lambda: ((old,), None))
    with pytest.raises(StoreError, match=r"Old registers no memory .* read-only \(attribute 113\)"):
        ShmStore.reader(with_mode(arena[0].address(), "on"))


def test_no_driver_but_torch_with_cuda(
    runtime: Runtime, arena: tuple[ShmWriter, SampleRef], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page_lock, "cuda_gpus", lambda: ((), "no CUDA driver: gone"))
    with pytest.raises(StoreError, match="wanted on, but no CUDA driver: gone"):
        ShmStore.reader(with_mode(arena[0].address(), "on"))


@pytest.mark.parametrize("mode", ["auto", "on", "off"])
def test_the_mode_travels_in_the_address(mode: Any) -> None:
    writer = ShmStore.writer(ShmConfig(capacity_bytes=CAPACITY, page_lock=mode))
    arena, got = split_address(writer.address())
    assert got == mode
    assert ("#" in writer.address()) == (mode != "auto")
    assert arena.startswith("shm:")
    if mode == "off":
        assert not ShmStore.reader(writer.address()).page_locked


@pytest.mark.parametrize("tail", ["", "On", "on ", "always"])
def test_an_unknown_mode(arena: tuple[ShmWriter, SampleRef], tail: str) -> None:
    with pytest.raises(ValueError, match=r"address must end with #page_lock= and one of .*'auto'"):
        ShmStore.reader(with_mode(arena[0].address(), tail))


def fork_with_a_reader(pipe: Any, address: str) -> None:
    """In a process of its own: a fork inherits the reader, and must leave CUDA alone."""
    said, say = os.pipe()
    consumer = _C.ArenaConsumer(address)
    consumer.before_unmap(lambda: os.write(say, b"unmapped"))
    child = os.fork()
    if child == 0:
        del consumer
        gc.collect()
        os._exit(0)
    os.waitpid(child, 0)
    os.set_blocking(said, False)
    try:
        pipe.send(os.read(said, 100))
    except BlockingIOError:
        pipe.send(b"")
    del consumer
    pipe.send(os.read(said, 100))


def test_a_forked_child_unregisters_nothing(arena: tuple[ShmWriter, SampleRef]) -> None:
    with started(fork_with_a_reader, arena[0].address()) as (_, pipe):
        assert pipe.poll(60)
        assert pipe.recv() == b""
        assert pipe.poll(60)
        assert pipe.recv() == b"unmapped"


def test_an_error_of_the_callback_is_reported_not_raised(
    arena: tuple[ShmWriter, SampleRef], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", seen.append)

    def fail() -> None:
        raise RuntimeError("planted")

    consumer = _C.ArenaConsumer(arena[0].address())
    consumer.before_unmap(fail)
    del consumer
    gc.collect()
    assert [str(it.exc_value) for it in seen] == ["planted"]
