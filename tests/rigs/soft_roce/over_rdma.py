"""What only RDMA can show. For the guest of `make test-rdma`; no plain pytest collects it.

TCP copies from and to any address: only here is a registration that is missing, or that ended too
early, seen.
"""

from __future__ import annotations

import ctypes
import os
import re
import resource
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch

from specforge_ext.records import Sample, SampleRef
from specforge_ext.store import STORES, mooncake
from specforge_ext.store.base import StoreError
from specforge_ext.store.mooncake_objects import key_of
from specforge_ext.store.mooncake_p2p import MooncakeP2PStore
from specforge_ext.store.ref import ref_from_json
from store_cases import LAYOUT_HASH, TIMEOUT_S, make_sample, same_sample
from store_kinds import LINK, OVER_MOONCAKE, PROTOCOL, receive, started
from test_store_mooncake import put_one

DEVICE = mooncake.INFINIBAND / str(LINK["devices"])
POOL = {"mooncake_store": "_pool", "mooncake_p2p": "_open_pool"}
CAPACITY_BYTES = 4 << 20
CAP_IPC_LOCK = 14
REFUSED = r"error -800|refused the transfer"


@dataclass
class Pair:
    """Writer and reader of one kind, and a sample between them."""

    kind: str
    writer: Any
    reader: Any
    sample: Sample
    ref: SampleRef

    def expect_equal(self) -> None:
        with self.reader.open(self.ref, layout_hash=LAYOUT_HASH, verify=True) as lease:
            assert same_sample(lease.sample, self.sample)

    def expect_refused(self) -> None:
        with pytest.raises(StoreError, match=REFUSED):
            self.reader.open(self.ref, layout_hash=LAYOUT_HASH, verify=False)


def connected(kind: str, **link: str) -> Iterator[Pair]:
    store = STORES.get(kind)
    writer = store.writer(store.Config(capacity_bytes=CAPACITY_BYTES, **link))
    reader = store.reader(writer.address())
    sample = make_sample(1, 400, 65)
    ref = writer.put(sample, layout_hash=LAYOUT_HASH, timeout_s=TIMEOUT_S)
    yield Pair(kind, writer, reader, sample, ref)
    reader.close()
    writer.close()


@pytest.fixture(scope="module", params=OVER_MOONCAKE)
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    yield from connected(request.param, **LINK)


def read_number(path: Path) -> int:
    return int(path.read_text())


@dataclass(frozen=True)
class Traffic:
    """Packets that the RDMA device sent, and bytes that the loopback interface did (TCP)."""

    rdma_packets: int
    tcp_bytes: int

    @classmethod
    def now(cls) -> Traffic:
        time.sleep(0.1)  # the kernel's own cache of these counters is 10 ms old
        return cls(
            read_number(DEVICE / "ports/1/hw_counters/sent_pkts"),
            read_number(Path("/sys/class/net/lo/statistics/tx_bytes")),
        )

    def __sub__(self, other: Traffic) -> Traffic:
        return Traffic(self.rdma_packets - other.rdma_packets, self.tcp_bytes - other.tcp_bytes)


def traffic_of_a_read(pair: Pair) -> Traffic:
    before = Traffic.now()
    pair.expect_equal()
    return Traffic.now() - before


def test_it_is_rdma_that_carries_the_payload(pair: Pair) -> None:
    interface = (DEVICE / "parent").read_text().strip()
    most_of_a_packet = read_number(Path("/sys/class/net") / interface / "mtu")
    assert pair.reader.capabilities().protocol == PROTOCOL == "rdma"
    moved = traffic_of_a_read(pair)
    assert moved.rdma_packets * most_of_a_packet >= pair.ref.nbytes
    assert moved.tcp_bytes < pair.ref.nbytes / 4


