"""Every flipped bit of a payload or of a ref is refused."""

from __future__ import annotations

import copy
import os
import random
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from encoding_cases import outliers
from ref_mutants import sealed_bytes, sealed_json
from specforge_ext.records import Sample, SampleRef, TensorRef
from specforge_ext.store import STORES, payload
from specforge_ext.store.base import CorruptFeature, LayoutMismatch, StaleRef
from specforge_ext.store.ref import ref_from_bytes, ref_from_json, ref_to_bytes, ref_to_json
from specforge_ext.store.shm import ShmConfig, ShmStore
from store_cases import LAYOUT_HASH, TIMEOUT_S, make_prompt, make_sample, same_bytes, same_sample
from store_kinds import Opened, flip

SEED = int(os.environ.get("SPECFORGE_EXT_FUZZ_SEED", "20261121"))
NUM_FLIPS = 300


@pytest.fixture(params=["shm", "shared_dir"])
def opened(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Opened]:
    assert STORES.get(request.param).unavailable() is None
    settings: dict[str, Any] = {}
    if request.param == "shared_dir":
        settings["directory"] = tmp_path
    opened = Opened(request.param, settings, {})
    yield opened
    opened.close()


ENCODINGS = ("none", "fp8_e4m3_row")


def put(writer: Any, sample: Sample, layers: dict[str, int]) -> SampleRef:
    ref: SampleRef = writer.put(sample, layout_hash=LAYOUT_HASH, timeout_s=TIMEOUT_S, layers=layers)
    return ref


def owned_bytes(tensor: TensorRef) -> list[int]:
    """Places in the extent: of the values or codes, and of the scales."""
    values = range(tensor.offset, tensor.offset + tensor.nbytes)
    scales = range(tensor.scales_offset, tensor.scales_offset + tensor.scales_nbytes)
    return [*values, *scales]


def copy_of(reader: Any, ref: SampleRef) -> Sample:
    with reader.open(ref, layout_hash=LAYOUT_HASH, verify=True) as lease:
        return copy.deepcopy(payload.decoded(lease.sample))


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_every_bit_of_the_payload(opened: Opened, encoding: str) -> None:
    """Bytes between tensors are nobody's: a flip there changes no view."""
    writer = opened.writer(1 << 16, encoding=encoding)
    reader = opened.reader(writer)
    encoded = Sample(make_prompt(1, 2), {"h": outliers(2, 6, 1)})
    ref = put(writer, make_sample(1, 2, 5) if encoding == "none" else encoded, {"h": 2})
    sample = copy_of(reader, ref)
    owned = {at for tensor in ref.tensors for at in owned_bytes(tensor)}
    for at in range(ref.nbytes):
        for bit in range(8):
            flip(writer, ref, at, bit)
            if at in owned:
                with pytest.raises(CorruptFeature, match="wanted crc32c"):
                    reader.open(ref, layout_hash=LAYOUT_HASH, verify=True)
            else:
                assert same_sample(copy_of(reader, ref), sample)
            flip(writer, ref, at, bit)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_every_bit_of_a_ref(encoding: str) -> None:
    writer = ShmStore.writer(ShmConfig(capacity_bytes=1 << 16, encoding=encoding))
    ref = put(writer, Sample(make_prompt(1, 2), {"h": outliers(2, 6, 1)}), {"h": 2})
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


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_random_bits_of_a_large_sample(opened: Opened, encoding: str) -> None:
    """1 to 3 MB: one bit at a time, and up to eight anywhere in one tensor, which crc32c does not
    promise to see over so many bytes, but does here."""
    rng = random.Random(SEED)
    writer = opened.writer(1 << 23, encoding=encoding)
    reader = opened.reader(writer)
    encoded = Sample(make_prompt(2, 301), {"h": outliers(301, 4000, 2)})
    ref = put(writer, make_sample(2, 301, 401) if encoding == "none" else encoded, {"h": 1000})
    sample = copy_of(reader, ref)
    assert ref.nbytes > 2_000_000
    tensors = {t.name: owned_bytes(t) for t in ref.tensors if t.nbytes}
    for number in range(NUM_FLIPS):
        [name] = rng.choices(list(tensors), [len(places) for places in tensors.values()])
        num_bits = 1 if number % 3 else rng.randrange(1, 9)
        places = [(at, rng.randrange(8)) for at in rng.sample(tensors[name], num_bits)]
        for at, bit in places:
            flip(writer, ref, at, bit)
        with pytest.raises(CorruptFeature, match=f"{name}: wanted crc32c"):
            reader.open(ref, layout_hash=LAYOUT_HASH, verify=True)
        for at, bit in places:
            flip(writer, ref, at, bit)
    assert same_sample(copy_of(reader, ref), sample)
    print(f"{opened.kind}: {NUM_FLIPS} flips of seed {SEED} in {ref.nbytes} bytes, all refused")


Parse = Callable[[bytes], SampleRef]


def forms_of(ref: SampleRef) -> dict[str, tuple[bytes, Parse]]:
    """What a checksum covers in either form of a ref, and how to read it with one that is right."""
    text = ref_to_json(ref)
    return {
        "bytes": (ref_to_bytes(ref)[:-4], lambda body: ref_from_bytes(sealed_bytes(body))),
        "json": (
            text[: text.rfind(",")].encode(),
            lambda body: ref_from_json(sealed_json(body.decode("latin-1"))),
        ),
    }


def test_flipped_refs_with_a_right_checksum(opened: Opened) -> None:
    """Every bit, one at a time, and up to four: refused with a type, or a ref to the same bytes.

    The latter are refs that call the sample, or a feature, by another name.
    """
    rng = random.Random(SEED)
    writer = opened.writer(1 << 16)
    reader = opened.reader(writer)
    sample = make_sample(1, 2, 5)
    ref = writer.put(sample, layout_hash=LAYOUT_HASH, timeout_s=TIMEOUT_S)
    results: Counter[str] = Counter()
    for form, (body, parse) in forms_of(ref).items():
        singles = [[place] for place in range(8 * len(body))]
        several = [rng.sample(range(8 * len(body)), rng.randrange(2, 5)) for _ in range(500)]
        for places in singles + several:
            wrong = bytearray(body)
            for place in places:
                wrong[place // 8] ^= 1 << place % 8
            results[form, opens_as(reader, parse, bytes(wrong), ref, sample)] += 1
    print(f"{opened.kind}, seed {SEED}: {dict(results)}")
    for form in ("bytes", "json"):
        assert {name for at, name in results if at == form} == {
            *("refused", "CorruptFeature", "LayoutMismatch", "StaleRef", "same bytes")
        }
    assert writer.health().num_samples == 1


def opens_as(reader: Any, parse: Parse, body: bytes, good: SampleRef, sample: Sample) -> str:
    try:
        ref = parse(body)
    except ValueError as error:
        assert str(error).startswith("ref"), error
        return "refused"
    try:
        lease = reader.open(ref, layout_hash=LAYOUT_HASH, verify=True)
    except (CorruptFeature, LayoutMismatch, StaleRef) as error:
        return type(error).__name__
    except ValueError as error:  # the shm store knows how many slots it has
        assert str(error).startswith("arena: slot must be below 1024, got"), error
        return "refused"
    with lease:
        assert [t.nbytes for t in ref.tensors] == [t.nbytes for t in good.tensors]
        came, wanted = lease.sample.features.values(), sample.features.values()
        assert lease.sample.prompt.input_ids.equal(sample.prompt.input_ids)
        assert all(same_bytes(a, b) for a, b in zip(came, wanted, strict=True))
    return "same bytes"
