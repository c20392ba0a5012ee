"""What users have today, each used as its users do: see `transfer_ways` for what a way is."""

from __future__ import annotations

import functools
import importlib
import itertools
import multiprocessing
import pickle
import secrets
import socket
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing
from safetensors.torch import load_file, save_file

from specforge_ext.records import Sample
from specforge_ext.store import mooncake
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


PER_TENSOR = "mooncake-per-tensor"
STEP_BYTES = 16 << 20
"""Mooncake refuses smaller segments."""


def master_link(shared: Shared) -> Ends:
    address = shared.master(PER_TENSOR).address
    return address, address


def connect_mooncake(master: str, segment_bytes: int) -> tuple[Any, Any]:
    package = mooncake.module("mooncake.store")
    client = package.MooncakeDistributedStore()
    code = client.setup(
        "127.0.0.1", mooncake.HANDSHAKE, segment_bytes, STEP_BYTES, "tcp", "", master
    )
    if code != 0:
        raise RuntimeError(f"Mooncake could not join {master}: error {code}")
    return client, package


class PerTensorProducer(Plain):
    """One object a tensor, its memory registered for the one call: SpecForge 0.2.0."""

    protocol = "tcp"

    def __init__(self, sample: Sample, links: list[str]) -> None:
        self._tensors = tensors_of(sample)
        nbytes = sum(t.nbytes for t in self._tensors.values())
        steps = -(-nbytes * len(links) // STEP_BYTES) + 1
        self._client, package = connect_mooncake(links[0], steps * STEP_BYTES)
        self._placement = package.ReplicateConfig()
        self._placement.replica_num = 1
        self._placement.with_hard_pin = True
        self._names = (f"peer/{self._client.get_hostname()}/{i}" for i in itertools.count())
        described = describe(self._tensors)
        self.handles = [(links[0], described) for _ in links]

    def deliver(self, consumer: int, tell: Tell) -> None:
        sample = next(self._names)
        for name, tensor in self._tensors.items():
            _register(self._client, tensor)
            code = self._client.put_from(
                f"{sample}/{name}", tensor.data_ptr(), tensor.nbytes, self._placement
            )
            self._client.unregister_buffer(tensor.data_ptr())
            if code != 0:
                raise RuntimeError(f"Mooncake could not put {name}: error {code}")
        tell(sample)

    def close(self) -> None:
        self._client.close()


class PerTensorConsumer(Plain):
    """Asks for each tensor, allocates and registers its memory, gets it, and takes that back."""

    def __init__(self, handle: tuple[str, Described], link: str) -> None:
        master, self._described = handle
        self._client, _ = connect_mooncake(master, 0)
        self._sample: str | None = None

    def receive(self, message: str) -> Tensors:
        self._sample = message
        return {name: self._get(f"{message}/{name}", *d) for name, d in self._described.items()}

    def _get(self, key: str, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        if self._client.is_exist(key) != 1:
            raise RuntimeError(f"Mooncake has no {key}")
        out = torch.empty(shape, dtype=dtype)
        _register(self._client, out)
        count = self._client.get_into(key, out.data_ptr(), out.nbytes)
        self._client.unregister_buffer(out.data_ptr())
        if count != out.nbytes:
            raise RuntimeError(f"Mooncake gave {count} of {out.nbytes} bytes of {key}")
        return out

    def release(self) -> None:
        for name in self._described:
            code = self._client.remove(f"{self._sample}/{name}", True)
            if code != 0:
                raise RuntimeError(f"Mooncake could not remove {name}: error {code}")

    def close(self) -> None:
        self._client.close()


def _register(client: Any, tensor: torch.Tensor) -> None:
    if (code := client.register_buffer(tensor.data_ptr(), tensor.nbytes)) != 0:
        raise RuntimeError(f"Mooncake refused to register {tensor.nbytes} bytes: error {code}")


def nixl_absent() -> str | None:
    try:
        importlib.import_module("nixl._api")
    except ImportError as error:
        return f"{error}; wanted pip install nixl"
    return None


class NixlMemory:
    """A NIXL agent over UCX, and tensors that it has registered once."""

    def __init__(self, tensors: Tensors) -> None:
        api = importlib.import_module("nixl._api")
        name = f"transfer-{secrets.token_hex(8)}"
        self.agent = api.nixl_agent(name, api.nixl_agent_config(backends=["UCX"]))
        self.spans = [(t.data_ptr(), t.nbytes, 0) for t in tensors.values()]
        named = [(*span, "") for span in self.spans]
        self._registered = self.agent.register_memory(named, "DRAM")

    def close(self) -> None:
        self.agent.deregister_memory(self._registered)


class NixlProducer(Plain):
    protocol = "ucx"

    def __init__(self, sample: Sample, links: list[Any]) -> None:
        tensors = tensors_of(sample)
        self._memory = NixlMemory(tensors)
        described = describe(tensors)
        handle = (self._memory.agent.get_agent_metadata(), self._memory.spans, described)
        self.handles = [handle for _ in links]

    def deliver(self, consumer: int, tell: Tell) -> None:
        tell(None)

    def close(self) -> None:
        self._memory.close()


class NixlConsumer(Plain):
    """Reads the producer's memory into its own, the same each time."""

    def __init__(
        self, handle: tuple[bytes, list[tuple[int, int, int]], Described], link: None
    ) -> None:
        metadata, spans, described = handle
        self._tensors = make_touched(described)
        self._memory = NixlMemory(self._tensors)
        agent = self._memory.agent
        self._peer = agent.add_remote_agent(metadata)
        self._here = agent.get_xfer_descs(self._memory.spans, "DRAM")
        self._there = agent.get_xfer_descs(spans, "DRAM")

    def receive(self, message: None) -> Tensors:
        agent = self._memory.agent
        request = agent.initialize_xfer("READ", self._here, self._there, self._peer)
        deadline = time.monotonic() + TIMEOUT_S
        state = agent.transfer(request)
        while state == "PROC" and time.monotonic() < deadline:
            state = agent.check_xfer_state(request)
        if state != "DONE":
            raise RuntimeError(f"nixl: wanted a read that is DONE, got {state}")
        agent.release_xfer_handle(request)
        return self._tensors

    def close(self) -> None:
        self._memory.close()


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
    Way(
        PER_TENSOR,
        PerTensorProducer,
        PerTensorConsumer,
        "each tensor: register, put_from, unregister | message | is_exist, allocate, register, "
        "get_into, unregister | read | free + remove",
        link=master_link,
        absent=mooncake.unavailable,
        master=PER_TENSOR,
    ),
    Way(
        "nixl-read",
        NixlProducer,
        NixlConsumer,
        "message | READ of the registered sample into registered memory | read",
        absent=nixl_absent,
    ),
)
