"""The producer process: owns the engine and the store, prepares the data, answers for features.

`python -m specforge_ext.runs.producer` reads a JSON line from standard input (recipe, threads, path
of a socket in a directory of its own) and serves until its parent closes that pipe, or dies.

What a rank gets for a step is computed from that rank's share of the step alone, so that the bits
do not depend on what else was asked, or on how often the run was interrupted.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import json
import logging
import os
import selectors
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from specforge_ext.copies import copied, counting
from specforge_ext.engines import ENGINES, Engine
from specforge_ext.records import Encoding, FeatureLayout, Prompt, Sample, SampleRef
from specforge_ext.runs import data as run_data
from specforge_ext.runs import failure
from specforge_ext.runs.drafts import feature_union
from specforge_ext.runs.link import LAST_WORDS
from specforge_ext.runs.recipe import Recipe, build
from specforge_ext.runs.wire import Connection, Message, accept, listen
from specforge_ext.store import STORES
from specforge_ext.store.base import ProducerLost, StoreConfig, StoreError, StoreWriter
from specforge_ext.store.ref import ref_to_json
from specforge_ext.store.reserving import Reservations, reserving

log = logging.getLogger("specforge_ext.producer")

GRACE_S = 2.0
"""From the end of the parent to the end of work that is under way; `ProducerProcess.close` waits
longer."""


@dataclass(order=True)
class Request:
    """One rank's share of one step; the lowest step is answered first."""

    step: int
    order: int
    sample_ids: tuple[str, ...] = field(compare=False)
    client: Connection = field(compare=False)


class Producer:
    """Single-threaded: reads what clients ask, computes one request at a time."""

    def __init__(self, recipe: Recipe, listener: socket.socket, parent_fd: int) -> None:
        self._recipe = recipe
        self._listener = listener
        self._parent_fd = parent_fd
        self._selector = selectors.DefaultSelector()
        self._selector.register(listener, selectors.EVENT_READ)
        self._selector.register(parent_fd, selectors.EVENT_READ)
        self._clients: list[Connection] = []
        self._queue: list[Request] = []
        self._order = itertools.count()
        self._prompts: dict[str, Prompt] = {}
        self._done = False
        kind, config = recipe.engine
        self._engine: Engine = ENGINES.get(kind).open(config)
        self._layout: FeatureLayout = feature_union(recipe, self._engine.spec).layout
        store_kind, store_config = recipe.store
        self._writer = _open_store(store_kind, store_config)
        self._encoding: Encoding = store_config.encoding
        self._reserving = reserving(self._writer)
        log.info(
            "store: %s, encoding %s, samples are %s",
            self._writer.capabilities().describe(),
            self._encoding,
            "put" if self._reserving is None else "written in place",
        )

    def serve(self) -> None:
        while not self._done:
            self._read(block=not self._queue)
            if self._queue and not self._done:
                self._answer(heapq.heappop(self._queue))
        self._writer.close()

    def _read(self, *, block: bool) -> None:
        for key, _ in self._selector.select(None if block else 0.0):
            if key.fd == self._parent_fd:
                # The parent never writes: readable means that it closed its end, or died.
                self._done = True
            elif key.data is None:
                self._welcome()
            else:
                self._hear(key.data)

    def _welcome(self) -> None:
        client = accept(self._listener)
        if client is None:
            log.warning("refused a client of another user")
            return
        self._clients.append(client)
        self._selector.register(client, selectors.EVENT_READ, data=client)
        self._tell(
            client,
            {
                "op": "hello",
                "store": self._writer.address(),
                "capacity_bytes": self._writer.capacity_bytes,
                "layout_hash": self._layout.hash,
                "encoding": self._encoding,
            },
        )

    def _hear(self, client: Connection) -> None:
        if client not in self._clients:
            return  # it left while an earlier event was handled
        try:
            messages = client.poll()
        except ProducerLost as error:
            self._forget(client, error)
            return
        for message in messages:
            self._handle(client, message)

    def _tell(self, client: Connection, message: Message) -> None:
        """To a client that may have left: the other ranks find out by themselves."""
        try:
            client.send(message)
        except ProducerLost as error:
            self._forget(client, error)

    def _forget(self, client: Connection, error: ProducerLost) -> None:
        if client not in self._clients:
            return
        log.info("a client left: %s", error)
        self._clients.remove(client)
        self._selector.unregister(client)
        client.close()
        self._queue = [r for r in self._queue if r.client is not client]
        heapq.heapify(self._queue)

    def _handle(self, client: Connection, message: Message) -> None:
        if message["op"] == "prepare":
            self._prepare(client)
        elif message["op"] == "step":
            ids = tuple(message["sample_ids"])
            heapq.heappush(
                self._queue, Request(int(message["step"]), next(self._order), ids, client)
            )
        elif message["op"] == "stop":
            self._done = True
        else:
            raise ValueError(f"unknown request {message['op']!r}")

    def _prepare(self, client: Connection) -> None:
        """Write the data set if it is not there yet, with signs of progress to all clients."""
        threads = torch.get_num_threads()
        torch.set_num_threads(os.cpu_count() or 1)  # every rank waits for this
        try:
            files = run_data.prepare(
                self._recipe.data,
                self._engine,
                directory=self._recipe.output_dir / "data",
                seed=self._recipe.run.seed,
                progress=self._progress,
            )
        except ValueError as error:
            self._tell(client, {"op": "error", "text": str(error)})
            return
        finally:
            torch.set_num_threads(threads)
        self._prompts = {p.sample_id: p for p in run_data.read_dataset(files).train}
        self._tell(client, {"op": "prepared", "files": files})

    def _progress(self, done: int, total: int, what: str) -> None:
        """Every rank waits for the data, so that each has to see that it comes."""
        for key, _ in self._selector.select(0.0):
            if key.fileobj is self._listener:
                self._welcome()
        for client in list(self._clients):
            self._tell(client, {"op": "progress", "done": done, "total": total, "what": what})

    def _answer(self, request: Request) -> None:
        try:
            message = self._store_features(request)
        except (StoreError, ValueError) as error:  # a full store, a prompt that the target refuses
            message = {"op": "error", "text": f"step {request.step}: {error}"}
        self._tell(request.client, message)

    def _store_features(self, request: Request) -> Message:
        missing = [i for i in request.sample_ids if i not in self._prompts]
        if missing:
            raise ValueError(f"step {request.step}: no prompt with sample_id {missing[0]!r}")
        prompts = [self._prompts[i] for i in request.sample_ids]
        with counting() as copies:
            refs, skipped = self._write(prompts) if self._reserving else self._put(prompts)
        return {
            "op": "refs",
            "step": request.step,
            "refs": [ref_to_json(ref) for ref in refs],
            "skipped": skipped,
            "copied": copies,
        }

    def _write(self, prompts: list[Prompt]) -> tuple[list[SampleRef], list[dict[str, str]]]:
        """The engine writes into the store's memory: refs, and what must not be trained on."""
        assert self._reserving is not None
        refs, skipped = [], []
        timeout_s = self._recipe.stream.timeout_s
        with Reservations(self._reserving, prompts, self._layout, timeout_s=timeout_s) as room:
            for sample in self._engine.features(prompts, self._layout, into=room.views):
                if (reason := unfit(sample)) is not None:
                    room.abort(sample.prompt)
                    skipped.append({"sample_id": sample.prompt.sample_id, "reason": reason})
                else:
                    refs.append(room.publish(sample))
        return refs, skipped

    def _put(self, prompts: list[Prompt]) -> tuple[list[SampleRef], list[dict[str, str]]]:
        """As `_write`, for stores that have to copy: the engine writes into memory of its own."""
        refs: list[SampleRef] = []
        skipped = []
        try:
            for sample in self._engine.features(prompts, self._layout):
                if (reason := unfit(sample)) is not None:
                    skipped.append({"sample_id": sample.prompt.sample_id, "reason": reason})
                else:
                    refs.append(self._put_one(sample))
        except BaseException:
            for ref in refs:  # nobody will hear of them
                self._writer.abort(ref)
            raise
        return refs, skipped

    def _put_one(self, sample: Sample) -> SampleRef:
        if not self._writer.capabilities().on_gpu:
            features = {name: on_host(t) for name, t in sample.features.items()}
            sample = Sample(sample.prompt, features)
        return self._writer.put(
            sample,
            layout_hash=self._layout.hash,
            timeout_s=self._recipe.stream.timeout_s,
            layers=self._layout.layers,
        )


