"""The process group: joined from torchrun's environment, left cleanly, every wait with a deadline.

Small exchanges (sums of a step, objects) travel over gloo on the host, also beside NCCL: they have
to reach the host anyway, and gloo answers a dead peer with an exception where NCCL aborts the
process after the deadline.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import HashStore, PrefixStore
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.rendezvous import rendezvous

TORCHRUN_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


class CollectiveError(RuntimeError):
    """An exchange between ranks failed or had no answer in time: a rank died, or is stuck."""


@dataclass(frozen=True)
class World:
    """The ranks that train together, seen from one of them. mesh: one dimension, `size` ranks."""

    rank: int
    size: int
    device: torch.device
    timeout_s: float
    mesh: DeviceMesh

    @contextmanager
    def collective(self, what: str) -> Iterator[None]:
        """Turns a failed exchange into a CollectiveError that says what was waited for."""
        try:
            yield
        except RuntimeError as error:
            raise CollectiveError(
                f"rank {self.rank} of {self.size}: {what}: no answer from another rank (deadline "
                f"{self.timeout_s:g} s); it died or is stuck, its own output says why: {error}"
            ) from error

    def sum(self, values: Tensor, what: str) -> Tensor:
        """`values` (CPU, same shape on every rank) summed over ranks, in place; returns them."""
        with self.collective(what):
            dist.all_reduce(values)
        return values

    def gather(self, value: Any, what: str) -> list[Any]:
        """The picklable `value` of every rank, in order of rank."""
        out: list[Any] = [None] * self.size
        with self.collective(what):
            dist.all_gather_object(out, value)
        return out

    def barrier(self, what: str) -> None:
        """Returns when every rank is here; rank 0's error names the ranks that are not."""
        with self.collective(what):
            dist.monitored_barrier(
                _host_group(), timeout=timedelta(seconds=self.timeout_s), wait_all_ranks=True
            )


@contextmanager
def open_world(*, device: str = "auto", timeout_s: float = 600.0) -> Iterator[World]:
    """Join the process group that torchrun describes; without torchrun, a world of one rank.

    device: "cpu", "cuda", or "auto" for CUDA where there is one. A group that exists already (a
    host framework's) is used, and left alone at the end.
    Raises ValueError where only a part of torchrun's variables is set.
    """
    place = _place()
    chosen = _device(device, place["LOCAL_RANK"])
    owned = not dist.is_initialized()
    if owned:
        _join(place, chosen, timeout_s)
    try:
        yield World(
            rank=dist.get_rank(),
            size=dist.get_world_size(),
            device=chosen,
            timeout_s=timeout_s,
            mesh=init_device_mesh(chosen.type, (dist.get_world_size(),)),
        )
    finally:
        if owned:
            _HOST_GROUPS.clear()
            dist.destroy_process_group()


def _place() -> dict[str, int]:
    """RANK, WORLD_SIZE and LOCAL_RANK of this process."""
    missing = [name for name in TORCHRUN_VARIABLES if name not in os.environ]
    if len(missing) == len(TORCHRUN_VARIABLES) or not {"RANK", "WORLD_SIZE"} & set(os.environ):
        return {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0}
    if missing:
        raise ValueError(
            f"environment: wanted all of {', '.join(TORCHRUN_VARIABLES)} or neither RANK nor "
            f"WORLD_SIZE, got none of {', '.join(missing)}; start with torchrun"
        )
    return {name: int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}


def _device(name: str, local_rank: int) -> torch.device:
    if name not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device: wanted auto, cpu or cuda, got {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: wanted cuda, but torch sees no CUDA device")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def _join(place: dict[str, int], device: torch.device, timeout_s: float) -> None:
    timeout = timedelta(seconds=timeout_s)
    backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
    device_id = device if device.type == "cuda" else None
    if place["WORLD_SIZE"] == 1:
        # No peer: nothing to meet, so no port to occupy.
        dist.init_process_group(
            backend,
            store=HashStore(),
            rank=0,
            world_size=1,
            timeout=timeout,
            device_id=device_id,
        )
        return
    where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    try:
        store, rank, size = next(rendezvous("env://", timeout=timeout))
        # torchrun's store outlives a process group, and a second group would read the addresses
        # that the first one left there: each has a prefix of its own.
        dist.init_process_group(
            backend,
            store=PrefixStore(f"specforge_ext/{next(_OPENED)}", store),
            rank=rank,
            world_size=size,
            timeout=timeout,
            device_id=device_id,
        )
    except RuntimeError as error:
        raise CollectiveError(
            f"rank {place['RANK']}: no meeting of {place['WORLD_SIZE']} ranks at {where} within "
            f"{timeout_s:g} s: {error}"
        ) from error


_OPENED = itertools.count()
_HOST_GROUPS: dict[str, dist.ProcessGroup] = {}


def _host_group() -> dist.ProcessGroup | None:
    """A pure gloo group (None is the default group): monitored_barrier takes no mixed one."""
    if dist.get_backend() == "gloo":
        return None
    if "gloo" not in _HOST_GROUPS:
        _HOST_GROUPS["gloo"] = dist.new_group(backend="gloo")
    return _HOST_GROUPS["gloo"]
