"""Transfer on one GPU: between processes, from page-locked memory, in the order of the streams.

Run with `pytest -m gpu`. What needs no GPU is asked over a made-up driver: test_device_arena,
test_page_lock, test_store_contract.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from specforge_ext import _C, ops
from specforge_ext.loader.stream import pack
from specforge_ext.records import FeatureLayout, FeatureSpec, Sample
from specforge_ext.store import device_memory, direct_gpu
from specforge_ext.store.cuda_ipc import CudaIpcConfig, CudaIpcStore
from specforge_ext.store.direct import best, rungs
from specforge_ext.store.direct_facts import cuda_gpus, probe
from specforge_ext.store.mooncake_p2p import MooncakeP2PConfig, MooncakeP2PStore
from specforge_ext.store.ref import ref_from_json, ref_to_json
from specforge_ext.store.shm import ShmConfig, ShmStore
from store_cases import LAYOUT_HASH, TIMEOUT_S, make_prompt, make_sample, same_bytes
from store_kinds import kill, receive, started

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]
CAPACITY = 64 << 20
DELAY_CYCLES = 400_000_000
"""A fifth of a second, about: far longer than a reader takes to look."""
WIDTH = 4096
LAYOUT = FeatureLayout((FeatureSpec("hidden", (0,), WIDTH, "bfloat16"),))


@pytest.fixture(autouse=True)
def shared_memory_is_to_be_had(request: pytest.FixtureRequest) -> None:
    if "shm" in request.node.name or "mooncake" in request.node.name:
        return
    if (reason := CudaIpcStore.unavailable()) is not None:
        pytest.skip(f"cuda_ipc: {reason}")


def on_gpu(sample: Sample) -> Sample:
    return Sample(sample.prompt, {k: v.cuda() for k, v in sample.features.items()})


def put(writer: Any, sample: Sample) -> Any:
    return writer.put(sample, layout_hash=LAYOUT_HASH, timeout_s=TIMEOUT_S)


def open_(reader: Any, ref: Any) -> Any:
    return reader.open(ref, layout_hash=LAYOUT_HASH, verify=False)


def expect_features(sample: Sample, wanted: Sample) -> None:
    for name, tensor in wanted.features.items():
        got = sample.features[name]
        assert got.is_cuda or not got.numel()
        assert same_bytes(got.cpu(), tensor), name


def test_preflight_and_torch_agree() -> None:
    gpus, reason = cuda_gpus()
    assert reason is None
    assert [gpu.name for gpu in gpus] == [
        torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())
    ]
    ladder = {rung.name: rung for rung in rungs(probe())}
    assert best(list(ladder.values())).name not in ("gpu_ipc", "gpu_tcp", "tcp")
    assert ladder["gpu_vmm"].available == (CudaIpcStore.unavailable() is None)


def produce(pipe: Connection) -> None:
    """Samples of features that are on the GPU, and of some on the CPU."""
    writer = CudaIpcStore.writer(CudaIpcConfig(capacity_bytes=CAPACITY))
    pipe.send(writer.address())
    for index in range(6):
        sample = make_sample(index, 40 * index, WIDTH + index)
        ref = put(writer, on_gpu(sample) if index % 2 else sample)
        pipe.send(ref_to_json(ref))
    receive(pipe)


def test_between_two_processes_and_after_the_producer() -> None:
    with started(produce) as (process, pipe):
        reader = CudaIpcStore.reader(receive(pipe))
        refs = [ref_from_json(receive(pipe)) for _ in range(6)]
        held = open_(reader, refs[5])
        for index in range(3):
            with open_(reader, refs[index]) as lease:
                expect_features(lease.sample, make_sample(index, 40 * index, WIDTH + index))
            reader.ack(refs[index])
        kill(process)
    assert not reader.producer_alive
    expect_features(held.sample, make_sample(5, 200, WIDTH + 5))
    for index in (3, 4):
        with open_(reader, refs[index]) as lease:
            expect_features(lease.sample, make_sample(index, 40 * index, WIDTH + index))


def hold(pipe: Connection, address: str, text: str) -> None:
    lease = open_(CudaIpcStore.reader(address), ref_from_json(text))
    pipe.send(float(lease.sample.features["hidden"].float().sum()))
    receive(pipe)


def test_a_reader_that_is_killed_holds_nothing_up() -> None:
    writer = CudaIpcStore.writer(CudaIpcConfig(capacity_bytes=CAPACITY))
    hidden = torch.ones(64, WIDTH, dtype=torch.bfloat16, device="cuda")
    ref = put(writer, Sample(make_prompt(1, 64), {"hidden": hidden}))
    with started(hold, writer.address(), ref_to_json(ref)) as (process, pipe):
        assert receive(pipe) == 64.0 * WIDTH
        assert writer.health().slots_leased == 1
        kill(process)
    writer.reap()  # the arena's own thread may have been faster
    assert writer.health().num_readers == 0
    writer.abort(ref)
    assert writer.health().num_samples == 0


def filled_late(value: float) -> Tensor:
    """A feature that the GPU has not begun to write when this returns."""
    hidden = torch.zeros(512, WIDTH, dtype=torch.bfloat16, device="cuda")
    torch.cuda._sleep(DELAY_CYCLES)  # type: ignore[no-untyped-call]
    return hidden.fill_(value)


def produce_late(pipe: Connection) -> None:
    writer = CudaIpcStore.writer(CudaIpcConfig(capacity_bytes=CAPACITY))
    pipe.send(writer.address())
    for value in range(1, 5):
        sample = Sample(make_prompt(value, 512), {"hidden": filled_late(float(value))})
        pipe.send(ref_to_json(put(writer, sample)))
        assert receive(pipe) == "next"


def test_what_is_published_is_whole() -> None:
    """A slow kernel comes before each put, and each place is used again: neither the old bytes nor
    half of the new ones are ever seen."""
    with started(produce_late) as (_, pipe):
        reader = CudaIpcStore.reader(receive(pipe))
        for value in range(1, 5):
            ref = ref_from_json(receive(pipe))
            stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            with torch.cuda.stream(stream), open_(reader, ref) as lease:
                assert lease.sample.features["hidden"].cpu().unique().tolist() == [value]
            reader.ack(ref)
            pipe.send("next")


def test_publishing_before_the_gpu_is_done_would_be_seen(tmp_path: Path) -> None:
    """The wait in `put` is what the test above is about: without it, old bytes are read."""
    device = device_memory.use_device(None)
    folder = tmp_path / "private"
    folder.mkdir(mode=0o700)
    producer = _C.DeviceArenaProducer(device, CAPACITY, 4)
    consumer = _C.DeviceArenaConsumer(device, producer.serve(str(folder / "socket")))
    slot = producer.acquire(4096, 0)
    whole = device_memory.device_bytes(slot).zero_()
    torch.cuda.synchronize()
    torch.cuda._sleep(DELAY_CYCLES)  # type: ignore[no-untyped-call]
    whole.fill_(7)
    slot.publish()
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        seen = device_memory.device_bytes(consumer.lease(slot.slot, slot.generation)).cpu()
    assert seen.unique().tolist() == [0]
    torch.cuda.synchronize()


def hidden_samples() -> list[Sample]:
    generator = torch.Generator().manual_seed(0)
    return [
        Sample(
            make_prompt(index, length),
            {"hidden": torch.randn(length, WIDTH, generator=generator).to(torch.bfloat16)},
        )
        for index, length in enumerate((33, 1, 700))
    ]


def test_a_batch_of_leases_is_packed_on_the_gpu() -> None:
    writer = CudaIpcStore.writer(CudaIpcConfig(capacity_bytes=CAPACITY))
    reader = CudaIpcStore.reader(writer.address())
    samples = hidden_samples()
    refs = [put(writer, on_gpu(sample)) for sample in samples]
    leases = [open_(reader, ref) for ref in refs]
    batch = pack([lease.sample for lease in leases], LAYOUT)
    for lease, ref in zip(leases, refs, strict=True):
        lease.release()
        reader.ack(ref)
    del leases
    for _ in range(8):  # the room is used again at once
        writer.abort(
            put(
                writer,
                Sample(make_prompt(9, 700), {"hidden": filled_late(3.0)[:1].expand(700, WIDTH)}),
            )
        )
    wanted = pack(samples, LAYOUT)
    assert batch.lengths == wanted.lengths
    for name in ("input_ids", "loss_mask", "positions", "cu_seqlens"):
        assert getattr(batch, name).is_cuda
        assert torch.equal(getattr(batch, name).cpu(), getattr(wanted, name)), name
    assert same_bytes(batch.features["hidden"].cpu(), wanted.features["hidden"])


def test_fp8_rows_are_packed_into_the_arena_and_unpacked_from_it(tmp_path: Path) -> None:
    """The producer's kernel writes its codes where readers find them."""
    device = device_memory.use_device(None)
    folder = tmp_path / "private"
    folder.mkdir(mode=0o700)
    producer = _C.DeviceArenaProducer(device, CAPACITY, 4)
    consumer = _C.DeviceArenaConsumer(device, producer.serve(str(folder / "socket")))
    hidden = hidden_samples()[2].features["hidden"]
    codes, layers = hidden.numel(), 4
    slot = producer.acquire(codes + hidden.shape[0] * layers * 4, 0)

    def rows(whole: Tensor) -> tuple[Tensor, Tensor]:
        scale = whole[codes:].view(torch.float32).view(-1, layers)
        return whole[:codes].view(hidden.shape), scale

    written = ops.fp8_pack(hidden.cuda(), layers=layers, out=rows(device_memory.device_bytes(slot)))
    torch.cuda.synchronize()
    slot.publish()
    payload, scale = rows(device_memory.device_bytes(consumer.lease(slot.slot, slot.generation)))
    back = ops.fp8_unpack(ops.Fp8Rows(payload, scale, written.crc))
    wanted = ops.fp8_pack(hidden, layers=layers)
    assert written.crc == wanted.crc
    assert same_bytes(back.cpu(), ops.fp8_unpack(wanted))


