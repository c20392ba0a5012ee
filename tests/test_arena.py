"""Attaching to an arena: what is refused, and who may hold it."""

from __future__ import annotations

import fcntl
import os
import re
import resource
import signal
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest

from specforge_ext import _C
from specforge_ext.store.base import (
    ProducerLost,
    StaleRef,
    StoreError,
    StoreFull,
    TransferTimeout,
)

HEADER = struct.Struct("<QIIQQQQqQQ")  # csrc/transport/layout.h, FixedHeader
FIELDS = ["magic", "version", "max_slots", "control_bytes", "payload_bytes", "total_bytes"]
FIELDS += ["epoch", "pid", "start", "place"]


@contextmanager
def memfd(content: bytes, size: int, *, sealed: bool = True) -> Iterator[int]:
    fd = os.memfd_create("hostile", os.MFD_ALLOW_SEALING)
    try:
        os.write(fd, content)
        os.ftruncate(fd, size)
        if sealed:
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
        yield fd
    finally:
        os.close(fd)


def address_of(producer: _C.ArenaProducer, fd: int, epoch: int) -> str:
    _, pid, start, _, _ = producer.address.split(":")
    return f"shm:{pid}:{start}:{fd}:{epoch:016x}"


def header_of(producer: _C.ArenaProducer) -> dict[str, int]:
    fd = int(producer.address.split(":")[3])
    return dict(zip(FIELDS, HEADER.unpack(os.pread(fd, HEADER.size, 0)), strict=True))


@pytest.fixture
def producer() -> _C.ArenaProducer:
    return _C.ArenaProducer(1 << 16, 8)


@pytest.mark.parametrize(
    "address",
    [
        "",
        "shm",
        "shm:1:2:3",
        "shm:1:2:3:4",
        "shm:1:2:3:00000000000000aG",
        "shm:-1:2:3:00000000000000aa",
        "shm:1:-2:3:00000000000000aa",
        "shm:1:2:-3:00000000000000aa",
        "shm:1:2:3:0000000000000000",
        "shm:1:2:3:00000000000000aa:5",
        "shm: 1:2:3:00000000000000aa",
        "shm:99999999999999999999:2:3:00000000000000aa",
        "shm:1:2:3:00000000000000AA",
    ],
)
def test_address_must_be_exact(address: str) -> None:
    with pytest.raises(ValueError, match="address must be shm:PID:START:FD:EPOCH, got"):
        _C.ArenaConsumer(address)


def test_nobody_at_the_address(producer: _C.ArenaProducer) -> None:
    _, pid, start, fd, epoch = producer.address.split(":")
    with pytest.raises(ProducerLost, match=f"its producer, process {pid}, has ended"):
        _C.ArenaConsumer(f"shm:{pid}:{int(start) + 1}:{fd}:{epoch}")
    with pytest.raises(ProducerLost, match="has ended or closed it"):
        _C.ArenaConsumer(f"shm:{pid}:{start}:999999:{epoch}")
    with pytest.raises(ProducerLost, match="closed it and opened another"):
        _C.ArenaConsumer(f"shm:{pid}:{start}:{fd}:{'1' * 16}")


def test_another_users_file(producer: _C.ArenaProducer) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give a file away")
    os.fchown(int(producer.address.split(":")[3]), 1, 1)
    with pytest.raises(ValueError, match="must belong to user 0, got user 1"):
        _C.ArenaConsumer(producer.address)


def test_file_without_seals(producer: _C.ArenaProducer) -> None:
    header = header_of(producer)
    content = HEADER.pack(*header.values())
    with memfd(content, header["total_bytes"], sealed=False) as fd:
        address = address_of(producer, fd, header["epoch"])
        with pytest.raises(ValueError, match="must be a memfd sealed against shrinking"):
            _C.ArenaConsumer(address)


