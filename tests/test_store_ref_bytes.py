"""The binary form of a ref: exact bytes, and an error with the name of each field."""

from __future__ import annotations

import struct
from dataclasses import replace

import pytest

from ref_mutants import sealed_bytes
from specforge_ext.records import SampleRef
from specforge_ext.store.ref import plan_tensors, ref_from_bytes, ref_to_bytes
from test_store_ref import good_ref

FIELDS: list[tuple[str, str]] = [
    *(("magic", "4s"), ("version", "H"), ("num_tensors", "H"), ("slot", "I")),
    *(("num_tokens", "I"), ("generation", "Q"), ("nbytes", "Q")),
    *(("sample_id", "text"), ("store", "text"), ("layout_hash", "text")),
]
TENSOR_FIELDS: list[tuple[str, str]] = [
    *(("name", "text"), ("dtype", "text"), ("encoding", "text"), ("rank", "B"), ("shape", "sizes")),
    *(("offset", "Q"), ("nbytes", "Q"), ("has_checksum", "B"), ("checksum", "I")),
    *(("num_scales", "I"), ("scales_offset", "Q")),
]


def encoded_ref() -> SampleRef:
    """With one more feature, [5, 16] in two layers."""
    shapes = [(t.name, t.dtype, t.shape) for t in good_ref().tensors]
    tensors = plan_tensors([*shapes, ("e", "float32", (5, 16))], num_scales={"e": 2})
    assert (tensors[3].offset, tensors[3].scales_offset, tensors[3].end) == (768, 896, 936)
    return replace(good_ref(), tensors=tensors, nbytes=936)


def values_of(ref: SampleRef) -> dict[str, tuple[str, object]]:
    """(format, value) of every field, in order: the form as the docstring of store/ref.py has it.

    Fields of tensors are named "tensors[i].field".
    """
    head = {"magic": b"SFxR", "version": 1, "num_tensors": len(ref.tensors)}
    out: dict[str, tuple[str, object]] = {}
    for name, form in FIELDS:
        out[name] = form, head[name] if name in head else getattr(ref, name)
    for i, tensor in enumerate(ref.tensors):
        more = {
            "rank": len(tensor.shape),
            "has_checksum": tensor.checksum is not None,
            "checksum": tensor.checksum or 0,
        }
        for name, form in TENSOR_FIELDS:
            value = more[name] if name in more else getattr(tensor, name)
            out[f"tensors[{i}].{name}"] = form, value
    return out


def written(form: str, value: object) -> bytes:
    if form == "raw":
        assert isinstance(value, bytes)
        return value
    if form == "text":
        data = str(value).encode()
        return struct.pack("<H", len(data)) + data
    if form == "sizes":
        assert isinstance(value, tuple)
        return struct.pack(f"<{len(value)}I", *value)
    return struct.pack(f"<{form}", value)


def spelled(fields: dict[str, tuple[str, object]]) -> bytes:
    return sealed_bytes(b"".join(written(form, value) for form, value in fields.values()))


def test_exactly_these_bytes() -> None:
    ref = good_ref()
    unchecked = replace(ref.tensors[1], checksum=None)
    for known in (
        ref,
        encoded_ref(),
        replace(ref, tensors=(ref.tensors[0], unchecked, ref.tensors[2])),
    ):
        data = spelled(values_of(known))
        assert ref_to_bytes(known) == data
        assert ref_from_bytes(data) == known
    assert (
        ref_to_bytes(ref)[:48]
        == (
            b"SFxR\x01\x00\x03\x00\x03\x00\x00\x00\x05\x00\x00\x00\x09\x00\x00\x00\x00\x00\x00\x00"
            b"\x00\x03\x00\x00\x00\x00\x00\x00\x02\x00id\x14\x00shm:00000000"
        )[:48]
    )


