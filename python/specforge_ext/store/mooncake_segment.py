"""Objects of Mooncake's store that lie in a segment of this process, written where they lie.

`batch_put_from` copies from registered memory into the segment, which here is the same memory bus
twice. A put session reserves the object without a byte being moved, and its descriptor says at
which address of its owner it lies.
"""

from __future__ import annotations

import ctypes
import os
from typing import Any

import torch

from specforge_ext import _C


class _Room(ctypes.Array[ctypes.c_ubyte]):
    """Memory from an address on; whoever writes there knows how much of it is an object's.

    One type for all sizes: ctypes keeps every array type that was ever made.
    """

    _type_ = ctypes.c_ubyte
    _length_ = 1 << 46

    def write(self, offset: int, source: memoryview, checksum: bool) -> int | None:
        """As `ArenaReservation.write`."""
        if not source.nbytes:
            return 0 if checksum else None
        came = torch.frombuffer(source, dtype=torch.uint8)
        to = torch.frombuffer(self, dtype=torch.uint8, count=source.nbytes, offset=offset)
        if checksum:
            return _C.copy_crc32c(to, came)
        to.copy_(came)
        return None


class OwnSegment:
    """What of a master's objects lies in this process.

    probe_key, probe: an object that was put there, and its bytes, which nobody can guess: they are
    looked for at the address that the descriptor gives, before that is believed.
    """

    def __init__(self, client: Any, probe_key: str, probe: bytes) -> None:
        self._client = client
        self._endpoint: str | None = None
        at = self._find(probe_key)
        if at is not None and _peek(at.buffer_address, len(probe)) == probe:
            self._endpoint = at.transport_endpoint

    @property
    def is_known(self) -> bool:
        return self._endpoint is not None

    def room(self, key: str) -> Any:
        """Where an object lies, to be written as an `ArenaReservation`; None if not here."""
        at = self._find(key)
        if at is None or self._endpoint is None or at.transport_endpoint != self._endpoint:
            return None
        return _Room.from_address(at.buffer_address)

    def _find(self, key: str) -> Any:
        replicas = self._client.get_replica_desc(key)
        if len(replicas) != 1 or not replicas[0].is_memory_replica():
            return None
        return replicas[0].get_memory_descriptor().buffer_descriptor


def _peek(address: int, nbytes: int) -> bytes | None:
    """Bytes of this process; None instead of a fault."""
    fd = os.open("/proc/self/mem", os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.pread(fd, nbytes, address)
    except OSError:
        return None
    finally:
        os.close(fd)
