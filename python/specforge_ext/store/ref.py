"""Refs as they come over a wire: everything is checked before anything is read or allocated.

Limits are on counts and names only; sizes are bounded by the store that holds the sample. Python's
integers do not overflow, and every one that passes here fits into 63 bits.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from dataclasses import fields
from typing import Any

from specforge_ext.records import DTYPES, SampleRef, TensorRef

ALIGN_BYTES = 64
"""Tensors begin at multiples of this within the sample's extent: a cache line, any vector load."""

MAX_JSON_CHARS = 64 << 10
MAX_TENSORS = 256
MAX_GENERATION = (1 << 40) - 1
_MAX_SIZE = (1 << 63) - 1
_PROMPT_DTYPES = {"input_ids": "int32", "loss_mask": "uint8"}
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.\-]{0,127}")
_TENSOR_KEYS = {field.name for field in fields(TensorRef)}
_SAMPLE_KEYS = {field.name for field in fields(SampleRef)}


def ref_from_json(text: str) -> SampleRef:
    """The inverse of `SampleRef.to_json`. ValueError names the key, what was wanted, what came."""
    if len(text) > MAX_JSON_CHARS:
        raise ValueError(f"ref: wanted at most {MAX_JSON_CHARS} characters, got {len(text)}")
    try:
        data = json.loads(text, object_pairs_hook=_unique_keys)
    except RecursionError:
        raise ValueError("ref: not valid JSON: nested too deeply") from None
    except ValueError as error:  # also integers beyond what Python converts
        raise ValueError(f"ref: not valid JSON: {error}") from None
    _expect_keys("ref", data, _SAMPLE_KEYS)
    if not isinstance(data["tensors"], list):
        raise _bad("ref.tensors", "a list", data["tensors"])
    tensors = tuple(_tensor_ref(f"ref.tensors[{i}]", t) for i, t in enumerate(data["tensors"]))
    ref = SampleRef(**{**data, "tensors": tensors})
    check_ref(ref)
    return ref


def check_ref(ref: SampleRef) -> None:
    """That a ref can be true of a store. ValueError names the key, what was wanted, what came."""
    _expect_text("ref.sample_id", ref.sample_id, 512)
    _expect_text("ref.store", ref.store, 128)
    _expect_text("ref.layout_hash", ref.layout_hash, 64)
    _expect_int("ref.slot", ref.slot, 0, (1 << 32) - 1)
    _expect_int("ref.generation", ref.generation, 1, MAX_GENERATION)
    _expect_int("ref.num_tokens", ref.num_tokens, 0, (1 << 31) - 1)
    _expect_int("ref.nbytes", ref.nbytes, 0, _MAX_SIZE)
    if not isinstance(ref.tensors, tuple) or len(ref.tensors) > MAX_TENSORS:
        raise _bad("ref.tensors", f"a tuple of at most {MAX_TENSORS}", ref.tensors)
    for i, tensor in enumerate(ref.tensors):
        _check_tensor(f"ref.tensors[{i}]", tensor, ref.num_tokens)
    names = [tensor.name for tensor in ref.tensors]
    if len(set(names)) != len(names) or not _PROMPT_DTYPES.keys() <= set(names):
        raise _bad("ref.tensors", "unique names, with input_ids and loss_mask", names)
    _check_extents(ref)