def test_header_is_checked_whole(producer: _C.ArenaProducer) -> None:
    """Any wrong field is refused by name, whatever the others say; a right copy is accepted."""
    good = header_of(producer)
    hostile = [
        0,
        1,
        7,
        8,
        4095,
        4097,
        1 << 31,
        (1 << 32) - 1,
        1 << 62,
        (1 << 63) - 1,
        (1 << 64) - 1,
    ]
    num_refused = 0
    for field in set(FIELDS) - {"pid", "start"}:
        limit = 32 if field in ("version", "max_slots") else 64
        for value in {v % (1 << limit) for v in hostile} - {good[field]}:
            content = HEADER.pack(*{**good, field: value}.values())
            with memfd(content, good["total_bytes"]) as fd:
                # The epoch is compared with the address.
                error = ProducerLost if field == "epoch" and value else ValueError
                if field == "max_slots" and 1 <= value <= 64:
                    continue  # as many slots fit into the same page
                with pytest.raises(error):
                    _C.ArenaConsumer(address_of(producer, fd, good["epoch"]))
                num_refused += 1
    assert num_refused > 40
    content = HEADER.pack(*good.values())
    with memfd(content, good["total_bytes"]) as fd:
        _C.ArenaConsumer(address_of(producer, fd, good["epoch"]))
    with (
        memfd(content[:40], 40) as fd,
        pytest.raises(ValueError, match="header of 72 bytes, got"),
    ):
        _C.ArenaConsumer(address_of(producer, fd, good["epoch"]))
    with (
        memfd(content, good["total_bytes"] - 4096) as fd,
        pytest.raises(ValueError, match=r"header.total_bytes must be \d+, got \d+"),
    ):
        _C.ArenaConsumer(address_of(producer, fd, good["epoch"]))
    for value in (0, -1, 1 << 40):
        with (
            memfd(HEADER.pack(*{**good, "pid": value}.values()), good["total_bytes"]) as fd,
            pytest.raises(ValueError, match="producer_pid must be"),
        ):
            _C.ArenaConsumer(address_of(producer, fd, good["epoch"]))


def test_slot_that_lies_about_its_extent(producer: _C.ArenaProducer) -> None:
    reservation = producer.acquire(100, 0)
    reservation.publish()
    fd = int(producer.address.split(":")[3])
    slot = 4096 + 64 * reservation.slot
    for offset, nbytes in [(0, 1 << 40), (1, 8), (1 << 63, 8), (1 << 20, 0), (4096, 1 << 16)]:
        os.pwrite(fd, struct.pack("<QQ", offset, nbytes), slot + 8)
        with pytest.raises(StoreError, match=f"claims {nbytes} bytes at {offset} of a payload"):
            _C.ArenaConsumer(producer.address).lease(reservation.slot, reservation.generation)
    assert producer.stats()["slots_ready"] == 1


def test_places_for_readers(producer: _C.ArenaProducer) -> None:
    with ExitStack() as stack:
        readers = [_C.ArenaConsumer(producer.address) for _ in range(16)]
        with pytest.raises(StoreError, match="all 16 places for readers are taken"):
            _C.ArenaConsumer(producer.address)
        del readers[3]
        stack.callback(readers.clear)
        readers.append(_C.ArenaConsumer(producer.address))
    assert producer.stats()["num_readers"] == 0


def test_several_readers_of_one_sample(producer: _C.ArenaProducer) -> None:
    """The slot is free when it is acknowledged and the last of them has let go, in any order."""
    first, second = (_C.ArenaConsumer(producer.address) for _ in range(2))
    reservation = producer.acquire(10, 0)
    reservation.publish()
    key = (reservation.slot, reservation.generation)
    leases = [first.lease(*key), second.lease(*key), second.lease(*key)]
    leases.pop(0)
    assert producer.stats()["slots_leased"] == 1
    first.acknowledge(*key)
    leases.pop(0)
    assert producer.stats()["slots_draining"] == 1
    leases.pop(0)
    assert producer.stats()["slots_free"] == 8


@pytest.mark.parametrize(("capacity", "slots"), [(0, 1), (1, 0), ((1 << 46) + 1, 1), (1, 1 << 21)])
def test_sizes_that_cannot_be(capacity: int, slots: int) -> None:
    with pytest.raises(ValueError, match=r"(capacity_bytes|max_slots) must be 1\.\.\d+, got"):
        _C.ArenaProducer(capacity, slots)


