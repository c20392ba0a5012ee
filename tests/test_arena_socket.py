"""An arena's descriptors over a unix socket: who is let in, and who is seen to end."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from specforge_ext import _C
from specforge_ext.store.base import ProducerLost, StaleRef, StoreError, TransferTimeout
from specforge_ext.store.shm import ShmConfig, ShmStore
from store_cases import LAYOUT_HASH, make_sample, same_sample

PAGE = 4096

READER = """
import os, sys, time
from specforge_ext import _C
reader = _C.ArenaConsumer(sys.argv[1])
lease = reader.lease(0, 1)
print(os.getpid(), bytes(lease).decode(), flush=True)
time.sleep(600)
"""

PRODUCER = """
import sys, time
from specforge_ext import _C
producer = _C.ArenaProducer(1 << 16, 4)
slot = producer.acquire(5, 0)
slot.write(0, b"hello", False)
slot.publish()
writing = producer.acquire(5, 0)
print(producer.serve(sys.argv[1]), flush=True)
time.sleep(600)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tmp_path.chmod(0o700)
    return tmp_path


@pytest.fixture
def producer() -> _C.ArenaProducer:
    return with_sample()


def with_sample() -> _C.ArenaProducer:
    producer = _C.ArenaProducer(1 << 16, 4)
    slot = producer.acquire(5, 0)
    slot.write(0, b"hello", False)
    slot.publish()
    return producer


def in_new_pid_namespace() -> list[str]:
    """`--kill-child`: the child goes with its parent, which is the one we can name."""
    command = [shutil.which("unshare") or "", "--pid", "--fork", "--kill-child"]
    if not command[0] or subprocess.run([*command, "true"], check=False).returncode:
        pytest.skip("no right to make a pid namespace here (unshare --pid)")
    return command


@contextmanager
def started(prefix: list[str], code: str, argument: str) -> Iterator[tuple[int, str]]:
    """The pid of the program itself and its first line."""
    command = [*prefix, sys.executable, "-c", code, argument]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline().strip()
            assert line, "the program ended without a line"
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            yield int(children[0]) if prefix else process.pid, line
        finally:
            process.kill()


def num_descriptors() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def wait_for_readers(producer: _C.ArenaProducer, num_readers: int) -> None:
    deadline = time.monotonic() + 20
    while producer.stats()["num_readers"] != num_readers:
        assert time.monotonic() < deadline, f"waited 20 s for {num_readers} readers"
        time.sleep(0.005)


def test_same_process(folder: Path) -> None:
    producer = with_sample()
    path = folder / "a:b.sock"
    address = producer.serve(str(path))
    assert address == f"shm:unix:{path}:{producer.epoch:016x}"
    assert path.stat().st_mode & 0o777 == 0o600
    readers = [_C.ArenaConsumer(address) for _ in range(16)]
    assert [bytes(reader.lease(0, 1)) for reader in readers] == [b"hello"] * 16
    assert producer.stats()["num_readers"] == 16
    assert producer.reap() == 0
    assert readers[0].producer_alive
    readers[0].acknowledge(0, 1)
    with pytest.raises(StaleRef):
        readers[1].lease(0, 1)
    del readers
    assert producer.stats()["num_readers"] == 0
    del producer
    assert not path.exists()


def test_readers_that_left_are_forgotten(producer: _C.ArenaProducer, folder: Path) -> None:
    """No descriptor of a reader that closed stays in the producer."""
    address = producer.serve(str(folder / "sock"))
    _C.ArenaConsumer(address)
    num_before = num_descriptors()
    for _ in range(50):
        _C.ArenaConsumer(address)
    deadline = time.monotonic() + 20
    while num_descriptors() > num_before:
        assert time.monotonic() < deadline, "waited 20 s for descriptors to be closed"
        time.sleep(0.005)


def test_reader_in_another_pid_namespace(producer: _C.ArenaProducer, folder: Path) -> None:
    """Its pid means nothing here, or another process; its death is seen all the same."""
    address = producer.serve(str(folder / "sock"))
    with started(in_new_pid_namespace(), READER, address) as (pid, line):
        assert line == "1 hello"
        assert producer.reap() == 0
        assert (producer.stats()["slots_leased"], producer.stats()["num_readers"]) == (1, 1)
        os.kill(pid, signal.SIGKILL)
        wait_for_readers(producer, 0)  # without reap(): the arena's own thread saw it
    assert producer.stats()["slots_ready"] == 1
    assert bytes(_C.ArenaConsumer(address).lease(0, 1)) == b"hello"


