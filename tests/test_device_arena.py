"""The arena on a device, over a driver made of memfds: what is mapped where, shared with whom and
given back when. What a GPU does with it is asked by test_gpu_transfer."""

from __future__ import annotations

import ctypes
import gc
import os
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch

import fake_cuda
from specforge_ext import _C
from specforge_ext.records import SampleRef
from specforge_ext.store import cuda_ipc
from specforge_ext.store.base import ProducerLost, StaleRef, StoreError, StoreFull
from specforge_ext.store.cuda_ipc import CudaIpcConfig, CudaIpcStore
from specforge_ext.store.direct_facts import cuda_gpus
from specforge_ext.store.ref import ref_from_json, ref_to_json
from specforge_ext.store.shm import ShmConfig, ShmStore
from store_cases import LAYOUT_HASH, TIMEOUT_S, make_sample, same_sample
from store_kinds import kill, receive, started

pytestmark = pytest.mark.skipif(
    fake_cuda.real_driver(), reason="a CUDA driver is here: test_gpu_transfer covers it"
)
PAGE = 2 << 20
"""Of the driver's memory."""


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[ctypes.CDLL]:
    """At the end nothing of it may be left over."""
    gc.collect()
    driver = fake_cuda.install(monkeypatch.setattr)
    monkeypatch.setenv(fake_cuda.WANTED, "1")
    before = driver.fake_cuda_live()
    yield driver
    gc.collect()
    assert driver.fake_cuda_live() == before


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "private"
    folder.mkdir(mode=0o700)
    return folder


def bytes_of(slot: Any) -> torch.Tensor:
    return torch.from_dlpack(slot.dlpack(fake_cuda.K_DL_CPU))


def test_a_slot_is_the_same_memory_on_both_sides(driver: ctypes.CDLL, folder: Path) -> None:
    producer = _C.DeviceArenaProducer(1, 3 * 4096, 4)
    consumer = _C.DeviceArenaConsumer(0, producer.serve(str(folder / "socket")))
    assert consumer.epoch == producer.epoch
    first, second = producer.acquire(5000, 0), producer.acquire(10, 0)
    for value, slot in ((7, first), (9, second)):
        bytes_of(slot)[:] = value
        slot.publish()
    leases = [consumer.lease(slot.slot, slot.generation) for slot in (first, second)]
    assert [lease.nbytes for lease in leases] == [5000, 10]
    assert [bytes_of(lease).unique().tolist() for lease in leases] == [[7], [9]]
    pages = producer.regions[1]
    assert pages[1] == 3 * 4096
    where = bytes_of(leases[0]).data_ptr()
    assert not pages[0] <= where < pages[0] + PAGE  # a mapping of its own


def test_a_lease_lives_as_long_as_a_view(driver: ctypes.CDLL, folder: Path) -> None:
    producer = _C.DeviceArenaProducer(0, 4096, 4)
    consumer = _C.DeviceArenaConsumer(0, producer.serve(str(folder / "socket")))
    slot = producer.acquire(100, 0)
    bytes_of(slot)[:] = 5
    slot.publish()
    view = bytes_of(consumer.lease(slot.slot, slot.generation))[50:60]
    consumer.acknowledge(slot.slot, slot.generation)
    assert producer.stats()["slots_draining"] == 1
    del consumer
    gc.collect()
    assert view.unique().tolist() == [5]
    with pytest.raises(StaleRef, match="was acknowledged already"):
        producer.discard(slot.slot, slot.generation)
    del view
    gc.collect()
    assert producer.stats()["slots_free"] == 4


def test_a_capsule_that_nobody_takes_is_given_back(driver: ctypes.CDLL, folder: Path) -> None:
    producer = _C.DeviceArenaProducer(0, 4096, 4)
    slot = producer.acquire(100, 0)
    capsule = slot.dlpack(fake_cuda.K_DL_CPU)
    del slot
    assert producer.stats()["slots_writing"] == 1
    del capsule
    assert producer.stats()["slots_free"] == 4