@contextmanager
def file_size_limit(nbytes: int) -> Iterator[None]:
    """A memfd cannot grow beyond this: keeps a test of hopeless sizes from taking the machine."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_memory_that_is_not_there() -> None:
    with file_size_limit(1 << 20):
        with pytest.raises(RuntimeError, match=r"allocate \d+ bytes: only \d+ are available"):
            _C.ArenaProducer(1 << 46, 1)
        with pytest.raises(RuntimeError, match=r"ftruncate: File too large \(.*mapping.cpp:\d+"):
            _C.ArenaProducer(16 << 20, 1)


def test_full_names_both_figures(producer: _C.ArenaProducer) -> None:
    start = time.monotonic()
    with pytest.raises(StoreFull, match="65537 bytes does not fit a store of 65536") as caught:
        producer.acquire(65537, 60)
    assert (caught.value.needed, caught.value.available) == (65537, 65536)
    assert time.monotonic() - start < 5
    with pytest.raises(StoreFull):
        producer.acquire((1 << 64) - 1, 60)


def test_timeout_names_what_and_how_long(producer: _C.ArenaProducer) -> None:
    held = producer.acquire(40000, 0)
    what = (
        r"waited 0\.\d s for room for 30000 bytes in an arena of 65536 \(used 40960, "
        r"largest free extent 24576; slots: 7 free, 1 writing, 0 ready, 0 leased, 0 draining\)"
    )
    with pytest.raises(TransferTimeout, match=what) as caught:
        producer.acquire(30000, 0.1)
    assert 0.1 <= caught.value.waited_s < 10
    held.abort()
    producer.acquire(30000, 0).abort()


@pytest.mark.parametrize("timeout_s", [-1.0, float("nan"), float("inf")])
def test_every_wait_has_a_deadline(producer: _C.ArenaProducer, timeout_s: float) -> None:
    with pytest.raises(ValueError, match="timeout_s must be finite and not negative, got"):
        producer.acquire(1, timeout_s)


def test_waiting_wakes_and_holds_no_gil(producer: _C.ArenaProducer) -> None:
    held = producer.acquire(1 << 16, 0)
    timer = threading.Timer(0.05, held.abort)
    timer.start()
    producer.acquire(1 << 16, 20).abort()
    timer.join()


def test_signals_end_a_wait(producer: _C.ArenaProducer) -> None:
    class Alarm(Exception):
        pass

    def ring(number: int, frame: object) -> None:
        raise Alarm

    held = producer.acquire(1 << 16, 0)
    before = signal.signal(signal.SIGALRM, ring)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        with pytest.raises(Alarm):
            producer.acquire(1, 20)
    finally:
        signal.signal(signal.SIGALRM, before)
    held.abort()


def test_reservation_is_used_once(producer: _C.ArenaProducer) -> None:
    reservation = producer.acquire(16, 0)
    with pytest.raises(ValueError, match="range must lie within 16 bytes, got 9 at 8"):
        reservation.write(8, b"123456789", True)
    assert reservation.write(7, b"123456789", True) == 0xE3069283  # RFC 3720, B.4
    assert reservation.write(7, b"123456789", False) is None
    assert reservation.crc32c(7, 9) == 0xE3069283
    with pytest.raises(ValueError, match="source must be contiguous"):
        reservation.write(0, memoryview(b"1234")[::2], True)
    with pytest.raises(ValueError, match="range must lie within"):
        reservation.crc32c((1 << 64) - 1, 2)
    reservation.publish()
    for call in (
        reservation.publish,
        reservation.abort,
        lambda: reservation.write(0, b"", True),
    ):
        with pytest.raises(ValueError, match="it was published or aborted"):
            call()


def test_reservation_that_is_dropped(producer: _C.ArenaProducer) -> None:
    reservation = producer.acquire(16, 0)
    assert producer.stats()["slots_writing"] == 1
    del reservation
    assert producer.stats()["slots_free"] == 8


def test_stale_says_why(producer: _C.ArenaProducer) -> None:
    reader = _C.ArenaConsumer(producer.address)
    first = producer.acquire(1, 0)
    key = (first.slot, first.generation)
    with pytest.raises(StaleRef, match="slot 0, generation 1 is not published yet"):
        reader.lease(*key)
    first.publish()
    reader.acknowledge(*key)
    with pytest.raises(StaleRef, match="slot 0, generation 1 was acknowledged already"):
        reader.acknowledge(*key)
    second = producer.acquire(1, 0)
    assert (second.slot, second.generation) == (0, 2)
    with pytest.raises(StaleRef, match="slot 0 holds generation 2, wanted generation 1"):
        reader.lease(*key)
    with pytest.raises(ValueError, match="slot must be below 8, got 8"):
        reader.lease(8, 1)


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_forked_child_has_no_part_in_it(producer: _C.ArenaProducer) -> None:
    """It neither releases what its parent holds nor may it use the arena."""
    reader = _C.ArenaConsumer(producer.address)
    reservation = producer.acquire(1, 0)
    reservation.publish()
    lease = reader.lease(reservation.slot, reservation.generation)
    pending = producer.acquire(1, 0)
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        said = []
        for call in (lambda: reader.lease(0, 1), producer.stats, lambda: producer.acquire(1, 0)):
            try:
                call()
            except ValueError as error:
                said.append(str(error))
        del lease, pending, reader, producer
        os.write(write_end, "\n".join(said).encode())
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    said = os.read(read_end, 4096).decode().splitlines()
    os.close(read_end)
    os.close(write_end)
    assert len(said) == 3 and all(re.search("got a forked child", line) for line in said)
    stats = producer.stats()
    assert (stats["slots_leased"], stats["slots_writing"], stats["num_readers"]) == (1, 1, 1)
    del lease
