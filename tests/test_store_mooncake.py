"""What is the Mooncake stores' own: the protocol, the master's life, a peer that stands still."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from specforge_ext.config import parse
from specforge_ext.store import STORES, mooncake, mooncake_store
from specforge_ext.store import mooncake_objects as objects
from specforge_ext.store.base import ProducerLost, StoreError, TransferTimeout
from specforge_ext.store.mooncake_master import Master
from specforge_ext.store.mooncake_p2p import MooncakeP2PConfig, MooncakeP2PStore
from specforge_ext.store.mooncake_segment import OwnSegment
from specforge_ext.store.mooncake_store import MooncakeStoreConfig
from specforge_ext.store.mooncake_store_reader import MooncakeStoreReader
from specforge_ext.store.ref import ref_from_json, ref_to_json
from store_cases import LAYOUT_HASH, SLOWDOWN, TIMEOUT_S, make_sample, same_sample
from store_kinds import LINK, kill, receive, started
from store_kinds import OVER_MOONCAKE as KINDS


@pytest.fixture(autouse=True)
def _installed() -> None:
    if (reason := mooncake.unavailable()) is not None:
        pytest.skip(reason)


@pytest.mark.parametrize("kind", KINDS)
def test_rdma_without_a_device_is_refused(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By an empty folder, and by none; Mooncake itself would use TCP and report success."""
    store = STORES.get(kind)
    for folder in (tmp_path, tmp_path / "none"):
        monkeypatch.setattr(mooncake, "INFINIBAND", folder)
        with pytest.raises(StoreError, match=rf"protocol: wanted rdma, but {folder} has no device"):
            store.writer(store.Config(protocol="rdma", capacity_bytes=1 << 16))


