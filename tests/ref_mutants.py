"""Refs at random, and what may come instead of one: each mutant follows from its number."""

from __future__ import annotations

import copy
import json
import random
import struct
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from specforge_ext import _C
from specforge_ext.records import DTYPES, FP8_DTYPES, SampleRef, TensorRef
from specforge_ext.store.ref import MAX_GENERATION, plan_tensors

EXTREMES = [0, 1, 63, 64, 127, 128, 255, 256, 257, 1 << 31, 1 << 32, 1 << 40, 1 << 63, 1 << 64]
HOSTILE: list[Any] = [
    *EXTREMES,
    *(n - 1 for n in EXTREMES),
    None,
    True,
    10**400,
    0.5,
    float("nan"),
    float("inf"),
    "",
    "x",
    "int32",
    "fp8_e4m3_row",
    "\x00",
    "\ud800",
    "x" * 600,
    [],
    [[]],
    [1 << 62, 4],
    [-1, -1],
    {},
    {"a": 1},
]


def random_ref(rng: random.Random) -> SampleRef:
    """Any ref that is allowed, but for one of more than six features."""
    tokens = rng.choice([0, 1, 7, 4096, (1 << 31) - 1])
    shapes: list[tuple[str, str, tuple[int, ...]]] = [
        ("input_ids", "int32", (tokens,)),
        ("loss_mask", "uint8", (tokens,)),
    ]
    for i in range(rng.randrange(7)):
        width = rng.choice([0, 1, 33, 4096, 1 << 20])
        shapes.append(
            (f"f{i}." + "n" * rng.randrange(120), rng.choice(list(DTYPES)), (tokens, width))
        )
    rng.shuffle(shapes)
    num_scales = {
        name: rng.choice([n for n in (1, 3, shape[1]) if shape[1] % n == 0])
        for name, dtype, shape in shapes
        if dtype in FP8_DTYPES and shape[-1] and rng.random() < 0.5
    }
    tensors = tuple(with_checksum(t, rng) for t in plan_tensors(shapes, num_scales=num_scales))
    return SampleRef(
        sample_id=random_text(rng, 512),
        store=random_text(rng, 128),
        slot=rng.choice([0, 1, (1 << 32) - 1, rng.getrandbits(32)]),
        generation=rng.choice([1, MAX_GENERATION, rng.randrange(1, MAX_GENERATION)]),
        layout_hash=random_text(rng, 64),
        num_tokens=tokens,
        nbytes=max(t.end for t in tensors) + rng.choice([0, 0, 1, 64, 1 << 40]),
        tensors=tensors,
    )


def with_checksum(tensor: TensorRef, rng: random.Random) -> TensorRef:
    checksum = rng.choice([None, 0, (1 << 32) - 1, rng.getrandbits(32)])
    return replace(tensor, checksum=checksum)


def random_text(rng: random.Random, max_chars: int) -> str:
    alphabet = rng.choice(["abc0189-_:/", '"\\[]{},:', "aé中\U0001f600"])
    return "".join(rng.choices(alphabet, k=rng.choice([1, 2, 16, max_chars])))


def sealed_bytes(body: bytes) -> bytes:
    """With the checksum that makes a parser look at what is before it."""
    return body + struct.pack("<I", _C.crc32c(body))


def sealed_json(body: str) -> str:
    """body: all before the comma that precedes the checksum."""
    return f'{body},"crc32c":{_C.crc32c(body.encode(errors="replace"))}}}'


def mutant_bytes(rng: random.Random, seeds: list[bytes]) -> bytes:
    """seeds: binary forms of refs."""
    data, other = rng.choice(seeds)[:-4], rng.choice(seeds)
    for _ in range(rng.choice([0, 1, 1, 1, 2, 4])):
        data = rng.choice(BYTES_CHANGES)(data, other, rng)
    return sealed_bytes(data) if rng.random() < 0.9 else data + rng.randbytes(4)


def flip_bit(data: bytes, other: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data) + 1)
    return data[:at] + bytes(b ^ 1 << rng.randrange(8) for b in data[at : at + 1]) + data[at + 1 :]


def truncate(data: bytes, other: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data) + 1)]


def splice(data: bytes, other: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data) + 1)] + other[rng.randrange(len(other)) :]


def cut_out(data: bytes, other: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data) + 1)
    return data[:at] + data[at + rng.randrange(1, 20) :]


def repeat(data: bytes, other: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data) + 1)
    part = data[at : at + rng.randrange(1, 100)]
    return data[:at] + part * rng.choice([2, 2, 2, 3, 300]) + data[at:]


