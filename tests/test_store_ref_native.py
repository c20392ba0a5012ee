"""The native check of refs accepts what the one that says why not accepts, and nothing else."""

from __future__ import annotations

import os
import random
from dataclasses import fields, replace
from typing import Any

import pytest

from ref_mutants import HOSTILE, random_ref
from specforge_ext import _C
from specforge_ext.records import DTYPES, ENCODINGS, SampleRef, TensorRef
from specforge_ext.store import ref as python
from specforge_ext.store.ref import check_ref

NUM_INPUTS = int(os.environ.get("SPECFORGE_EXT_FUZZ_INPUTS", "20000"))
SEED = int(os.environ.get("SPECFORGE_EXT_FUZZ_SEED", "20261121"))
NAMES = ["input_ids", "loss_mask", "h", "0h", "h h", "h" * 128, "h" * 129, "é", "h\n", "-"]
TEXTS = ["é", "\x7f", "\x1f", " ", "\u2028", "\U0001f600", "a" * 64, "a" * 65, "a" * 129, "a" * 513]


def python_accepts(ref: SampleRef) -> bool:
    try:
        python._check_slowly(ref)
    except ValueError:
        return False
    return True


def is_ascii(ref: SampleRef) -> bool:
    """Others are left to Python."""
    return (ref.sample_id + ref.store + ref.layout_hash).isascii()


def changed(value: Any, rng: random.Random) -> Any:
    if type(value) is int and rng.random() < 0.6:
        return value + rng.choice([-64, -1, 1, 64, 1 << 32, 1 << 63, -(1 << 70)])
    if isinstance(value, tuple) and value and rng.random() < 0.6:
        at = rng.randrange(len(value))
        return rng.choice([value[:at], value * 2, list(value), _with(value, at, rng)])
    return rng.choice([*HOSTILE, *NAMES, *TEXTS, *DTYPES, *ENCODINGS, (5,), (5, 64)])


def _with(values: tuple[Any, ...], at: int, rng: random.Random) -> tuple[Any, ...]:
    return (*values[:at], changed(values[at], rng), *values[at + 1 :])


def mutant(ref: SampleRef, rng: random.Random) -> SampleRef:
    if rng.random() < 0.3:
        name = rng.choice([f.name for f in fields(SampleRef) if f.name != "tensors"])
        return replace(ref, **{name: changed(getattr(ref, name), rng)})
    tensors = list(ref.tensors)
    at = rng.randrange(len(tensors))
    name = rng.choice([f.name for f in fields(TensorRef)])
    other = getattr(rng.choice(tensors), name)
    value = other if rng.random() < 0.2 else changed(getattr(tensors[at], name), rng)
    tensors[at] = replace(tensors[at], **{name: value})
    return replace(ref, tensors=tuple(tensors))


@pytest.mark.timeout(60 + NUM_INPUTS // 200)
def test_both_checks_agree() -> None:
    rng = random.Random(SEED)
    refs = [random_ref(rng) for _ in range(64)]
    accepted = 0
    for number in range(NUM_INPUTS):
        rng.seed(SEED + number)
        ref = rng.choice(refs)
        for _ in range(rng.choice([0, 1, 1, 1, 2])):
            ref = mutant(ref, rng)
        wanted = python_accepts(ref) and is_ascii(ref)
        assert _C.ref_is_valid(ref) == wanted, (number, ref)
        accepted += wanted
    assert NUM_INPUTS // 10 < accepted < NUM_INPUTS // 2


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_every_dtype_and_encoding_is_known_to_both(dtype: str, encoding: str) -> None:
    num_scales = {"h": 3} if encoding != "none" else {}
    shapes = [("input_ids", "int32", (5,)), ("loss_mask", "uint8", (5,)), ("h", dtype, (5, 6))]
    tensors = python.plan_tensors(shapes, num_scales=num_scales)  # type: ignore[arg-type]
    ref = SampleRef("id", "shm:1", 0, 1, "x", 5, tensors[-1].end, tensors)
    assert _C.ref_is_valid(ref) == python_accepts(ref)
    assert python_accepts(ref) == (encoding == "none" or dtype in python.FP8_DTYPES)


def test_values_of_subclasses_are_left_to_python() -> None:
    class Text(str):
        pass

    ref = replace(random_ref(random.Random(SEED)), sample_id=Text("id"))
    assert not _C.ref_is_valid(ref)
    check_ref(ref)


@pytest.mark.parametrize("ref", [None, 1, "ref"])
def test_what_is_no_ref(ref: Any) -> None:
    with pytest.raises(AttributeError, match="sample_id"):
        check_ref(ref)