def test_the_host_has_no_buffer_of_it(driver: ctypes.CDLL) -> None:
    slot = _C.DeviceArenaProducer(0, 4096, 4).acquire(100, 0)
    with pytest.raises(TypeError, match="bytes-like object is required"):
        memoryview(slot)  # type: ignore[arg-type]


def test_errors_of_the_driver_have_its_words(driver: ctypes.CDLL) -> None:
    with pytest.raises(RuntimeError, match=r"cuDeviceGet.*: invalid device ordinal \(.*:\d+\)"):
        _C.DeviceArenaProducer(2, 4096, 4)
    wanted = rf"cuMemCreate of {4 << 30} bytes on cuda:1: out of memory"
    with pytest.raises(RuntimeError, match=wanted):
        _C.DeviceArenaProducer(1, 4 << 30, 4)


def test_either_kind_of_reader_refuses_the_other_arena(driver: ctypes.CDLL, folder: Path) -> None:
    on_device = _C.DeviceArenaProducer(0, 4096, 4)
    on_host = _C.ArenaProducer(4096, 4)
    addresses = [it.serve(str(folder / name)) for it, name in ((on_device, "a"), (on_host, "b"))]
    wanted = "payload must lie in shared memory, it is in the memory of a GPU"
    with pytest.raises(ValueError, match=wanted):
        _C.ArenaConsumer(addresses[0])
    wanted = "payload must lie in the memory of a GPU, it is in shared memory"
    with pytest.raises(ValueError, match=wanted):
        _C.DeviceArenaConsumer(0, addresses[1])
    with pytest.raises(ValueError, match="address must be shm:unix:PATH:EPOCH"):
        _C.DeviceArenaConsumer(0, on_host.address)


def test_the_same_sizes_are_refused(driver: ctypes.CDLL) -> None:
    with pytest.raises(ValueError, match=r"capacity_bytes must be 1\.\.\d+, got 0"):
        _C.DeviceArenaProducer(0, 0, 4)
    with pytest.raises(StoreFull):
        _C.DeviceArenaProducer(0, 4096, 4).acquire(4097, 0)


def put_and_wait(pipe: Connection) -> None:
    writer = CudaIpcStore.writer(CudaIpcConfig(capacity_bytes=1 << 20))
    ref = writer.put(make_sample(1, 50), layout_hash=LAYOUT_HASH, timeout_s=TIMEOUT_S)
    pipe.send((writer.address(), ref_to_json(ref)))
    receive(pipe)


def test_memory_outlives_its_maker(driver: ctypes.CDLL) -> None:
    with started(put_and_wait) as (process, pipe):
        address, text = receive(pipe)
        reader = CudaIpcStore.reader(address)
        kill(process)
    assert not reader.producer_alive
    ref = ref_from_json(text)
    with reader.open(ref, layout_hash=LAYOUT_HASH, verify=False) as lease:
        assert same_sample(lease.sample, make_sample(1, 50))
    with pytest.raises(ProducerLost, match="nobody listens, its producer has ended"):
        CudaIpcStore.reader(address)