@pytest.mark.parametrize("kind", OVER_MOONCAKE)
def test_the_counters_tell_tcp_apart(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though there is a device, and a user who told Mooncake to look for one."""
    monkeypatch.setenv("MC_MS_AUTO_DISC", "1")
    for pair in connected(kind, protocol="tcp"):
        moved = traffic_of_a_read(pair)
        assert moved.rdma_packets == 0
        assert moved.tcp_bytes >= pair.ref.nbytes


@pytest.mark.parametrize("kind", OVER_MOONCAKE)
def test_any_device(kind: str) -> None:
    """None is named: Mooncake finds it."""
    for pair in connected(kind, protocol="rdma"):
        assert traffic_of_a_read(pair).tcp_bytes < pair.ref.nbytes / 4


def test_memory_that_was_never_registered(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """A planted bug; afterwards all goes on."""
    pair.expect_equal()
    forgotten = mooncake.Pool(CAPACITY_BYTES, lambda address, nbytes: 0)
    with monkeypatch.context() as planted:
        planted.setattr(pair.reader, POOL[pair.kind], forgotten)
        pair.expect_refused()
    pair.expect_equal()


def test_mooncake_says_minus_800() -> None:
    for pair in connected("mooncake_store", **LINK):
        buffer = torch.zeros(pair.ref.nbytes, dtype=torch.uint8)
        key = key_of(pair.ref.store.partition(":")[2], pair.ref.generation)
        codes = pair.reader._client.batch_get_into([key], [buffer.data_ptr()], [buffer.numel()])
        assert codes == [-800]
        assert not buffer.any()


def test_a_reader_whose_registration_ended(pair: Pair) -> None:
    pool = getattr(pair.reader, POOL[pair.kind])
    if pair.kind == "mooncake_store":
        register, unregister = (
            pair.reader._client.register_buffer,
            pair.reader._client.unregister_buffer,
        )
    else:
        register, unregister = (
            pair.reader._engine.register_memory,
            pair.reader._engine.unregister_memory,
        )
    pair.expect_equal()
    assert unregister(pool.region[0]) == 0
    pair.expect_refused()
    assert register(*pool.region) == 0
    pair.expect_equal()


def test_a_producer_whose_registration_ended() -> None:
    for pair in connected("mooncake_p2p", **LINK):
        pair.expect_equal()
        _, payload = pair.writer._arena.regions
        assert pair.writer._engine.unregister_memory(payload[0]) == 0
        pair.expect_refused()


def test_a_producer_that_stands_still_is_read() -> None:
    """The device reads its memory: nothing of the process is needed."""
    with started(put_one, TIMEOUT_S) as (process, pipe):
        address, text = receive(pipe)
        reader, ref = MooncakeP2PStore.reader(address), ref_from_json(text)
        reader.open(ref, layout_hash=LAYOUT_HASH, verify=True).release()
        assert process.pid is not None
        os.kill(process.pid, signal.SIGSTOP)
        with reader.open(ref, layout_hash=LAYOUT_HASH, verify=True) as lease:
            assert same_sample(lease.sample, make_sample(1, 200))
        reader.ack(ref)
        reader.close()


def open_a_writer(pipe: Connection, kind: str, memlock_bytes: int) -> None:
    """Without the capability that lets root lock as much as it wants."""
    import faulthandler

    faulthandler.dump_traceback_later(60, repeat=True)
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # version 3 of the interface; this thread
    sets = (ctypes.c_uint32 * 6)()
    assert libc.capget(header, sets) == 0, ctypes.get_errno()
    sets[0] &= ~(1 << CAP_IPC_LOCK)
    assert libc.capset(header, sets) == 0, ctypes.get_errno()
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (memlock_bytes, memlock_bytes))
    store = STORES.get(kind)
    try:
        store.writer(store.Config(capacity_bytes=CAPACITY_BYTES, **LINK))
        pipe.send("it went well")
    except StoreError as error:
        pipe.send(str(error))
    time.sleep(600)


@pytest.mark.parametrize("kind", OVER_MOONCAKE)
def test_too_little_memory_may_be_locked(kind: str) -> None:
    """As for users that are not root: their limit is often 8 MiB, and less in containers."""
    with started(open_a_writer, kind, 1 << 20) as (_, pipe):
        text = receive(pipe)
    assert re.search(r"Mooncake .* error -\d+, memlock limit 1048576$", text), text