def test_proc_address_fails_in_another_pid_namespace(producer: _C.ArenaProducer) -> None:
    command = [*in_new_pid_namespace(), "--mount-proc", sys.executable, "-c", READER]
    done = subprocess.run(
        [*command, producer.address], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode != 0
    assert "ProducerLost" in done.stderr


def test_producer_in_another_pid_namespace(folder: Path) -> None:
    with started(in_new_pid_namespace(), PRODUCER, str(folder / "sock")) as (pid, address):
        reader = _C.ArenaConsumer(address)
        assert reader.producer_alive
        assert reader.reap() == 0
        os.kill(pid, signal.SIGKILL)
        deadline = time.monotonic() + 20
        while reader.producer_alive:
            assert time.monotonic() < deadline, "waited 20 s for the producer's end"
            time.sleep(0.005)
    assert reader.reap() == 1  # the slot it was writing
    assert reader.reap() == 0
    with pytest.raises(StaleRef, match="slot 1 holds generation 2, wanted generation 1"):
        reader.lease(1, 1)
    assert bytes(reader.lease(0, 1)) == b"hello"
    with pytest.raises(ProducerLost, match="nobody listens, its producer has ended or closed"):
        _C.ArenaConsumer(address)
    # What a killed producer left is replaced.
    path = str(folder / "sock")
    successor = _C.ArenaProducer(PAGE, 1)
    assert successor.serve(path) != address
    with pytest.raises(ProducerLost, match="closed it and opened another"):
        _C.ArenaConsumer(address)


@pytest.mark.parametrize("by_socket", [False, True])
def test_killed_reader_wakes_a_wait_at_once(
    producer: _C.ArenaProducer, folder: Path, by_socket: bool
) -> None:
    """Well below the 0.2 s after which a wait looks for itself, in the best of five."""
    waits = []
    for _ in range(5):
        producer = _C.ArenaProducer(PAGE, 1)
        slot = producer.acquire(5, 0)
        slot.write(0, b"hello", False)
        slot.publish()
        address = producer.serve(str(folder / f"{len(waits)}")) if by_socket else producer.address
        with started([], READER, address) as (pid, _):
            producer.discard(0, 1)
            killed_at = []

            def kill(pid: int = pid, killed_at: list[float] = killed_at) -> None:
                killed_at.append(time.monotonic())
                os.kill(pid, signal.SIGKILL)

            timer = threading.Timer(0.3, kill)
            timer.start()
            producer.acquire(1, 60).abort()
            waits.append(time.monotonic() - killed_at[0])
            timer.join()
        if min(waits) < 0.05:
            break
    assert min(waits) < 0.05, waits


def test_another_user(producer: _C.ArenaProducer, folder: Path) -> None:
    """The directory keeps it out; with the directory wide open, the socket knows who knocks."""
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    path = folder / "sock"
    address = producer.serve(str(path))
    assert "Permission denied" in attach_as(1, address)
    for entry in (path, *folder.parents[:3], folder):
        entry.chmod(0o777)
    assert f"{path} must belong to user 1, got user 0" in attach_as(1, address)
    assert said_as(1, lambda: knock(path)) == "0 bytes, 0 descriptors"
    assert said_as(0, lambda: knock(path)) == "24 bytes, 2 descriptors"
    assert attach_as(0, address) == "attached"
    assert producer.stats()["num_readers"] == 0


def attach_as(uid: int, address: str) -> str:
    def attach() -> str:
        _C.ArenaConsumer(address)
        return "attached"

    return said_as(uid, attach)


def knock(path: Path) -> str:
    """As a reader that does not care whose arena it is."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.settimeout(20)
        connection.connect(str(path))
        process = os.pidfd_open(os.getpid())
        try:
            socket.send_fds(connection, [b"SFADOOR1"], [process])
            reply, fds, _, _ = socket.recv_fds(connection, 100, 4)
        except (ConnectionResetError, BrokenPipeError):
            reply, fds = b"", []
        return f"{len(reply)} bytes, {len(fds)} descriptors"


def said_as(uid: int, call: Callable[[], str]) -> str:
    """What a child of that user returns or raises."""
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setuid(uid)
            said = call()
        except (ValueError, RuntimeError) as error:
            said = str(error)
        os.write(write_end, said.encode())
        os._exit(0)
    os.close(write_end)
    with os.fdopen(read_end, "rb") as pipe:
        said = pipe.read().decode()
    os.waitpid(child, 0)
    return said


def test_directory_must_be_private(producer: _C.ArenaProducer, folder: Path) -> None:
    folder.chmod(0o750)
    with pytest.raises(ValueError, match=r"must be 0700 and of user \d+, got 0750 of user"):
        producer.serve(str(folder / "sock"))
    with pytest.raises(RuntimeError, match=r"stat .*: No such file or directory"):
        producer.serve(str(folder / "none/sock"))


def test_path_must_be_free(producer: _C.ArenaProducer, folder: Path) -> None:
    (folder / "file").write_text("mine")
    with pytest.raises(ValueError, match="must be free for a socket, got one in use or a file"):
        producer.serve(str(folder / "file"))
    assert (folder / "file").read_text() == "mine"
    producer.serve(str(folder / "sock"))
    with pytest.raises(ValueError, match=r"must be served at one path, it is at .*sock, got"):
        producer.serve(str(folder / "other"))
    with pytest.raises(ValueError, match="got one in use or a file"):
        _C.ArenaProducer(PAGE, 1).serve(str(folder / "sock"))
    with pytest.raises(ValueError, match=r"path of a socket must have 1\.\.107 bytes, got 200"):
        _C.ArenaProducer(PAGE, 1).serve("x" * 200)


@pytest.mark.parametrize(
    "address",
    ["shm:unix:", "shm:unix::00000000000000aa", "shm:unix:p:aa", "shm:unix:p:" + "0" * 16],
)
def test_address_must_be_exact(address: str) -> None:
    with pytest.raises(ValueError, match="address must be shm:unix:PATH:EPOCH, got"):
        _C.ArenaConsumer(address)


@pytest.mark.parametrize("said", [b"", b"x", b"x" * 8, b"x" * 32, b"x" * 100])
def test_socket_of_something_else(folder: Path, said: bytes) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(folder / "sock"))
        listener.listen()

        def answer() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.send(said)

        thread = threading.Thread(target=answer)
        thread.start()
        error = ValueError if said else ProducerLost
        with pytest.raises(error, match=r"must be the socket of an arena|its producer hung up"):
            _C.ArenaConsumer(f"shm:unix:{folder}/sock:{'1' * 16}")
        thread.join(20)


def test_guests_that_say_nothing_are_shown_out(producer: _C.ArenaProducer, folder: Path) -> None:
    address = producer.serve(str(folder / "sock"))
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as silent:
        silent.connect(str(folder / "sock"))
        assert bytes(_C.ArenaConsumer(address).lease(0, 1)) == b"hello"  # a second later
        silent.settimeout(20)
        assert silent.recv(1) == b""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as wrong:
        wrong.connect(str(folder / "sock"))
        wrong.send(b"GET / HTTP/1.1")
        wrong.settimeout(20)
        assert wrong.recv(1) == b""


def test_wait_of_a_served_arena_still_ends(producer: _C.ArenaProducer, folder: Path) -> None:
    producer.serve(str(folder / "sock"))
    held = producer.acquire((1 << 16) - PAGE, 0)
    with pytest.raises(TransferTimeout):
        producer.acquire(PAGE, 0.1)
    held.abort()


def test_store_at_a_socket(folder: Path) -> None:
    config = ShmConfig(
        capacity_bytes=1 << 17, high_watermark=0.9, low_watermark=0.5, socket_path=f"{folder}/sock"
    )
    writer = ShmStore.writer(config)
    assert writer.address().startswith(f"shm:unix:{folder}/sock:")
    ref = writer.put(make_sample(3), layout_hash=LAYOUT_HASH, timeout_s=0)
    reader = ShmStore.reader(writer.address())
    with reader.open(ref, layout_hash=LAYOUT_HASH, verify=True) as lease:
        assert same_sample(lease.sample, make_sample(3))
    reader.ack(ref)
    writer.close()
    with pytest.raises(StoreError, match="wanted an open arena, but it was closed"):
        writer.address()
