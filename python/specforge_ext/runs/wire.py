"""Messages between the processes of a run: a 4-byte length, then JSON, over a unix socket.

Only control travels here (requests, refs, progress); tensors lie in the store.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import struct
import time
from typing import Any

from specforge_ext.store.base import ProducerLost, TransferTimeout

MAX_MESSAGE_BYTES = 64 << 20
_HEADER = struct.Struct("<I")
Message = dict[str, Any]


class Connection:
    """One end. Not thread-safe for two senders or two receivers; one of each is fine."""

    def __init__(self, sock: socket.socket, peer: str) -> None:
        self._sock = sock
        self._peer = peer
        self._buffer = bytearray()

    def fileno(self) -> int:
        return self._sock.fileno()

    def send(self, message: Message) -> None:
        """ProducerLost if the peer is gone."""
        data = json.dumps(message, separators=(",", ":")).encode()
        try:
            self._sock.settimeout(60.0)
            self._sock.sendall(_HEADER.pack(len(data)) + data)
        except OSError as error:
            raise ProducerLost(f"cannot write to {self._peer}: {error}") from None

    def receive(self, *, timeout_s: float, what: str) -> Message:
        """The next message. TransferTimeout names `what` was waited for; ProducerLost at EOF."""
        deadline = time.monotonic() + timeout_s
        while (message := self._parse()) is None:
            left = deadline - time.monotonic()
            if left <= 0:
                raise TransferTimeout(f"{what} from {self._peer}", timeout_s)
            self._fill(left)
        return message

    def poll(self) -> list[Message]:
        """Every whole message that has arrived. ProducerLost at EOF."""
        self._fill(0.0)
        messages: list[Message] = []
        while (message := self._parse()) is not None:
            messages.append(message)
        return messages

    def close(self) -> None:
        """Any thread may; a `receive` that waits in another one ends with ProducerLost."""
        with contextlib.suppress(OSError):  # not connected any more, or closed before
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()

    def _fill(self, timeout_s: float) -> None:
        try:
            self._sock.settimeout(timeout_s)
            data = self._sock.recv(1 << 16)
        except (TimeoutError, BlockingIOError):
            return
        except OSError as error:
            raise ProducerLost(f"{self._peer}: {error}") from None
        if not data:
            raise ProducerLost(f"{self._peer} closed the connection")
        self._buffer += data

    def _parse(self) -> Message | None:
        if len(self._buffer) < _HEADER.size:
            return None
        (size,) = _HEADER.unpack_from(self._buffer)
        if size > MAX_MESSAGE_BYTES:
            raise ValueError(
                f"message of {size} bytes from {self._peer}, limit {MAX_MESSAGE_BYTES}"
            )
        end = _HEADER.size + size
        if len(self._buffer) < end:
            return None
        message = json.loads(bytes(self._buffer[_HEADER.size : end]))
        del self._buffer[:end]
        if not isinstance(message, dict) or not isinstance(message.get("op"), str):
            raise ValueError(f"message from {self._peer}: wanted an object with a key 'op'")
        return message


def listen(path: str) -> socket.socket:
    """A unix socket for this user alone."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.bind(path)
    os.chmod(path, 0o600)  # noqa: PTH101 - a socket, not a file of ours
    sock.listen(64)
    return sock


def accept(listener: socket.socket) -> Connection | None:
    """The next client; None (and closed) if it is another user's process."""
    sock, _ = listener.accept()
    credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    pid, uid, _ = struct.unpack("3i", credentials)
    if uid != os.getuid():
        sock.close()
        return None
    return Connection(sock, f"trainer process {pid}")


def connect(path: str, *, timeout_s: float) -> Connection:
    """Connect to a producer that may still be starting. TransferTimeout at the deadline."""
    deadline = time.monotonic() + timeout_s
    while True:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.connect(path)
            return Connection(sock, "the producer")
        except OSError:
            sock.close()
            if time.monotonic() > deadline:
                raise TransferTimeout(f"the producer's socket {path}", timeout_s) from None
            time.sleep(0.02)
