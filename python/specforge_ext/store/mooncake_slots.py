"""What both sides of the mooncake_p2p store agree on: where things lie in the producer's memory."""

from __future__ import annotations

from pydantic import Field

from specforge_ext.config import Config, Switch
from specforge_ext.store import mooncake

PAGE_BYTES = 4096
SLOT_BYTES = 64
EPOCH_AT = 40
"""In the arena's header (csrc/transport/layout.h)."""
READY = (2, 3)
"""States of a slot that may be read (csrc/transport/slot_word.h): ready, and leased on its host."""


class Address(Config):
    """What a reader has to know. slots, payload, acks: addresses in the producer's memory.

    probe, probe_bytes: where something lies, and (hexadecimal) what, beside the payload, that is
    looked at before a GPU's memory is relied upon.
    """

    peer: str = Field(pattern=r"^[^:\s]+:\d+$")
    protocol: mooncake.Protocol
    devices: str
    slots: int = Field(gt=0, lt=1 << 63)
    payload: int = Field(gt=0, lt=1 << 63)
    acks: int = Field(gt=0, lt=1 << 63)
    max_slots: int = Field(gt=0, le=1 << 20)
    payload_bytes: int = Field(gt=0, le=1 << 46)
    pool_bytes: int = Field(gt=0, le=1 << 46)
    read_timeout_s: float = Field(gt=0)
    direct: Switch = "off"
    probe: int = Field(default=0, ge=0, lt=1 << 63)
    probe_bytes: str = Field(default="", pattern=r"^([0-9a-f]{2})*$", max_length=128)