@pytest.fixture
def shm() -> Iterator[tuple[Any, Sample]]:
    if not cuda_gpus()[0][torch.cuda.current_device()].read_only_register:
        pytest.skip("this GPU registers no memory that is mapped read-only (attribute 113)")
    writer = ShmStore.writer(ShmConfig(capacity_bytes=CAPACITY, page_lock="on"))
    [*_, sample] = hidden_samples()
    yield writer, sample
    writer.close()


def test_shm_is_page_locked_and_copies_are_asynchronous(shm: tuple[Any, Sample]) -> None:
    writer, sample = shm
    reader = ShmStore.reader(writer.address())
    assert reader.page_locked
    ref = put(writer, sample)
    lease = open_(reader, ref)
    view = lease.sample.features["hidden"]
    assert view.is_pinned()
    target = torch.zeros_like(view, device="cuda")
    torch.cuda.synchronize()
    torch.cuda._sleep(DELAY_CYCLES)  # type: ignore[no-untyped-call]
    target.copy_(view, non_blocking=True)
    assert not torch.cuda.current_stream().query()  # the copy is queued, the host went on
    torch.cuda.synchronize()
    assert same_bytes(target.cpu(), sample.features["hidden"])


def test_shm_views_are_packed_by_the_gpu(shm: tuple[Any, Sample]) -> None:
    """The kernel reads the arena: no copy on the host at all."""
    writer, sample = shm
    reader = ShmStore.reader(writer.address())
    lease = open_(reader, put(writer, sample))
    prompt, hidden = lease.sample.prompt, lease.sample.features["hidden"]
    *_, (packed,) = ops.pack_samples(
        [prompt.input_ids], [prompt.loss_mask], [[hidden]], device="cuda"
    )
    torch.cuda.synchronize()
    assert same_bytes(packed.cpu(), sample.features["hidden"])


