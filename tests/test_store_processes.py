"""The shm store between processes, and when one of them is killed."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from specforge_ext.store.base import ProducerLost, StaleRef
from specforge_ext.store.ref import ref_from_json, ref_to_json
from specforge_ext.store.shm import ShmConfig, ShmStore
from store_cases import LAYOUT_HASH, TIMEOUT_S, make_sample, same_sample

NUM_STREAMED = 500


def receive(pipe: Connection) -> str:
    assert pipe.poll(60), "nothing came from the other process in 60 s"
    return str(pipe.recv())


@contextmanager
def started(
    child: Callable[..., None], *arguments: object
) -> Iterator[tuple[BaseProcess, Connection]]:
    """A fresh process with one end of a pipe; killed at the end if it still runs."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=child, args=(theirs, *arguments))
    process.start()
    theirs.close()
    try:
        yield process, ours
    finally:
        process.kill()
        process.join(20)
        ours.close()


def kill(process: BaseProcess) -> None:
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join(20)
    assert process.exitcode == -signal.SIGKILL


def consume_stream(pipe: Connection, address: str) -> None:
    """Check every ref that comes against its sample made anew."""
    reader = ShmStore.reader(address)
    while text := receive(pipe):
        ref = ref_from_json(text)
        index = int(ref.sample_id.removeprefix("sample-"))
        with reader.open(ref, layout_hash=LAYOUT_HASH, verify=True) as lease:
            assert same_sample(lease.sample, make_sample(index, ref.num_tokens))
        reader.ack(ref)
    reader.close()
    pipe.send("all equal")


def hold(pipe: Connection, address: str) -> None:
    """Lease what comes, acknowledge the first, and stay."""
    reader = ShmStore.reader(address)
    refs = [ref_from_json(receive(pipe)) for _ in range(3)]
    leases = [reader.open(ref, layout_hash=LAYOUT_HASH, verify=True) for ref in refs]
    reader.ack(refs[0])
    pipe.send(f"holding {len(leases)}")
    time.sleep(600)


def produce(pipe: Connection, num_samples: int) -> None:
    writer = ShmStore.writer(ShmConfig(capacity_bytes=1 << 18, max_slots=8))
    pipe.send(writer.address())
    for index in range(num_samples):
        ref = writer.put(make_sample(index), layout_hash=LAYOUT_HASH, timeout_s=TIMEOUT_S)
        pipe.send(ref_to_json(ref))
    time.sleep(600)


def test_stream_of_500() -> None:
    writer = ShmStore.writer(ShmConfig(capacity_bytes=1 << 17, max_slots=16))
    with started(consume_stream, writer.address()) as (_, pipe):
        for index in range(NUM_STREAMED):
            sample = make_sample(index, 1 + index % 90)
            ref = writer.put(sample, layout_hash=LAYOUT_HASH, timeout_s=60)
            pipe.send(ref_to_json(ref))
        pipe.send("")
        assert receive(pipe) == "all equal"
        assert writer.health().used_bytes == 0
        assert writer.health().num_readers == 0


def test_killed_consumer() -> None:
    writer = ShmStore.writer(ShmConfig(capacity_bytes=1 << 15, max_slots=3))
    samples = [make_sample(index) for index in range(3)]
    refs = [writer.put(s, layout_hash=LAYOUT_HASH, timeout_s=TIMEOUT_S) for s in samples]
    with started(hold, writer.address()) as (process, pipe):
        for ref in refs:
            pipe.send(ref_to_json(ref))
        assert receive(pipe) == "holding 3"
        assert writer.reap() == 0
        health = writer.health()
        assert (health.slots_draining, health.slots_leased) == (1, 2)
        kill(process)
    # Nobody reaped: a put that waits does, and finds the one that was acknowledged.
    refs[0] = writer.put(samples[0], layout_hash=LAYOUT_HASH, timeout_s=TIMEOUT_S)
    assert writer.reap() == 0
    assert (writer.health().slots_ready, writer.health().num_readers) == (3, 0)
    reader = ShmStore.reader(writer.address())
    for ref, sample in zip(refs, samples, strict=True):
        with reader.open(ref, layout_hash=LAYOUT_HASH, verify=True) as lease:
            assert same_sample(lease.sample, sample)
        reader.ack(ref)
    assert writer.health().used_bytes == 0


def test_killed_producer() -> None:
    in_shm = set(Path("/dev/shm").iterdir())
    with started(produce, 3) as (process, pipe):
        address = receive(pipe)
        refs = [ref_from_json(receive(pipe)) for _ in range(3)]
        reader = ShmStore.reader(address)
        held = reader.open(refs[0], layout_hash=LAYOUT_HASH, verify=True)
        assert reader.producer_alive
        kill(process)
    assert not reader.producer_alive
    assert same_sample(held.sample, make_sample(0))
    for index, ref in enumerate(refs):
        with reader.open(ref, layout_hash=LAYOUT_HASH, verify=True) as lease:
            assert same_sample(lease.sample, make_sample(index))
        reader.ack(ref)
        with pytest.raises(StaleRef, match="acknowledged already"):
            reader.open(ref, layout_hash=LAYOUT_HASH, verify=True)
    with pytest.raises(ProducerLost, match=rf"its producer, process {process.pid}, has ended"):
        ShmStore.reader(address)
    assert not {p for p in set(Path("/dev/shm").iterdir()) - in_shm if "specforge" in p.name}
