"""Control messages: framing, deadlines, a lost peer, hostile lengths."""

from __future__ import annotations

import socket
import struct
import threading
import time

import pytest

from specforge_ext.runs.wire import Connection, accept, connect, listen
from specforge_ext.store.base import ProducerLost, TransferTimeout


def _pair() -> tuple[Connection, socket.socket]:
    left, right = socket.socketpair()
    return Connection(left, "the peer"), right


def test_round_trip_in_pieces() -> None:
    connection, raw = _pair()
    data = b'{"op":"a","n":1}'
    frame = struct.pack("<I", len(data)) + data
    for byte in (frame + frame)[:-1]:
        raw.send(bytes([byte]))
    assert connection.receive(timeout_s=1, what="a") == {"op": "a", "n": 1}
    assert connection.poll() == []
    raw.send(frame[-1:])
    assert connection.poll() == [{"op": "a", "n": 1}]


def test_deadline_names_what_was_waited_for() -> None:
    connection, _raw = _pair()
    start = time.monotonic()
    with pytest.raises(TransferTimeout, match=r"waited 0\.1 s for step 7 from the peer"):
        connection.receive(timeout_s=0.1, what="step 7")
    assert time.monotonic() - start < 2


def test_lost_peer() -> None:
    connection, raw = _pair()
    raw.close()
    with pytest.raises(ProducerLost, match="the peer closed the connection"):
        connection.receive(timeout_s=5, what="anything")


def test_hostile_frames() -> None:
    connection, raw = _pair()
    raw.send(struct.pack("<I", 1 << 31))
    with pytest.raises(ValueError, match=r"message of 2147483648 bytes"):
        connection.receive(timeout_s=1, what="x")
    connection, raw = _pair()
    raw.send(struct.pack("<I", 2) + b"[]")
    with pytest.raises(ValueError, match="wanted an object with a key 'op'"):
        connection.receive(timeout_s=1, what="x")


def test_connect_waits_for_the_listener(tmp_path: object) -> None:
    path = f"{tmp_path}/s"
    with pytest.raises(TransferTimeout, match="producer's socket"):
        connect(path, timeout_s=0.1)
    opened: list[socket.socket] = []
    threading.Timer(0.2, lambda: opened.append(listen(path))).start()
    client = connect(path, timeout_s=5)
    server = accept(opened[0])
    assert server is not None
    client.send({"op": "hello"})
    assert server.receive(timeout_s=1, what="hello") == {"op": "hello"}
