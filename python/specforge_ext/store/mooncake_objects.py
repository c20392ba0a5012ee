"""What both sides of the mooncake_store store agree on: keys, errors, addresses."""

from __future__ import annotations

import time
from typing import Any

from pydantic import Field

from specforge_ext.config import Config, Switch
from specforge_ext.records import SampleRef
from specforge_ext.store import mooncake
from specforge_ext.store.base import ProducerLost, StoreError

NO_SPACE = -200
TOO_SMALL = -600
NOT_FOUND = -704
TRANSIENT = (-703, -707, -800)
"""Replica not ready, object being written, transfer failed: worth another try."""
ATTEMPTS = 3
RETRY_PAUSE_S = 0.2
LATE_WRITES_S = 60.0
"""Mooncake gives a stalled transfer up after 30 s; its memory is left alone for longer."""
MASTER_S = 5.0
SEGMENT_STEP_BYTES = 16 << 20
ALIVE_BYTES = 16
"""Of the object that says that a writer lives."""
LOOK_EVERY_S = (0.002, 0.05)


class Address(Config):
    """What a reader has to know. alive_bytes: what the object that says that the writer lives holds
    (hexadecimal), looked at before a GPU's memory is relied upon."""

    master: str
    protocol: mooncake.Protocol
    devices: str
    pool_bytes: int = Field(gt=0, le=1 << 46)
    read_timeout_s: float = Field(gt=0)
    direct: Switch = "off"
    alive_bytes: str = Field(default="", pattern=r"^([0-9a-f]{2})*$", max_length=128)


def connect(
    package: Any,
    host: str,
    master: str,
    *,
    protocol: mooncake.Protocol,
    devices: str,
    segment_bytes: int,
) -> Any:
    client = package.MooncakeDistributedStore()
    with mooncake.only(protocol):
        code = client.setup(host, mooncake.HANDSHAKE, segment_bytes, 0, protocol, devices, master)
    if code != 0:
        raise StoreError(
            f"Mooncake could not join {master} over {protocol} with {segment_bytes} bytes: "
            f"error {code}, {mooncake.memlock_limit()}"
        )
    return client


def key_of(epoch: str, generation: int) -> str:
    return f"specforge/{epoch}/{generation:x}"


def alive_key(epoch: str) -> str:
    return f"specforge/{epoch}/alive"


def size_of(ref: SampleRef) -> int:
    """Of the object: Mooncake has none without a byte."""
    return max(1, ref.nbytes)


def leave(pool: mooncake.Pool[mooncake.Room], slot: mooncake.Room, code: int) -> None:
    """Give room back after a read; what a failed transfer may still write to is not used again."""
    if code not in TRANSIENT:
        slot.abort()
        return
    until = time.monotonic() + LATE_WRITES_S
    pool.quarantine(slot, lambda: time.monotonic() > until)


def remove(client: Any, key: str) -> None:
    """By force, for whoever looked at an object has a lease on it. Gone is as good as removed."""
    code = client.remove(key, True)
    if code not in (0, NOT_FOUND):
        raise ProducerLost(f"Mooncake could not remove {key}: error {code}")