def test_a_forked_child_gives_nothing_back(driver: ctypes.CDLL) -> None:
    """It has the addresses, but a driver that must not be asked: its own memory goes with it."""
    writer = CudaIpcStore.writer(CudaIpcConfig(capacity_bytes=1 << 20))
    live = driver.fake_cuda_live()
    child = os.fork()
    if child == 0:
        writer.close()
        gc.collect()
        os._exit(0 if driver.fake_cuda_live() == live else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    ref = writer.put(make_sample(1), layout_hash=LAYOUT_HASH, timeout_s=TIMEOUT_S)
    writer.abort(ref)


def opened_and_put() -> tuple[Any, Any, SampleRef]:
    writer = CudaIpcStore.writer(CudaIpcConfig(capacity_bytes=1 << 20))
    reader = CudaIpcStore.reader(writer.address())
    ref = writer.put(make_sample(1), layout_hash=LAYOUT_HASH, timeout_s=TIMEOUT_S)
    return writer, reader, ref


def test_prompts_are_copies_and_features_are_views(driver: ctypes.CDLL) -> None:
    writer, reader, ref = opened_and_put()
    lease = reader.open(ref, layout_hash=LAYOUT_HASH, verify=False)
    prompt = lease.sample.prompt
    lease.release()
    reader.ack(ref)
    assert writer.health().num_samples == 0  # the prompt holds nothing
    assert torch.equal(prompt.input_ids, make_sample(1).prompt.input_ids)


def test_no_checksums_unless_asked_for(driver: ctypes.CDLL) -> None:
    _, reader, ref = opened_and_put()
    assert {t.checksum for t in ref.tensors} == {None}
    with pytest.raises(StoreError, match="wanted a checksum to verify, the ref has none"):
        reader.open(ref, layout_hash=LAYOUT_HASH, verify=True)


def test_the_folder_of_the_socket_goes_with_the_writer(driver: ctypes.CDLL) -> None:
    writer = CudaIpcStore.writer(CudaIpcConfig(capacity_bytes=4096))
    folder = Path(writer.address().split(":")[2]).parent
    assert folder.stat().st_mode & 0o777 == 0o700
    writer.close()
    assert not folder.exists()
    with pytest.raises(StoreError, match="cuda_ipc writer: wanted an open arena, but it was"):
        writer.address()


def test_a_socket_of_ones_own(driver: ctypes.CDLL, folder: Path) -> None:
    path = str(folder / "arena.sock")
    writer = CudaIpcStore.writer(CudaIpcConfig(capacity_bytes=4096, socket_path=path))
    assert writer.address().startswith(f"shm:unix:{path}:")
    writer.close()
    assert folder.exists()


def test_tensors_that_cannot_travel(driver: ctypes.CDLL) -> None:
    writer = CudaIpcStore.writer(CudaIpcConfig(capacity_bytes=1 << 20))
    sample = replace(make_sample(1), features={"h": torch.zeros(7, 1, device="meta")})
    with pytest.raises(ValueError, match=r"on the CPU or a GPU, got torch\.float32 on meta"):
        writer.put(sample, layout_hash=LAYOUT_HASH, timeout_s=0.0)


def test_without_a_gpu_it_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_ipc, "unavailable", lambda: "no CUDA driver: gone")
    for make in (
        lambda: CudaIpcStore.writer(CudaIpcConfig()),
        lambda: CudaIpcStore.reader("shm:unix:/x:0000000000000001"),
    ):
        with pytest.raises(StoreError, match="cuda_ipc is not available: no CUDA driver: gone"):
            make()
    assert CudaIpcStore.unavailable() == "no CUDA driver: gone"


def test_preflight_asks_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_CUDA_DEVICES", "2")
    monkeypatch.setenv("FAKE_CUDA_ZERO", "113,124")
    gpus, reason = cuda_gpus(str(fake_cuda.library()))
    assert reason is None
    assert [(gpu.index, gpu.name, gpu.peers) for gpu in gpus] == [
        (0, "Fake 0", (1,)),
        (1, "Fake 1", (0,)),
    ]
    for gpu in gpus:
        assert gpu.compute_mode == 0
        assert not (gpu.read_only_register or gpu.dma_buf)
        assert gpu.vmm and gpu.vmm_fd and gpu.vmm_rdma and gpu.rdma and gpu.ipc_event


def test_a_driver_that_shows_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_CUDA_DEVICES", "0")
    library = str(fake_cuda.library())
    assert cuda_gpus(library) == ((), f"{library} shows no GPU")


def test_shm_is_as_before(driver: ctypes.CDLL) -> None:
    """A loaded driver changes nothing for who does not ask for it."""
    writer = ShmStore.writer(ShmConfig(capacity_bytes=1 << 20))
    live = driver.fake_cuda_live()
    ref = writer.put(make_sample(1), layout_hash=LAYOUT_HASH, timeout_s=TIMEOUT_S)
    with ShmStore.reader(writer.address()).open(ref, layout_hash=LAYOUT_HASH, verify=True) as lease:
        assert same_sample(lease.sample, make_sample(1))
    assert driver.fake_cuda_live() == live