@pytest.mark.parametrize(
    ("field", "form", "value", "message"),
    [
        ("magic", "4s", b"SFxS", r"ref.magic: wanted b'SFxR', got b'SFxS'"),
        ("version", "H", 2, r"ref.version: wanted 1, .*, got 2"),
        ("num_tensors", "H", 257, r"ref.num_tensors: wanted an integer in 0..256, got 257"),
        ("num_tensors", "H", 2, r"ref: wanted no bytes after the last tensor, got \d+"),
        ("num_tensors", "H", 4, r"ref.tensors\[3\].name: wanted 2 bytes, got 0 before the end"),
        ("num_tokens", "I", 1 << 31, r"ref.num_tokens: wanted an integer in"),
        ("num_tokens", "I", 6, r"ref.tensors\[0\].shape\[0\]: wanted num_tokens, 6, got 5"),
        ("generation", "Q", 0, r"ref.generation: wanted an integer in 1\.\."),
        ("generation", "Q", 1 << 40, r"ref.generation: .* got 1099511627776"),
        ("nbytes", "Q", 1 << 63, r"ref.nbytes: wanted an integer in"),
        ("nbytes", "Q", 767, r"ref h: wanted an end within nbytes, 767, got 768"),
        ("sample_id", "text", "", r"ref.sample_id: wanted 1 to 512 printable .* got ''"),
        ("sample_id", "raw", b"\xff\xffid", r"ref.sample_id: wanted 65535 bytes, got \d+ before"),
        ("sample_id", "raw", b"\x02\x00\xff\xfe", r"ref.sample_id: wanted UTF-8, got b'\\xff\\xfe"),
        ("store", "text", "s" * 129, r"ref.store: wanted 1 to 128 printable"),
        ("store", "raw", b"\x01\x00\x80", r"ref.store: wanted UTF-8"),
        ("layout_hash", "text", "a\nb", r"ref.layout_hash: wanted 1 to 64 printable"),
        ("layout_hash", "raw", b"\x01\x00\x80", r"ref.layout_hash: wanted UTF-8"),
        ("tensors[2].name", "text", "a b", r"ref.tensors\[2\].name: wanted letters, digits"),
        ("tensors[2].name", "raw", b"\x01\x00\x80", r"ref.tensors\[2\].name: wanted UTF-8"),
        ("tensors[2].name", "text", "loss_mask", r"ref.tensors\[2\].shape: wanted 1 dimensions"),
        ("tensors[2].dtype", "text", "bit", r"ref.tensors\[2\].dtype: wanted one of .* got 'bit'"),
        ("tensors[2].dtype", "text", "float32", r"ref.tensors\[2\].nbytes: wanted 1280"),
        ("tensors[0].dtype", "text", "float32", r"\[0\].dtype: wanted 'int32' for input_ids"),
        ("tensors[2].encoding", "text", "zip", r"ref.tensors\[2\].encoding: wanted .* got 'zip'"),
        ("tensors[2].rank", "B", 3, r"ref.tensors\[2\].rank: wanted an integer in 0..2, got 3"),
        ("tensors[2].shape", "sizes", (5, 63), r"ref.tensors\[2\].nbytes: wanted 630"),
        ("tensors[2].shape", "sizes", (4, 80), r"ref.tensors\[2\].shape\[0\]: wanted num_tokens"),
        ("tensors[2].shape", "sizes", (5, 1 << 31), r"\[2\].shape\[1\]: wanted an integer in"),
        ("tensors[2].offset", "Q", 100, r"ref.tensors\[2\].offset: wanted a multiple of 64"),
        ("tensors[2].offset", "Q", 0, r"ref \w+.offset: wanted no overlap, at least \d+, got 0"),
        ("tensors[2].offset", "Q", 1 << 63, r"ref.tensors\[2\].offset: wanted an integer in"),
        ("tensors[2].offset", "Q", (1 << 63) - 64, r"ref h: wanted an end within nbytes, 768"),
        ("tensors[2].nbytes", "Q", 641, r"ref.tensors\[2\].nbytes: wanted 640"),
        ("tensors[2].nbytes", "Q", 1 << 63, r"ref.tensors\[2\].nbytes: wanted an integer in"),
        ("tensors[2].has_checksum", "B", 2, r"ref.tensors\[2\].has_checksum: wanted an integer in"),
        ("tensors[2].has_checksum", "B", 0, r"\[2\].checksum: wanted 0, for it has none, got 7"),
        ("tensors[2].num_scales", "I", 1, r"ref.tensors\[2\].num_scales: wanted .* 0..0, got 1"),
        ("tensors[2].scales_offset", "Q", 64, r"\[2\].scales_offset: wanted .* 0..0, got 64"),
        ("tensors[3].num_scales", "I", 5, r"ref.tensors\[3\].num_scales: wanted a divisor"),
        ("tensors[3].num_scales", "I", 17, r"\[3\].num_scales: wanted an integer in 1..16, got 17"),
        ("tensors[3].scales_offset", "Q", 960, r"ref e.scales: wanted an end within nbytes"),
        ("tensors[3].scales_offset", "Q", 1 << 63, r"\[3\].scales_offset: wanted an integer in"),
        ("tensors[3].encoding", "text", "int4_row", r"wanted one of none, fp8_e4m3_row, got 'int4"),
        ("tensors[2].checksum", "raw", b"\x07", r"ref.tensors\[2\]: wanted \d+ bytes, got \d+"),
    ],
)
def test_each_field_is_refused_by_name(field: str, form: str, value: object, message: str) -> None:
    fields = values_of(encoded_ref() if field.startswith("tensors[3]") else good_ref())
    assert field in fields
    fields[field] = form, value
    with pytest.raises(ValueError, match=message):
        ref_from_bytes(spelled(fields))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", r"ref: wanted 36 to 131072 bytes, got 0"),
        (bytes(131073), r"ref: wanted 36 to 131072 bytes, got 131073"),
        (ref_to_bytes(good_ref())[:-1], r"ref.crc32c: wanted \d+, that of what came, got \d+"),
        (ref_to_bytes(good_ref()) + b"\0", r"ref.crc32c: wanted \d+, that of what came, got \d+"),
        (
            sealed_bytes(ref_to_bytes(good_ref())[:-4] + b"\0"),
            r"ref: wanted no bytes after the last tensor, got 1",
        ),
    ],
)
def test_bytes_that_are_no_ref(data: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ref_from_bytes(data)


def test_every_end_too_early_names_a_field() -> None:
    body = ref_to_bytes(good_ref())[:-4]
    for size in range(32, len(body)):
        with pytest.raises(ValueError, match=r"^ref\S*: wanted \d+ bytes, got \d+ before the end"):
            ref_from_bytes(sealed_bytes(body[:size]))