@pytest.mark.parametrize("kind", KINDS)
def test_rdma_devices(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is not there, and ones without a port that is up."""
    for device, state in (("mlx5_0", "1: DOWN"), ("mlx5_1", "2: INIT"), ("mlx5_2", "4: ACTIVE")):
        (tmp_path / device / "ports/1").mkdir(parents=True)
        (tmp_path / device / "ports/1/state").write_text(f"{state}\n")
    monkeypatch.setattr(mooncake, "INFINIBAND", tmp_path)
    store = STORES.get(kind)
    for devices, message in (
        ("mlx5_2,mlx5_7", rf"store.devices: wanted mlx5_7, but {tmp_path} has mlx5_0, mlx5_1"),
        ("mlx5_0,mlx5_1", r"wanted rdma, but no port of mlx5_0, mlx5_1 is active"),
    ):
        config = store.Config(protocol="rdma", devices=devices, capacity_bytes=1 << 16)
        with pytest.raises(StoreError, match=message):
            store.writer(config)
    for devices in ("", "mlx5_2", "mlx5_0,mlx5_2"):
        mooncake.expect_protocol("rdma", devices)


@pytest.mark.parametrize("kind", KINDS)
def test_package_that_is_missing(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> Any:
        raise ImportError(f"No module named {name!r}")

    store = STORES.get(kind)
    monkeypatch.setattr(mooncake.importlib, "import_module", absent)
    assert "pip install '.[mooncake]'" in store.unavailable()
    config = {"master": "127.0.0.1:1"} if kind == "mooncake_store" else {}
    with pytest.raises(StoreError, match=r"not available: No module named .*; wanted pip install"):
        store.writer(store.Config(capacity_bytes=1 << 16, **config))


@pytest.mark.parametrize("kind", KINDS)
def test_rdma_when_tcp_is_forced(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MC_FORCE_TCP", "1")
    store = STORES.get(kind)
    with pytest.raises(StoreError, match=r"protocol: wanted rdma, but MC_FORCE_TCP is set"):
        store.writer(store.Config(protocol="rdma", capacity_bytes=1 << 16))


def test_the_protocol_of_engines_is_enforced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Left to themselves they use RDMA where there is a device. What users set stays set."""
    monkeypatch.delenv("MC_FORCE_TCP", raising=False)
    for protocol, wanted in (("tcp", True), ("rdma", False)):
        with mooncake.only(protocol):
            assert ("MC_FORCE_TCP" in os.environ) is wanted
        assert "MC_FORCE_TCP" not in os.environ
    monkeypatch.setenv("MC_FORCE_TCP", "1")
    with mooncake.only("tcp"):
        pass
    assert os.environ["MC_FORCE_TCP"] == "1"


def test_memory_that_mooncake_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over TCP it takes any, so that the refusal is ours; over RDMA: over_rdma.py."""
    limits = {mooncake.resource.RLIM_INFINITY: "none", 8 << 20: "8388608"}
    for nbytes, text in limits.items():
        monkeypatch.setattr(mooncake.resource, "getrlimit", lambda _, n=nbytes: (n, n))
        with pytest.raises(
            StoreError, match=rf"register 4096 bytes: error -5, memlock limit {text}$"
        ):
            mooncake.Pool(4096, lambda address, nbytes: -5)


def test_config() -> None:
    with pytest.raises(ValueError, match=r"store.master: .*pattern.*, got 'nowhere'"):
        parse(MooncakeStoreConfig, {"master": "nowhere"}, where="store")
    with pytest.raises(ValueError, match=r"store.protocol: .*'tcp' or 'rdma', got 'udp'"):
        parse(MooncakeP2PConfig, {"protocol": "udp"}, where="store")


@pytest.mark.parametrize("kind", KINDS)
def test_hostile_addresses(kind: str) -> None:
    for tail, message in (
        ("{}", r"address.protocol: required, but not given"),
        ("{1}", r"address: not valid JSON"),
    ):
        with pytest.raises(ValueError, match=message):
            STORES.get(kind).reader(f"{kind}:{'a' * 16}:{tail}")


def test_no_master() -> None:
    """Said in time: Mooncake itself tries for minutes."""
    with pytest.raises(StoreError, match=r"store.master: nobody listens at 127.0.0.1:1$"):
        STORES.get("mooncake_store").writer(
            MooncakeStoreConfig(master="127.0.0.1:1", capacity_bytes=1 << 16)
        )


def own_master(pipe: Connection) -> None:
    store = STORES.get("mooncake_store")
    writer = store.writer(MooncakeStoreConfig(capacity_bytes=1 << 16, **LINK))
    ref = writer.put(make_sample(1), layout_hash=LAYOUT_HASH, timeout_s=TIMEOUT_S)
    pipe.send((writer.address(), ref_to_json(ref), writer._master.pid))
    time.sleep(600)


def test_master_of_the_producer_ends_with_it() -> None:
    """Also by SIGKILL; readers say whose end it was, and do not wait."""
    with started(own_master) as (process, pipe):
        address, text, pid = receive(pipe)
        ref = ref_from_json(text)
        reader = MooncakeStoreReader(address)
        with reader.open(ref, layout_hash=LAYOUT_HASH, verify=True) as lease:
            assert same_sample(lease.sample, make_sample(1))
        kill(process)
    deadline = time.monotonic() + 10.0 * SLOWDOWN
    while Path(f"/proc/{pid}/cmdline").exists() and is_running(pid):
        assert time.monotonic() < deadline, f"mooncake_master {pid} still runs"
        time.sleep(0.02)
    began = time.monotonic()
    with pytest.raises(ProducerLost, match=r"sample 'sample-1': the producer of mooncake_store:"):
        reader.open(ref, layout_hash=LAYOUT_HASH, verify=True)
    with pytest.raises(ProducerLost, match=r"its master at 127.0.0.1:\d+ has ended"):
        MooncakeStoreReader(address)
    assert time.monotonic() - began < 10.0 * SLOWDOWN
    reader.close()
    reader.close()


class Unanswered:
    """An engine whose transfers never end."""

    def batch_transfer_async_read(self, *_: object) -> int:
        return 1

    def transfer_check_status(self, batch: int) -> int:
        return 0


def test_a_killed_producer_is_seen_while_a_read_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """So it goes over RDMA: nothing answers any more. One that lives is waited for."""
    with started(put_one, 60.0) as (process, pipe):
        address, text = receive(pipe)
        reader, ref = MooncakeP2PStore.reader(address), ref_from_json(text)
        reader.open(ref, layout_hash=LAYOUT_HASH, verify=True).release()
        assert not mooncake.has_ended(reader._at.peer)
        kill(process)
    began = time.monotonic()
    with monkeypatch.context() as unanswered:
        unanswered.setattr(reader, "_engine", Unanswered())
        with pytest.raises(
            ProducerLost, match=r"slot of sample 'sample-1': the producer at .* ended"
        ):
            reader.open(ref, layout_hash=LAYOUT_HASH, verify=True)
    assert time.monotonic() - began < 10.0 * SLOWDOWN
    assert len(reader._pool._quarantine) == 1
    reader.close()


def is_running(pid: int) -> bool:
    try:
        return ") Z" not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False


def test_master_that_cannot_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Master, "_start", start_with_a_bad_flag)
    with pytest.raises(StoreError, match=r"mooncake_master ended with code 1; its log ends:\n"):
        Master()


LATE = """
import http.server, socket, sys, threading, time
class Health(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
server = http.server.HTTPServer(("127.0.0.1", int(sys.argv[2])), Health)
threading.Thread(target=server.serve_forever, daemon=True).start()
time.sleep(1.0)
listener = socket.create_server(("127.0.0.1", int(sys.argv[1])))
time.sleep(600)
"""


def test_a_master_is_ready_when_it_listens_for_clients(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow one answers about its health well before."""

    def start(self: Master, port: int, metrics_port: int) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-S", "-c", LATE, str(port), str(metrics_port)])

    monkeypatch.setattr(Master, "_start", start)
    master = Master()
    reachable = mooncake.is_reachable(master.address, timeout_s=5.0)
    master.close()
    assert reachable


def start_with_a_bad_flag(self: Master, port: int, metrics_port: int) -> Any:
    return START(self, port, "nonsense")  # type: ignore[arg-type]


START = Master._start


def put_one(pipe: Connection, read_timeout_s: float) -> None:
    writer = MooncakeP2PStore.writer(
        MooncakeP2PConfig(capacity_bytes=1 << 20, read_timeout_s=read_timeout_s, **LINK)
    )
    ref = writer.put(make_sample(1, 200), layout_hash=LAYOUT_HASH, timeout_s=TIMEOUT_S)
    pipe.send((writer.address(), ref_to_json(ref)))
    time.sleep(600)


@pytest.fixture
def both() -> Iterator[tuple[Any, Any]]:
    store = STORES.get("mooncake_store")
    writer = store.writer(store.Config(capacity_bytes=1 << 20))
    reader = store.reader(writer.address())
    yield writer, reader
    reader.close()
    writer.close()


def test_a_sample_is_written_where_it_lies(
    both: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """In its own segment without a second copy; else through the registered pool, which is said."""
    writer, reader = both
    assert writer._segment.is_known
    copied: list[int] = []
    copies_from = writer._copies_from
    monkeypatch.setattr(writer, "_copies_from", lambda at: copied.append(at) or copies_from(at))
    sample = make_sample(1)
    for endpoint, num_copied in ((writer._segment._endpoint, 0), ("elsewhere:1", 1), (None, 2)):
        writer._segment._endpoint = endpoint
        ref = writer.put(sample, layout_hash=LAYOUT_HASH, timeout_s=TIMEOUT_S)
        assert len(copied) == num_copied
        with reader.open(ref, layout_hash=LAYOUT_HASH, verify=True) as lease:
            assert same_sample(lease.sample, sample)
        reader.ack(ref)
        assert writer.health().num_samples == 0


def test_a_sample_as_large_as_the_capacity_has_room() -> None:
    """Mooncake's allocator rounds 257 MiB up to 288: a segment of that and no more has no room."""
    store = STORES.get("mooncake_store")
    writer = store.writer(store.Config(capacity_bytes=257 << 20, pool_bytes=1 << 20))
    try:
        assert writer._reserve(writer._key(1), 257 << 20) == 0
    finally:
        writer.close()


def test_a_segment_is_believed_only_by_its_bytes(both: tuple[Any, Any]) -> None:
    """A descriptor's address may be that of another process, where nothing of ours may be
    written."""
    client = both[0]._client
    for key, probe in ((objects.alive_key(both[0]._epoch), b"x" * 16), ("nobody's", b"")):
        assert not OwnSegment(client, key, probe).is_known


def test_a_put_that_fails_half_way_leaves_nothing(
    both: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    writer, _ = both

    def fails(*args: object, **named: object) -> None:
        raise ValueError("planted")

    with monkeypatch.context() as patched, pytest.raises(ValueError, match="planted"):
        patched.setattr(mooncake_store.payload, "write_into", fails)
        writer.put(make_sample(1), layout_hash=LAYOUT_HASH, timeout_s=TIMEOUT_S)
    assert writer.health().num_samples == 0
    assert writer._client.is_exist(writer._key(1)) == 0


@pytest.fixture
def stopped() -> Iterator[tuple[Any, Any, int]]:
    """A reader, a ref and a producer that stands still."""
    with started(put_one, 1.0 * SLOWDOWN) as (process, pipe):
        address, text = receive(pipe)
        reader = MooncakeP2PStore.reader(address)
        ref = ref_from_json(text)
        reader.open(ref, layout_hash=LAYOUT_HASH, verify=True).release()
        assert process.pid is not None
        os.kill(process.pid, signal.SIGSTOP)
        yield reader, ref, process.pid
        reader.close()


def test_a_read_has_a_deadline(stopped: tuple[Any, Any, int]) -> None:
    """What it may still write to is not used again; afterwards all goes on."""
    reader, ref, pid = stopped
    with pytest.raises(
        TransferTimeout,
        match=rf"waited {SLOWDOWN:.0f}\.\d s for the slot of sample 'sample-1' at",
    ):
        reader.open(ref, layout_hash=LAYOUT_HASH, verify=True)
    assert len(reader._pool._quarantine) == 1
    os.kill(pid, signal.SIGCONT)
    deadline = time.monotonic() + TIMEOUT_S
    while True:
        try:
            with reader.open(ref, layout_hash=LAYOUT_HASH, verify=True) as lease:
                assert same_sample(lease.sample, make_sample(1, 200))
            break
        except TransferTimeout:
            assert time.monotonic() < deadline
    reader.ack(ref)
    assert reader._pool._quarantine == []