def test_shm_registration_ends_with_the_last_view(shm: tuple[Any, Sample]) -> None:
    writer, sample = shm
    ref = put(writer, sample)
    for _ in range(3):  # each time the pages can be registered anew
        reader = ShmStore.reader(writer.address())
        view = open_(reader, ref).sample.features["hidden"]
        reader.close()
        assert view.is_pinned()
        del view, reader
        gc.collect()
    torch.cuda.synchronize()


def test_shm_without_page_lock_is_pageable() -> None:
    writer = ShmStore.writer(ShmConfig(capacity_bytes=CAPACITY, page_lock="off"))
    lease = open_(ShmStore.reader(writer.address()), put(writer, make_sample(1)))
    assert not lease.sample.features["float32"].is_pinned()


MOONCAKE = {"capacity_bytes": CAPACITY, "direct": "on"}


@pytest.fixture
def mooncake_fills_gpus() -> None:
    if reason := direct_gpu.why_not("gpu_tcp", direct_gpu.probe_gpu(None)):
        pytest.skip(f"gpu_tcp: {reason}")


def produce_over_mooncake(pipe: Connection) -> None:
    """Samples of features that the GPU has not begun to write when they are put."""
    writer = MooncakeP2PStore.writer(MooncakeP2PConfig(**MOONCAKE))
    pipe.send(writer.address())
    for value in range(1, 5):
        sample = Sample(make_prompt(value, 512), {"hidden": filled_late(float(value))})
        pipe.send(ref_to_json(put(writer, sample)))
        assert receive(pipe) == "next"