def _open_store(kind: str, config: StoreConfig) -> StoreWriter:
    """StoreError also for what the machine refuses, such as memory."""
    try:
        writer: StoreWriter = STORES.get(kind).writer(config)
    except StoreError:
        raise
    except RuntimeError as error:
        raise StoreError(f"store.kind {kind}: {error}") from error
    return writer


def on_host(feature: Tensor) -> Tensor:
    if feature.device.type != "cpu":
        copied("engine", feature.nbytes)
    return feature.cpu()


def unfit(sample: Sample) -> str | None:
    """Why a sample must not be trained on, or None."""
    for name, tensor in sample.features.items():
        if tensor.shape[0] != len(sample.prompt):
            return f"{name} has {tensor.shape[0]} rows for {len(sample.prompt)} tokens"
        if not all_finite(tensor):
            return f"{name} holds values that are not finite"
    return None


def all_finite(tensor: Tensor) -> bool:
    """A sum is finite only if all its terms are, and on the CPU takes a twentieth of the time of
    looking at each. It may overflow, so that no is said by looking at each."""
    wide = torch.float32 if tensor.dtype == torch.float16 else None
    total = tensor.sum(dtype=wide)
    return bool(torch.isfinite(total)) or bool(torch.isfinite(tensor).all())


def end_with_parent(parent_fd: int, clean_up: Callable[[], None]) -> None:
    """For a thread: ends this process GRACE_S after the parent, whatever it is doing then."""
    os.read(parent_fd, 1)  # nothing is written: it returns when the other end is closed
    time.sleep(GRACE_S)
    log.warning("the trainer is gone; ended in the middle of work")
    clean_up()
    os._exit(1)


def remove_socket(path: Path) -> None:
    """With its directory, which is this process's own. What the parent has removed is gone."""
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)
        path.parent.rmdir()


def outlive(number: int, _frame: FrameType | None) -> None:
    """A job's signals reach every process; the trainer saves on them, for which it needs data."""
    log.info("signal %d: this process ends when the trainer does", number)


def main() -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, outlive)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    start: dict[str, Any] = json.loads(sys.stdin.buffer.readline())
    torch.set_num_threads(int(start["num_threads"]))
    recipe = build(start["recipe"])
    parent_fd = sys.stdin.fileno()
    clean_up = partial(remove_socket, Path(start["socket"]))
    threading.Thread(target=end_with_parent, args=(parent_fd, clean_up), daemon=True).start()
    code = 0
    try:
        with listen(start["socket"]) as listener:
            Producer(recipe, listener, parent_fd).serve()
    except failure.EXPECTED as error:
        log.exception("ended by an error")
        log.error("%s%s", LAST_WORDS, failure.sentence(error))
        code = 1
    finally:
        clean_up()
    # Engines may leave threads of their own; the work is done.
    sys.stdout.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
