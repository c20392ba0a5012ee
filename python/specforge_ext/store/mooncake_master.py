"""A Mooncake master of one run: a child that ends with its parent, however that ends."""

from __future__ import annotations

import http.client
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from specforge_ext.store import mooncake
from specforge_ext.store.base import StoreError, TransferTimeout

READY_S = 20.0
ATTEMPTS = 3
"""A port that was free may be taken before the master binds it."""

# The kernel sends SIGKILL when the parent's thread ends. Set between fork and exec by a process of
# its own, for code in a forked child of a process with threads may deadlock.
_BOUND_TO_PARENT = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL)
if os.getppid() != int(sys.argv[1]):
    sys.exit(1)
os.execv(sys.argv[2], sys.argv[2:])
"""


class Master:
    """Listens on loopback; its port for metrics binds every interface, whatever it is told.

    StoreError with the end of its log if it ends by itself; TransferTimeout if it is not ready in
    20 s. Start it in a thread that lives as long as it is needed: the kernel ends it with that.
    """

    def __init__(self) -> None:
        for attempt in range(ATTEMPTS):
            port, metrics_port = _free_ports(2)
            self.address = f"127.0.0.1:{port}"
            self._log = tempfile.TemporaryFile()  # noqa: SIM115 - as long as the process
            self._process = self._start(port, metrics_port)
            try:
                self._wait(metrics_port)
                return
            except StoreError:
                self.close()
                if attempt + 1 == ATTEMPTS:
                    raise

    @property
    def pid(self) -> int:
        return self._process.pid

    def close(self) -> None:
        """Its objects are gone with it."""
        self._process.kill()
        self._process.wait(timeout=10.0)
        self._log.close()

    def _start(self, port: int, metrics_port: int) -> subprocess.Popen[bytes]:
        package = Path(str(mooncake.module("mooncake").__file__)).parent
        command = [
            *(str(package / "mooncake_master"), "--rpc_address=127.0.0.1", f"--rpc_port={port}"),
            *(f"--metrics_port={metrics_port}", "--enable_http_metadata_server=false"),
        ]
        return subprocess.Popen(
            [sys.executable, "-S", "-c", _BOUND_TO_PARENT, str(os.getpid()), *command],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
        )

    def _wait(self, metrics_port: int) -> None:
        deadline = time.monotonic() + READY_S
        # Its metrics are up before it listens for clients.
        while not (
            _is_healthy(metrics_port) and mooncake.is_reachable(self.address, timeout_s=1.0)
        ):
            if self._process.poll() is not None:
                raise StoreError(
                    f"mooncake_master ended with code {self._process.returncode}; its log ends:\n"
                    f"{self._log_tail()}"
                )
            if time.monotonic() > deadline:
                raise TransferTimeout("mooncake_master to be ready", READY_S)
            time.sleep(0.02)

    def _log_tail(self) -> str:
        self._log.seek(0)
        return self._log.read()[-2000:].decode(errors="replace")


def _is_healthy(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=1.0)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _free_ports(count: int) -> list[int]:
    socks = [socket.socket() for _ in range(count)]
    for sock in socks:
        sock.bind(("127.0.0.1", 0))
    ports = [sock.getsockname()[1] for sock in socks]
    for sock in socks:
        sock.close()
    return ports
