"""Memory of a GPU as tensors."""

from __future__ import annotations

import secrets
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from specforge_ext import _C

DLPACK_DEVICE = 2
"""kDLCUDA: what the arena's bytes are to torch."""

PROBE_BYTES = 64

cuda: Any = torch.cuda
"""Parts of it have no types."""


class Probe:
    """Bytes that nobody can guess, registered beside the samples, on the same GPU or (None) the
    host. Readers look at them before they believe a transfer to or from a GPU."""

    def __init__(self, device: int | None) -> None:
        self.content = secrets.token_bytes(PROBE_BYTES)
        source = torch.frombuffer(bytearray(self.content), dtype=torch.uint8)
        self._keeps: object = source
        self.address = source.data_ptr()
        if device is not None:
            slot = _C.DeviceArenaProducer(device, PROBE_BYTES, 1).acquire(PROBE_BYTES, 0.0)
            whole = device_bytes(slot)
            whole.copy_(source)
            wait_for_stream(whole)
            self._keeps, self.address = slot, slot.address


def device_bytes(slot: _C.DeviceArenaReservation | _C.DeviceArenaLease) -> Tensor:
    """[nbytes] uint8 on the arena's device, which keeps the slot as it is."""
    if slot.nbytes == 0:
        return torch.empty(0, dtype=torch.uint8)
    whole: Tensor = from_dlpack(slot.dlpack(DLPACK_DEVICE))
    return whole


def use_device(ordinal: int | None) -> int:
    """That device, or torch's current one, with a context, in which memory can be mapped."""
    device = torch.cuda.current_device() if ordinal is None else ordinal
    torch.cuda.synchronize(device)
    return device


def own_stream(device: int | None) -> AbstractContextManager[object]:
    """For looking at what lies complete in a GPU's memory: neither checksums nor the copy of a
    prompt wait for what the current stream has still to do. None: of the host's."""
    if device is None or not cuda.is_available():
        return nullcontext()
    context: AbstractContextManager[object] = cuda.stream(cuda.Stream(device))
    return context


def wait_for_stream(whole: Tensor) -> None:
    if whole.is_cuda:
        torch.cuda.current_stream(whole.device).synchronize()
