"""The trainer's side of the producer: starting the process, and one rank's connection to it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specforge_ext.copies import copies_from
from specforge_ext.loader import Delivery, Skipped
from specforge_ext.records import ENCODINGS, Encoding
from specforge_ext.runs.wire import Connection, Message, connect
from specforge_ext.store.base import ProducerLost, TransferTimeout, UnknownEncoding
from specforge_ext.store.ref import ref_from_json

LOG_TAIL_BYTES = 2000
LAST_WORDS = "cannot go on: "
"""In the producer's log, before its reason to end."""
OBITUARY_S = 5.0
"""A process that closed its sockets may take a moment to end."""


class ProducerRefused(RuntimeError):
    """The producer cannot make what was asked for, and says why."""


class ProducerProcess:
    """A producer of this host, as a child: it ends when this object, or this process, does."""

    def __init__(self, recipe: dict[str, Any], *, num_threads: int, log_path: Path) -> None:
        self._directory = Path(tempfile.mkdtemp(prefix="specforge-"))
        self.socket_path = str(self._directory / "producer.sock")
        self.log_path = log_path
        log_path.parent.mkdir(parents=True, exist_ok=True)
        self._log_start = log_path.stat().st_size if log_path.exists() else 0
        environment = {**os.environ, "OMP_NUM_THREADS": str(num_threads)}
        with log_path.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "specforge_ext.runs.producer"],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env=environment,
            )
        start = {"recipe": recipe, "socket": self.socket_path, "num_threads": num_threads}
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(start).encode() + b"\n")
        self._process.stdin.flush()

    @property
    def pid(self) -> int:
        return self._process.pid

    def connect(self, *, timeout_s: float) -> ProducerLink:
        """Wait for the process to listen. ProducerLost if it ended before."""
        waited = 0.0
        while True:
            try:
                return ProducerLink(self.socket_path, timeout_s=1.0)
            except TransferTimeout:
                waited += 1.0
                if self._process.poll() is not None:
                    raise ProducerLost("the producer ended before it listened") from None
                if waited >= timeout_s:
                    raise TransferTimeout("the producer process to listen", timeout_s) from None

    def obituary(self) -> str:
        """How the process ended, and its last words or the end of what it logged."""
        try:
            end = f"ended with code {self._process.wait(timeout=OBITUARY_S)}"
        except subprocess.TimeoutExpired:
            end = "is still running"
        said = self.log_path.read_bytes()[self._log_start :].decode(errors="replace")
        _, last_words, reason = said.rpartition(LAST_WORDS)
        if last_words:
            return f"producer process {end}, log in {self.log_path}; {LAST_WORDS}{reason.strip()}"
        return f"producer process {end}; {self.log_path} ends:\n{said[-LOG_TAIL_BYTES:]}"

    def close(self) -> None:
        """Ask it to end by closing its input; kill it after 5 s."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it may be gone already
            self._process.stdin.close()
        try:
            self._process.wait(timeout=5.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(timeout=5.0)
        shutil.rmtree(self._directory, ignore_errors=True)


@dataclass(frozen=True)
class Hello:
    """A producer's store: where it is, and how features lie in it."""

    address: str
    capacity_bytes: int
    encoding: Encoding


class ProducerLink:
    """One rank's connection: implements the loader's FeatureLink."""

    def __init__(self, socket_path: str, *, timeout_s: float) -> None:
        self._connection: Connection = connect(socket_path, timeout_s=timeout_s)
        self._hello: Message | None = None
        self._open_steps: deque[int] = deque()

    def hello(self, *, layout_hash: str, timeout_s: float) -> Hello:
        """What the store is; ValueError if it is for another layout, UnknownEncoding."""
        if self._hello is None:
            self._hello = self._expect("hello", timeout_s=timeout_s, what="its first message")
        if self._hello["layout_hash"] != layout_hash:
            raise ValueError(
                f"the producer makes features of layout {self._hello['layout_hash']}, "
                f"this rank trains on {layout_hash}: engine and method disagree"
            )
        encoding = str(self._hello["encoding"])
        known = next((name for name in ENCODINGS if name == encoding), None)
        if known is None:
            raise UnknownEncoding("encoding of the producer's store", encoding)
        return Hello(str(self._hello["store"]), int(self._hello["capacity_bytes"]), known)

    def prepare(
        self, *, timeout_s: float, progress: Callable[[int, int, str], None]
    ) -> dict[str, str]:
        """Have the data set written, and where. timeout_s: deadline between signs of progress."""
        self._connection.send({"op": "prepare"})
        while True:
            message = self._expect(
                "progress", "prepared", timeout_s=timeout_s, what="the data set to be prepared"
            )
            if message["op"] == "prepared":
                files: dict[str, str] = message["files"]
                return files
            progress(int(message["done"]), int(message["total"]), str(message["what"]))

    def request(self, step: int, sample_ids: Sequence[str]) -> None:
        self._open_steps.append(step)
        self._connection.send({"op": "step", "step": step, "sample_ids": list(sample_ids)})

    def receive(self, *, timeout_s: float) -> Delivery:
        message = self._expect(
            "refs", timeout_s=timeout_s, what=f"the features of step {self._open_steps[0]}"
        )
        self._open_steps.popleft()
        return Delivery(
            step=int(message["step"]),
            refs=tuple(ref_from_json(text) for text in message["refs"]),
            skipped=tuple(Skipped(**item) for item in message["skipped"]),
            copied=copies_from(message["copied"]),
        )

    def close(self) -> None:
        self._connection.close()

    def _expect(self, *ops: str, timeout_s: float, what: str) -> Message:
        message = self._connection.receive(timeout_s=timeout_s, what=what)
        if message["op"] == "error":
            raise ProducerRefused(f"the producer refused: {message['text']}")
        if message["op"] not in ops:
            raise RuntimeError(f"the producer sent {message['op']!r} instead of {' or '.join(ops)}")
        return message