def write_extreme(data: bytes, other: bytes, rng: random.Random) -> bytes:
    """An integer of any width anywhere; often in the header, whose fields are where they are."""
    width = rng.choice([1, 2, 4, 8])
    at = rng.choice([4, 6, 8, 12, 16, 24, 32, rng.randrange(len(data) + 1)])
    value = rng.choice(EXTREMES) - rng.randrange(2)
    return data[:at] + (value % (1 << 8 * width)).to_bytes(width, "little") + data[at + width :]


BYTES_CHANGES: list[Callable[[bytes, bytes, random.Random], bytes]] = [
    *(flip_bit, truncate, splice, cut_out, repeat),
    *(write_extreme, write_extreme, write_extreme),
]


def mutant_json(rng: random.Random, seeds: list[str]) -> str:
    """seeds: JSON forms of refs."""
    text = rng.choice(seeds)
    if rng.random() < 0.6:
        data = json.loads(text)
        del data["crc32c"]
        for _ in range(rng.choice([1, 1, 2, 3])):
            mutate_tree(data, rng)
        separators = (",", ":") if rng.random() < 0.9 else (", ", ": ")
        return sealed_json(json.dumps(data, separators=separators)[:-1])
    other = rng.choice(seeds)
    body = text[: text.rfind(",")]
    for _ in range(rng.choice([1, 1, 2, 4])):
        body = rng.choice(TEXT_CHANGES)(body, other, rng)
    return sealed_json(body) if rng.random() < 0.7 else body + text[len(body) :]


def mutate_tree(data: Any, rng: random.Random) -> None:
    """Replace, remove or add one value somewhere."""
    while True:
        keys = list(data) if isinstance(data, dict) else list(range(len(data)))
        if not keys:
            return
        key = rng.choice(keys)
        if isinstance(data[key], dict | list) and rng.random() < 0.8:
            data = data[key]
            continue
        action = rng.random()
        if action < 0.1:
            del data[key]
        elif action < 0.15 and isinstance(data, dict):
            data["surplus"] = data[key]
        elif action < 0.2 and isinstance(data, list):
            data *= rng.choice([2, 300])
        elif action < 0.5 and type(data[key]) is int:
            data[key] += rng.choice([-64, -1, 1, 64, 1 << 32, 1 << 63])
        else:
            data[key] = copy.deepcopy(rng.choice(HOSTILE))
        return


def change_text(text: str, other: str, rng: random.Random) -> str:
    """What is done to bytes, done to characters."""
    change = rng.choice(BYTES_CHANGES)
    return change(text.encode("latin-1", "replace"), other.encode(), rng).decode("latin-1")


def insert_character(text: str, other: str, rng: random.Random) -> str:
    at = rng.randrange(len(text) + 1)
    return (
        text[:at] + chr(rng.choice([0, 32, 34, 45, 48, 57, 91, 123, 0xD800, 0x1F600])) + text[at:]
    )


def nest(text: str, other: str, rng: random.Random) -> str:
    """A value so deep that the parser may just bear it, and what comes after it may not."""
    depth = rng.choice([3, rng.randrange(700, 1000), rng.randrange(700, 1000), 20_000])
    opening, closing = rng.choice([("[", "]"), ('{"a":', "}")])
    value = opening * depth + "1" + closing * depth
    key = rng.choice(['"slot":', '"version":', '"tensors":', '"shape":', '"checksum":', '"dtype":'])
    return (
        text.replace(key, f"{key}{value},", 1) if rng.random() < 0.2 else in_place(text, key, value)
    )


def in_place(text: str, key: str, value: str) -> str:
    """The scalar or list after the first `key` replaced; anything, if there is no such key."""
    before, found, after = text.partition(key)
    return f"{before}{found}{value}{after[after.find(',') :]}"


def many_digits(text: str, other: str, rng: random.Random) -> str:
    at = rng.randrange(len(text) + 1)
    return text[:at] + rng.choice("0123456789") * rng.choice([20, 4300, 4301, 90_000]) + text[at:]


def escape(text: str, other: str, rng: random.Random) -> str:
    at = rng.randrange(len(text) + 1)
    return text[:at] + rng.choice(["\\ud800", "\\u0000", "\\", '\\"', "\\u00E9", "\\x"]) + text[at:]


TEXT_CHANGES: list[Callable[[str, str, random.Random], str]] = [
    *(change_text, change_text, change_text, insert_character, escape),
    *(nest, many_digits),
]