def plan_tensors(shapes: Iterable[tuple[str, str, tuple[int, ...]]]) -> tuple[TensorRef, ...]:
    """Lay (name, dtype, shape) end to end, each at a multiple of ALIGN_BYTES."""
    out = []
    end = 0
    for name, dtype, shape in shapes:
        offset = -(-end // ALIGN_BYTES) * ALIGN_BYTES
        nbytes = math.prod(shape) * DTYPES[dtype].itemsize
        out.append(TensorRef(name, dtype, shape, offset, nbytes))
        end = offset + nbytes
    return tuple(out)


def _tensor_ref(key: str, data: Any) -> TensorRef:
    _expect_keys(key, data, _TENSOR_KEYS)
    if not isinstance(data["shape"], list):
        raise _bad(f"{key}.shape", "a list", data["shape"])
    return TensorRef(**{**data, "shape": tuple(data["shape"])})


def _check_tensor(key: str, tensor: TensorRef, num_tokens: int) -> None:
    _expect_text(f"{key}.name", tensor.name, 128)
    if not _NAME.fullmatch(tensor.name):
        raise _bad(f"{key}.name", "letters, digits, '_', '.' and '-'", tensor.name)
    if not isinstance(tensor.dtype, str) or tensor.dtype not in DTYPES:
        raise _bad(f"{key}.dtype", f"one of {sorted(DTYPES)}", tensor.dtype)
    if tensor.encoding != "none":
        raise _bad(f"{key}.encoding", "'none'", tensor.encoding)
    if tensor.checksum is not None:
        _expect_int(f"{key}.checksum", tensor.checksum, 0, (1 << 32) - 1)
    _check_shape(key, tensor, num_tokens)
    _expect_int(f"{key}.offset", tensor.offset, 0, _MAX_SIZE)
    if tensor.offset % ALIGN_BYTES:
        raise _bad(f"{key}.offset", f"a multiple of {ALIGN_BYTES}", tensor.offset)
    wanted = math.prod(tensor.shape) * DTYPES[tensor.dtype].itemsize
    _expect_int(f"{key}.nbytes", tensor.nbytes, 0, _MAX_SIZE)
    if tensor.nbytes != wanted:
        raise _bad(f"{key}.nbytes", f"{wanted}, the product of shape and item size", tensor.nbytes)


def _check_shape(key: str, tensor: TensorRef, num_tokens: int) -> None:
    rank = 1 if tensor.name in _PROMPT_DTYPES else 2
    if not isinstance(tensor.shape, tuple) or len(tensor.shape) != rank:
        raise _bad(f"{key}.shape", f"{rank} dimensions", tensor.shape)
    for i, size in enumerate(tensor.shape):
        _expect_int(f"{key}.shape[{i}]", size, 0, (1 << 31) - 1)
    if tensor.shape[0] != num_tokens:
        raise _bad(f"{key}.shape[0]", f"num_tokens, {num_tokens}", tensor.shape[0])
    dtype = _PROMPT_DTYPES.get(tensor.name, tensor.dtype)
    if tensor.dtype != dtype:
        raise _bad(f"{key}.dtype", f"{dtype!r} for {tensor.name}", tensor.dtype)


def _check_extents(ref: SampleRef) -> None:
    end = 0
    for tensor in sorted(ref.tensors, key=lambda t: (t.offset, t.nbytes)):
        if tensor.offset < end:
            raise _bad(f"ref {tensor.name}.offset", f"no overlap, at least {end}", tensor.offset)
        end = tensor.offset + tensor.nbytes
        if end > ref.nbytes:
            raise _bad(f"ref {tensor.name}", f"an end within nbytes, {ref.nbytes}", end)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        raise ValueError(f"wanted every key once, got {_short([key for key, _ in pairs])}")
    return out


def _expect_keys(key: str, data: Any, wanted: set[str]) -> None:
    if not isinstance(data, dict):
        raise _bad(key, "an object", data)
    if data.keys() != wanted:
        raise _bad(key, f"the keys {sorted(wanted)}", sorted(data))


def _expect_int(key: str, value: Any, low: int, high: int) -> None:
    if type(value) is not int or not low <= value <= high:
        raise _bad(key, f"an integer in {low}..{high}", value)


def _expect_text(key: str, value: Any, max_chars: int) -> None:
    if not isinstance(value, str) or not 0 < len(value) <= max_chars or not value.isprintable():
        raise _bad(key, f"1 to {max_chars} printable characters", value)


def _bad(key: str, wanted: str, got: object) -> ValueError:
    return ValueError(f"{key}: wanted {wanted}, got {_short(got)}")


def _short(value: object) -> str:
    """What came may be huge or hostile: ASCII, and not much of it."""
    if isinstance(value, int) and value.bit_length() > 128:
        return f"an integer of {value.bit_length()} bits"
    text = ascii(value)
    return text if len(text) <= 120 else text[:117] + "..."
