"""Refs from a wire: a right one comes back equal, a wrong one is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from specforge_ext.records import SampleRef, TensorRef
from specforge_ext.store.base import CorruptFeature
from specforge_ext.store.ref import check_ref, plan_tensors, ref_from_json, ref_to_json
from specforge_ext.store.shm import ShmConfig, ShmStore
from store_cases import LAYOUT_HASH, TIMEOUT_S, make_sample


def good_ref() -> SampleRef:
    tensors = plan_tensors(
        [("input_ids", "int32", (5,)), ("loss_mask", "uint8", (5,)), ("h", "bfloat16", (5, 64))]
    )
    checked = tuple(replace(tensor, checksum=7) for tensor in tensors)
    return SampleRef("id", "shm:00000000000000aa", 3, 9, LAYOUT_HASH, 5, 768, checked)


def test_wire_format_is_exactly_this() -> None:
    text = (
        '{"version":1,"sample_id":"id","store":"shm:00000000000000aa","slot":3,"generation":9,'
        '"layout_hash":"0123456789abcdef","num_tokens":5,"nbytes":768,"tensors":['
        '{"name":"input_ids","dtype":"int32","shape":[5],"offset":0,"nbytes":20,'
        '"encoding":"none","checksum":7,"num_scales":0,"scales_offset":0},'
        '{"name":"loss_mask","dtype":"uint8","shape":[5],"offset":64,"nbytes":5,'
        '"encoding":"none","checksum":7,"num_scales":0,"scales_offset":0},'
        '{"name":"h","dtype":"bfloat16","shape":[5,64],"offset":128,"nbytes":640,'
        '"encoding":"none","checksum":7,"num_scales":0,"scales_offset":0}],"crc32c":3113482382}'
    )
    assert ref_to_json(good_ref()) == text
    assert ref_from_json(text) == good_ref()


def change_tensor(index: int, **changes: Any) -> Callable[[SampleRef], SampleRef]:
    def change(ref: SampleRef) -> SampleRef:
        tensors = list(ref.tensors)
        tensors[index] = replace(tensors[index], **changes)
        return replace(ref, tensors=tuple(tensors))

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: replace(r, sample_id=""), r"ref.sample_id: wanted 1 to 512 printable .* got ''"),
        (lambda r: replace(r, sample_id="\ud800"), r"ref.sample_id: .* got '\\ud800'"),
        (lambda r: replace(r, slot=-1), r"ref.slot: wanted an integer in 0..4294967295, got -1"),
        (lambda r: replace(r, slot=True), r"ref.slot: .* got True"),
        (lambda r: replace(r, generation=0), r"ref.generation: wanted an integer in 1\.\."),
        (lambda r: replace(r, generation=1 << 40), r"ref.generation: .* got 1099511627776"),
        (lambda r: replace(r, nbytes=10**400), r"ref.nbytes: .* got an integer of 1329 bits"),
        (lambda r: replace(r, nbytes=767), r"ref h: wanted an end within nbytes, 767, got 768"),
        (lambda r: replace(r, tensors=[]), r"ref.tensors: wanted a tuple of at most 256"),
        (lambda r: replace(r, tensors=r.tensors[1:]), r"with input_ids and loss_mask, got \["),
        (lambda r: replace(r, tensors=r.tensors * 2), r"ref.tensors: wanted unique names"),
        (lambda r: replace(r, num_tokens=6), r"\[0\].shape\[0\]: wanted num_tokens, 6, got 5"),
        (change_tensor(2, name="a b"), r"\[2\].name: wanted letters, digits"),
        (change_tensor(2, dtype="float8"), r"\[2\].dtype: wanted one of \[.*\], got 'float8'"),
        (change_tensor(2, dtype=["x"]), r"\[2\].dtype: wanted one of"),
        (
            change_tensor(0, dtype="int64"),
            r"\[0\].dtype: wanted 'int32' for input_ids",
        ),
        (change_tensor(2, encoding="zip"), r"\[2\].encoding: wanted one of none, .*, got 'zip'"),
        (change_tensor(2, checksum=1 << 32), r"\[2\].checksum: wanted an integer in"),
        (change_tensor(2, shape=(5,)), r"\[2\].shape: wanted 2 dimensions, got \(5,\)"),
        (change_tensor(2, shape=(5, -64)), r"\[2\].shape\[1\]: wanted an integer in"),
        (change_tensor(2, shape=(5, 63)), r"\[2\].nbytes: wanted 630, the product of .* got 640"),
        (change_tensor(2, offset=100), r"\[2\].offset: wanted a multiple of 64, got 100"),
        (change_tensor(2, offset=0), r"ref \w+.offset: wanted no overlap, at least \d+, got"),
        (change_tensor(2, offset=1 << 63), r"\[2\].offset: wanted an integer in"),
    ],
)
def test_refused_by_name(change: Callable[[SampleRef], SampleRef], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_ref(change(good_ref()))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "ref: not valid JSON"),
        ("[" * 60000, "ref: not valid JSON: nested too deeply"),
        (" " * (1 << 18), "ref: wanted at most 131072 characters, got 262144"),
        ("[]", r"ref: wanted an object, got \[\]"),
        ("{}", r"ref.version: wanted 1, .*, got None"),
        ('{"version":2}', r"ref.version: wanted 1, .*, got 2"),
        ('{"version":1}', r"ref: wanted the keys \[.*\], got \['version'\]"),
        (
            '{"slot":1,"slot":1}',
            r"JSON: wanted every key once, got \['slot', 'slot'\]",
        ),
        ("1" * 5000, "ref: not valid JSON"),
    ],
)
def test_text_that_is_no_ref(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ref_from_json(text)


def test_lists_must_be_lists() -> None:
    data = json.loads(ref_to_json(good_ref()))
    with pytest.raises(ValueError, match=r"ref.tensors: wanted a list, got 'x'"):
        ref_from_json(json.dumps({**data, "tensors": "x"}))
    with pytest.raises(ValueError, match=r"ref.tensors\[0\]: wanted an object, got 1"):
        ref_from_json(json.dumps({**data, "tensors": [1]}))
    data["tensors"][1]["shape"] = 5
    with pytest.raises(ValueError, match=r"ref.tensors\[1\].shape: wanted a list, got 5"):
        ref_from_json(json.dumps(data))


def test_plan_is_aligned_and_tight() -> None:
    shapes = [("a", "uint8", (65,)), ("b", "int64", (0,)), ("c", "bfloat16", (3, 1))]
    planned = plan_tensors(shapes)
    assert planned == (
        TensorRef("a", "uint8", (65,), 0, 65),
        TensorRef("b", "int64", (0,), 128, 0),
        TensorRef("c", "bfloat16", (3, 1), 128, 6),
    )


def test_wrong_ref_that_only_the_checksum_refuses() -> None:
    """Two features of one size, each at the other's place: the ref is sound, the bytes are not."""
    writer = ShmStore.writer(ShmConfig(capacity_bytes=1 << 16, max_slots=4))
    reader = ShmStore.reader(writer.address())
    ref = writer.put(make_sample(1), layout_hash=LAYOUT_HASH, timeout_s=TIMEOUT_S)
    offsets = {tensor.name: tensor.offset for tensor in ref.tensors}
    offsets["float32"], offsets["int32"] = offsets["int32"], offsets["float32"]
    swapped = tuple(replace(tensor, offset=offsets[tensor.name]) for tensor in ref.tensors)
    with pytest.raises(CorruptFeature, match=r"float32: wanted crc32c \w{8}, got \w{8}"):
        reader.open(replace(ref, tensors=swapped), layout_hash=LAYOUT_HASH, verify=True)
    assert writer.health().slots_ready == 1