@pytest.mark.usefixtures("mooncake_fills_gpus")
def test_mooncake_brings_whole_samples_from_gpu_to_gpu() -> None:
    """Into a pool that is full of other bytes, read on a stream that waits for nothing; checksums
    are the GPUs' own."""
    with started(produce_over_mooncake) as (_, pipe):
        reader = MooncakeP2PStore.reader(receive(pipe))
        assert reader.capabilities().on_gpu
        for value in range(1, 5):
            ref = ref_from_json(receive(pipe))
            assert None not in {t.checksum for t in ref.tensors}
            stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            with torch.cuda.stream(stream):
                lease = reader.open(ref, layout_hash=LAYOUT_HASH, verify=True)
                view = lease.sample.features["hidden"]
                assert view.is_cuda and view.cpu().unique().tolist() == [value]
            del view
            lease.release()
            reader.ack(ref)
            pipe.send("next")
        reader.close()


@pytest.mark.usefixtures("mooncake_fills_gpus")
def test_a_batch_of_mooncake_leases_is_packed_on_the_gpu() -> None:
    """Their room is filled again as soon as they are over: the batch must not show it."""
    writer = MooncakeP2PStore.writer(MooncakeP2PConfig(**MOONCAKE, pool_bytes=8 << 20))
    reader = MooncakeP2PStore.reader(writer.address())
    samples = hidden_samples()
    leases = [open_(reader, put(writer, on_gpu(sample))) for sample in samples]
    batch = pack([lease.sample for lease in leases], LAYOUT)
    for lease in leases:
        lease.release()
    del leases
    other = {"hidden": torch.full((700, WIDTH), 3.0, dtype=torch.bfloat16, device="cuda")}
    for _ in range(8):
        open_(reader, put(writer, Sample(make_prompt(9, 700), other))).release()
    wanted = pack(samples, LAYOUT).features["hidden"]
    assert same_bytes(batch.features["hidden"].cpu(), wanted)
    reader.close()
    writer.close()
