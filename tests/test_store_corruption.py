"""Every flipped bit of a payload or of a ref is refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from specforge_ext.store import STORES
from specforge_ext.store.base import CorruptFeature
from specforge_ext.store.ref import ref_from_bytes, ref_from_json, ref_to_bytes, ref_to_json
from store_cases import LAYOUT_HASH, TIMEOUT_S, make_sample, same_sample
from store_kinds import Opened, flip


@pytest.fixture(params=["shm", "shared_dir"])
def opened(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Opened]:
    assert STORES.get(request.param).unavailable() is None
    settings: dict[str, Any] = {}
    if request.param == "shared_dir":
        settings["directory"] = tmp_path
    opened = Opened(request.param, settings, {})
    yield opened
    opened.close()


def test_every_bit_of_payload_and_ref(opened: Opened) -> None:
    """Bytes between tensors are nobody's: a flip there changes no view."""
    writer = opened.writer(1 << 16)
    reader = opened.reader(writer)
    sample = make_sample(1, 2, 5)
    ref = writer.put(sample, layout_hash=LAYOUT_HASH, timeout_s=TIMEOUT_S)
    owned = {at for t in ref.tensors for at in range(t.offset, t.offset + t.nbytes)}
    for at in range(ref.nbytes):
        for bit in range(8):
            flip(writer, ref, at, bit)
            if at in owned:
                with pytest.raises(CorruptFeature, match="wanted crc32c"):
                    reader.open(ref, layout_hash=LAYOUT_HASH, verify=True)
            else:
                with reader.open(ref, layout_hash=LAYOUT_HASH, verify=True) as lease:
                    assert same_sample(lease.sample, sample)
            flip(writer, ref, at, bit)
    data, text = ref_to_bytes(ref), ref_to_json(ref)
    for at in range(8 * len(data)):
        wrong = bytearray(data)
        wrong[at // 8] ^= 1 << at % 8
        with pytest.raises(ValueError, match=r"^ref"):
            ref_from_bytes(bytes(wrong))
    for at in range(8 * len(text)):
        letters = bytearray(text.encode())
        letters[at // 8] ^= 1 << at % 8
        with pytest.raises(ValueError, match=r"^ref"):
            ref_from_json(letters.decode("latin-1"))
