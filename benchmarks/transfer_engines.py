"""Network engines as peers: Mooncake as SpecForge 0.2.0 uses it, and NIXL."""

from __future__ import annotations

import importlib
import itertools
import secrets
import time
from typing import Any

import torch

from specforge_ext.records import Sample
from specforge_ext.store import mooncake
from transfer_peers import Described, Plain, describe, make_touched
from transfer_ways import TIMEOUT_S, Ends, Shared, Tell, Tensors, Way, tensors_of

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
        # Its thread would poll without a pause and take a core from every other way: both sides
        # poll while they deliver.
        config = api.nixl_agent_config(enable_prog_thread=False, backends=["UCX"])
        self.agent = api.nixl_agent(name, config)
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
        deadline = time.monotonic() + TIMEOUT_S
        while not self._memory.agent.get_new_notifs():  # makes progress on this side
            if time.monotonic() > deadline:
                raise TimeoutError(f"nixl: waited {TIMEOUT_S} s for the notice of a read")

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
        request = agent.initialize_xfer("READ", self._here, self._there, self._peer, b"read")
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


ENGINES = (
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
        "message | READ of the registered sample into registered memory, both sides poll | read",
        absent=nixl_absent,
    ),
)
