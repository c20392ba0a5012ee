"""What users have today, each used as its users do: see `transfer_ways` for what a way is."""

from __future__ import annotations

import functools
import itertools
import multiprocessing
import pickle
import socket
import tempfile
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing
from safetensors.torch import load_file, save_file

from specforge_ext.records import Sample
from transfer_ways import TIMEOUT_S, TMPFS, Ends, Shared, Tell, Tensors, Way, tensors_of


class Plain:
    """A producer or consumer that has nothing to do before, after and at the end."""

    def prepare(self) -> None:
        pass

    def recover(self) -> None:
        pass

    def release(self) -> None:
        pass

    def close(self) -> None:
        pass


Described = dict[str, tuple[torch.Size, torch.dtype]]


def describe(tensors: Tensors) -> Described:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}


def make_touched(described: Described) -> Tensors:
    return {n: torch.full(shape, 1, dtype=dtype) for n, (shape, dtype) in described.items()}


class FileProducer(Plain):
    """A new file for each sample in a memory file system: vLLM's connector, or torch.save."""

    protocol = "file"

    def __init__(
        self, sample: Sample, links: list[Any], *, save: Callable[[Tensors, str], None]
    ) -> None:
        self._tensors = tensors_of(sample)
        self._save = save
        self._folder = tempfile.TemporaryDirectory(dir=TMPFS)
        self._paths = (f"{self._folder.name}/{i}" for i in itertools.count())
        self.handles = [None for _ in links]

    def deliver(self, consumer: int, tell: Tell) -> None:
        path = next(self._paths)
        self._save(self._tensors, path)
        tell(path)

    def close(self) -> None:
        self._folder.cleanup()


class FileConsumer(Plain):
    """Loads the file, and removes it: nobody else does."""

    load: Callable[[str], Tensors]

    def __init__(self, handle: None, link: None) -> None:
        self._path: str | None = None

    def receive(self, message: str) -> Tensors:
        self._path = message
        return type(self).load(message)

    def release(self) -> None:
        if self._path is not None:
            Path(self._path).unlink()
            self._path = None


class SafetensorsConsumer(FileConsumer):
    load = staticmethod(load_file)


class TorchLoadConsumer(FileConsumer):
    @staticmethod
    def load(path: str) -> Tensors:
        tensors: Tensors = torch.load(path, weights_only=True)
        return tensors


def queue_link(shared: Shared) -> Ends:
    queue = torch.multiprocessing.get_context("spawn").Queue()
    return queue, queue


class QueueProducer(Plain):
    """torch moves each tensor into shared memory of its own, and sends the descriptor."""

    protocol = "memory"

    def __init__(self, sample: Sample, links: list[Any]) -> None:
        self._tensors = tensors_of(sample)
        self._queues = links
        self._fresh: list[Tensors] = []
        self.handles = [None for _ in links]

    def prepare(self) -> None:
        # Without new tensors the memory that an earlier round moved there would be used again.
        copies = [{n: t.clone() for n, t in self._tensors.items()} for _ in self._queues]
        self._fresh = copies

    def deliver(self, consumer: int, tell: Tell) -> None:
        self._queues[consumer].put(self._fresh[consumer])
        tell(None)

    def recover(self) -> None:
        self._fresh = []


class QueueConsumer(Plain):
    def __init__(self, handle: None, link: Any) -> None:
        self._queue = link

    def receive(self, message: None) -> Tensors:
        tensors: Tensors = self._queue.get(timeout=TIMEOUT_S)
        return tensors


def pipe_link(shared: Shared) -> Ends:
    theirs, ours = multiprocessing.get_context("spawn").Pipe(duplex=False)
    return ours, theirs


class PipeProducer(Plain):
    """Pickled with their bytes: the pickler of multiprocessing would send descriptors instead."""

    protocol = "pipe"

    def __init__(self, sample: Sample, links: list[Connection]) -> None:
        self._tensors = tensors_of(sample)
        self._pipes = links
        self.handles = [None for _ in links]

    def deliver(self, consumer: int, tell: Tell) -> None:
        tell(None)
        self._pipes[consumer].send_bytes(pickle.dumps(self._tensors, pickle.HIGHEST_PROTOCOL))


class PipeConsumer(Plain):
    def __init__(self, handle: None, link: Connection) -> None:
        self._pipe = link

    def receive(self, message: None) -> Tensors:
        tensors: Tensors = pickle.loads(self._pipe.recv_bytes())
        return tensors


def tcp_link(shared: Shared) -> Ends:
    with socket.create_server(("127.0.0.1", 0)) as server:
        theirs = socket.create_connection(server.getsockname(), timeout=TIMEOUT_S)
        theirs.settimeout(None)  # the coordinator has the deadline
        ours, _ = server.accept()
    return ours, theirs


class TcpProducer(Plain):
    protocol = "tcp"

    def __init__(self, sample: Sample, links: list[socket.socket]) -> None:
        self._tensors = tensors_of(sample)
        self._sockets = links
        described = describe(self._tensors)
        self.handles = [described for _ in links]

    def deliver(self, consumer: int, tell: Tell) -> None:
        tell(None)
        for tensor in self._tensors.values():
            self._sockets[consumer].sendall(_memory(tensor))


class TcpConsumer(Plain):
    """Into the same touched memory each time."""

    def __init__(self, handle: Described, link: socket.socket) -> None:
        self._socket = link
        self._tensors = make_touched(handle)

    def receive(self, message: None) -> Tensors:
        for tensor in self._tensors.values():
            left = _memory(tensor)
            while left:
                count = self._socket.recv_into(left)
                if count == 0:
                    raise ConnectionError("tcp: the producer has ended within a sample")
                left = left[count:]
        return self._tensors


def _memory(tensor: torch.Tensor) -> memoryview:
    return tensor.reshape(-1).view(torch.uint8).numpy().data


PEERS = (
    Way(
        "safetensors-file",
        functools.partial(FileProducer, save=save_file),
        SafetensorsConsumer,
        "save_file in /dev/shm | message | load_file | read | free + unlink",
    ),
    Way(
        "torch-save-file",
        functools.partial(FileProducer, save=torch.save),
        TorchLoadConsumer,
        "torch.save in /dev/shm | message | torch.load | read | free + unlink",
    ),
    Way(
        "torch-multiprocessing",
        QueueProducer,
        QueueConsumer,
        "Queue.put: copy into new shared memory | Queue.get: map | read | free",
        link=queue_link,
    ),
    Way(
        "pickled-pipe",
        PipeProducer,
        PipeConsumer,
        "message | pickle, send | receive, unpickle | read | free",
        link=pipe_link,
    ),
    Way(
        "tcp-loopback",
        TcpProducer,
        TcpConsumer,
        "message | sendall | recv_into touched memory | read",
        link=tcp_link,
    ),
)
