"""Refs as they come over a wire: everything is checked before anything is read or allocated.

Two wire forms of version 1, JSON for what people read and bytes for what they need not. Each spells
a ref in exactly one way and ends with its own crc32c, so that every flipped bit is refused: also
one in a text or a checksum, which would leave a ref that could be true.

Bytes, little endian; a text is its length in UTF-8 bytes as u16, then these:

    "SFxR"  version u16  num_tensors u16  slot u32  num_tokens u32  generation u64  nbytes u64
    sample_id text  store text  layout_hash text
    num_tensors times:
        name text  dtype text  encoding text  rank u8  rank sizes u32
        offset u64  nbytes u64  has_checksum u8  checksum u32, 0 if there is none
        num_scales u32  scales_offset u64, both 0 with encoding none
    crc32c u32 of all before

JSON: {"version":1, the fields of SampleRef in their order, "crc32c":...} in ASCII without spaces;
the crc32c is of the text up to the comma before it.

Limits are on counts and names only; sizes are bounded by the store that holds the sample. Python's
integers do not overflow, and every one that passes here fits into 63 bits.
"""

from __future__ import annotations

import json
import math
import re
import reprlib
import struct
from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields, replace
from types import MappingProxyType
from typing import Any

from specforge_ext import _C
from specforge_ext.records import DTYPES, ENCODINGS, FP8_DTYPES, SampleRef, TensorRef
from specforge_ext.store.base import UnknownEncoding

ALIGN_BYTES = 64
"""Tensors begin at multiples of this within the sample's extent: a cache line, any vector load."""

REF_VERSION = 1
REF_MAGIC = b"SFxR"
MAX_WIRE_BYTES = 128 << 10
"""More than any ref within the limits below has in either form."""
MAX_TENSORS = 256
MAX_GENERATION = (1 << 40) - 1
_MAX_SIZE = (1 << 63) - 1
_PROMPT_DTYPES = {"input_ids": "int32", "loss_mask": "uint8"}
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.\-]{0,127}")
_ENCODING_NAME = re.compile(r"[a-z0-9_]{1,32}")
_TENSOR_KEYS = {field.name for field in fields(TensorRef)}
_SAMPLE_KEYS = {field.name for field in fields(SampleRef)}
_START = struct.Struct("<4sH")
_HEAD = struct.Struct("<4sHHIIQQ")
_TENSOR_TAIL = struct.Struct("<QQBIIQ")
_CRC = struct.Struct("<I")


def ref_to_json(ref: SampleRef) -> str:
    """One line of ASCII. ValueError for a ref that `ref_from_json` would refuse."""
    check_ref(ref)
    body = json.dumps({"version": REF_VERSION, **asdict(ref)}, separators=(",", ":"))[:-1]
    return f'{body},"crc32c":{_C.crc32c(body.encode())}}}'


def ref_from_json(text: str) -> SampleRef:
    """The inverse of `ref_to_json`. ValueError names the key, what was wanted, what came."""
    if len(text) > MAX_WIRE_BYTES:
        raise ValueError(f"ref: wanted at most {MAX_WIRE_BYTES} characters, got {len(text)}")
    try:
        data = json.loads(text, object_pairs_hook=_unique_keys)
    except RecursionError:
        raise ValueError("ref: not valid JSON: nested too deeply") from None
    except ValueError as error:  # also integers beyond what Python converts
        raise ValueError(f"ref: not valid JSON: {error}") from None
    _expect_version(data)
    _expect_keys("ref", data, _SAMPLE_KEYS | {"version", "crc32c"})
    if not isinstance(data["tensors"], list):
        raise _bad("ref.tensors", "a list", data["tensors"])
    tensors = tuple(_tensor_ref(f"ref.tensors[{i}]", t) for i, t in enumerate(data["tensors"]))
    came = data["crc32c"]
    ref = SampleRef(**{**{key: data[key] for key in _SAMPLE_KEYS}, "tensors": tensors})
    wanted = ref_to_json(ref)
    if text != wanted:
        _expect_crc(came, _C.crc32c(text[: text.rfind(",")].encode(errors="replace")))
        raise ValueError("ref: wanted JSON as ref_to_json spells it, got another spelling")
    return ref


def ref_to_bytes(ref: SampleRef) -> bytes:
    """The binary form. ValueError for a ref that `ref_from_bytes` would refuse."""
    data = _C.ref_to_bytes(ref)
    return _to_bytes_slowly(ref) if data is None else data


def _to_bytes_slowly(ref: SampleRef) -> bytes:
    """Also of what the native form leaves to it: see `_check_slowly`."""
    check_ref(ref)
    counts = (len(ref.tensors), ref.slot, ref.num_tokens, ref.generation, ref.nbytes)
    parts = [_HEAD.pack(REF_MAGIC, REF_VERSION, *counts)]
    parts += [_text_bytes(text) for text in (ref.sample_id, ref.store, ref.layout_hash)]
    for tensor in ref.tensors:
        rank = len(tensor.shape)
        parts += [_text_bytes(text) for text in (tensor.name, tensor.dtype, tensor.encoding)]
        parts.append(struct.pack(f"<B{rank}I", rank, *tensor.shape))
        checksum = (tensor.checksum is not None, tensor.checksum or 0)
        scales = (tensor.num_scales, tensor.scales_offset)
        parts.append(_TENSOR_TAIL.pack(tensor.offset, tensor.nbytes, *checksum, *scales))
    body = b"".join(parts)
    return body + _CRC.pack(_C.crc32c(body))


def ref_from_bytes(data: bytes) -> SampleRef:
    """The inverse of `ref_to_bytes`. ValueError names the key, what was wanted, what came."""
    ref = _C.ref_from_bytes(data)
    return _from_bytes_slowly(data) if ref is None else ref


def _from_bytes_slowly(data: bytes) -> SampleRef:
    """Says what is wrong; also of what the native form leaves to it."""
    if not _HEAD.size + _CRC.size <= len(data) <= MAX_WIRE_BYTES:
        limits = f"{_HEAD.size + _CRC.size} to {MAX_WIRE_BYTES} bytes"
        raise ValueError(f"ref: wanted {limits}, got {len(data)}")
    magic, version = _START.unpack_from(data)
    if magic != REF_MAGIC:
        raise _bad("ref.magic", repr(REF_MAGIC), magic)
    _expect_version({"version": version})
    body = data[: -_CRC.size]
    [crc] = _CRC.unpack_from(data, len(body))
    _expect_crc(crc, _C.crc32c(body))
    return _ref_from_body(_Cursor(body))


def _ref_from_body(cursor: _Cursor) -> SampleRef:
    _, _, num_tensors, slot, num_tokens, generation, nbytes = cursor.take("ref", _HEAD)
    _expect_int("ref.num_tensors", num_tensors, 0, MAX_TENSORS)
    sample_id = cursor.take_text("ref.sample_id")
    store = cursor.take_text("ref.store")
    layout_hash = cursor.take_text("ref.layout_hash")
    tensors = tuple(_take_tensor(f"ref.tensors[{i}]", cursor) for i in range(num_tensors))
    if cursor.num_left:
        raise ValueError(f"ref: wanted no bytes after the last tensor, got {cursor.num_left}")
    ref = SampleRef(
        *(sample_id, store, slot, generation, layout_hash, num_tokens, nbytes), tensors=tensors
    )
    check_ref(ref)
    return ref


def _take_tensor(key: str, cursor: _Cursor) -> TensorRef:
    name = cursor.take_text(f"{key}.name")
    dtype = cursor.take_text(f"{key}.dtype")
    encoding = cursor.take_text(f"{key}.encoding")
    [rank] = cursor.take(f"{key}.rank", struct.Struct("<B"))
    _expect_int(f"{key}.rank", rank, 0, 2)
    shape = cursor.take(f"{key}.shape", struct.Struct(f"<{rank}I"))
    offset, nbytes, has_checksum, checksum, *scales = cursor.take(key, _TENSOR_TAIL)
    _expect_int(f"{key}.has_checksum", has_checksum, 0, 1)
    if not has_checksum and checksum:
        raise _bad(f"{key}.checksum", "0, for it has none", checksum)
    head = (name, dtype, shape, offset, nbytes, encoding)
    return TensorRef(*head, checksum if has_checksum else None, *scales)


class _Cursor:
    """Reads fields one after the other; never beyond the end."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    @property
    def num_left(self) -> int:
        return len(self._data) - self._at

    def take(self, key: str, fields: struct.Struct) -> tuple[Any, ...]:
        return fields.unpack(self._take_bytes(key, fields.size))

    def take_text(self, key: str) -> str:
        [nbytes] = self.take(key, struct.Struct("<H"))
        data = self._take_bytes(key, nbytes)
        try:
            return data.decode()
        except UnicodeDecodeError:
            raise _bad(key, "UTF-8", data) from None

    def _take_bytes(self, key: str, nbytes: int) -> bytes:
        if nbytes > self.num_left:
            raise ValueError(f"{key}: wanted {nbytes} bytes, got {self.num_left} before the end")
        self._at += nbytes
        return self._data[self._at - nbytes : self._at]


def _text_bytes(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<H", len(data)) + data


def check_ref(ref: SampleRef) -> None:
    """That a ref can be true of a store. ValueError names the key, what was wanted, what came."""
    if not _C.ref_is_valid(ref):
        _check_slowly(ref)


def _check_slowly(ref: SampleRef) -> None:
    """Says what is wrong, and judges what the native check leaves to it: texts beyond ASCII, values
    of subclasses."""
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


def plan_tensors(
    shapes: Iterable[tuple[str, str, tuple[int, ...]]],
    *,
    num_scales: Mapping[str, int] = MappingProxyType({}),
) -> tuple[TensorRef, ...]:
    """Lay (name, dtype, shape) end to end, each at a multiple of ALIGN_BYTES.

    num_scales: of the tensors that are encoded, whose scales come after their codes.
    """
    out = []
    end = 0
    for name, dtype, shape in shapes:
        offset = _aligned(end)
        tensor = TensorRef(name, dtype, shape, offset, math.prod(shape) * DTYPES[dtype].itemsize)
        if name in num_scales:
            tensor = replace(
                tensor,
                encoding="fp8_e4m3_row",
                nbytes=math.prod(shape),
                num_scales=num_scales[name],
                scales_offset=_aligned(offset + math.prod(shape)),
            )
        out.append(tensor)
        end = tensor.end
    return tuple(out)


def _aligned(offset: int) -> int:
    return -(-offset // ALIGN_BYTES) * ALIGN_BYTES


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
    _check_encoding(f"{key}.encoding", tensor.encoding)
    if tensor.checksum is not None:
        _expect_int(f"{key}.checksum", tensor.checksum, 0, (1 << 32) - 1)
    _check_shape(key, tensor, num_tokens)
    _expect_offset(f"{key}.offset", tensor.offset)
    encoded = tensor.encoding != "none"
    wanted = math.prod(tensor.shape) * (1 if encoded else DTYPES[tensor.dtype].itemsize)
    _expect_int(f"{key}.nbytes", tensor.nbytes, 0, _MAX_SIZE)
    if tensor.nbytes != wanted:
        raise _bad(f"{key}.nbytes", f"{wanted}, the product of shape and item size", tensor.nbytes)
    if encoded:
        _check_scales(key, tensor)
    else:
        _expect_int(f"{key}.num_scales", tensor.num_scales, 0, 0)
        _expect_int(f"{key}.scales_offset", tensor.scales_offset, 0, 0)


def _check_encoding(key: str, encoding: Any) -> None:
    if not isinstance(encoding, str) or not _ENCODING_NAME.fullmatch(encoding):
        raise _bad(key, "1 to 32 small letters, digits and '_'", encoding)
    if encoding not in ENCODINGS:
        raise UnknownEncoding(key, encoding)


def _check_scales(key: str, tensor: TensorRef) -> None:
    if tensor.dtype not in FP8_DTYPES:
        wanted = f"one of {', '.join(FP8_DTYPES)} with encoding {tensor.encoding}"
        raise _bad(f"{key}.dtype", wanted, tensor.dtype)
    width = tensor.shape[1]
    _expect_int(f"{key}.num_scales", tensor.num_scales, 1, max(1, width))
    if width == 0 or width % tensor.num_scales:
        raise _bad(f"{key}.num_scales", f"a divisor of the width, {width}", tensor.num_scales)
    _expect_offset(f"{key}.scales_offset", tensor.scales_offset)


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
    extents = [(t.offset, t.nbytes, t.name) for t in ref.tensors]
    for t in ref.tensors:
        if t.num_scales:
            extents.append((t.scales_offset, t.scales_nbytes, f"{t.name}.scales"))
    end = 0
    for offset, nbytes, name in sorted(extents):
        if offset < end:
            raise _bad(f"ref {name}.offset", f"no overlap, at least {end}", offset)
        end = offset + nbytes
        if end > ref.nbytes:
            raise _bad(f"ref {name}", f"an end within nbytes, {ref.nbytes}", end)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        raise ValueError(f"wanted every key once, got {_short([key for key, _ in pairs])}")
    return out


def _expect_version(data: Any) -> None:
    """Before all else: another version may have other fields."""
    if not isinstance(data, dict):
        raise _bad("ref", "an object", data)
    version = data.get("version")
    if type(version) is not int or version != REF_VERSION:
        raise _bad("ref.version", f"{REF_VERSION}, the one this release reads", version)


def _expect_crc(wanted: object, came: int) -> None:
    if type(wanted) is not int or wanted != came:
        raise _bad("ref.crc32c", f"{came}, that of what came", wanted)


def _expect_keys(key: str, data: Any, wanted: set[str]) -> None:
    if not isinstance(data, dict):
        raise _bad(key, "an object", data)
    if data.keys() != wanted:
        raise _bad(key, f"the keys {sorted(wanted)}", sorted(data))


def _expect_int(key: str, value: Any, low: int, high: int) -> None:
    if type(value) is not int or not low <= value <= high:
        raise _bad(key, f"an integer in {low}..{high}", value)


def _expect_offset(key: str, value: Any) -> None:
    _expect_int(key, value, 0, _MAX_SIZE)
    if value % ALIGN_BYTES:
        raise _bad(key, f"a multiple of {ALIGN_BYTES}", value)


def _expect_text(key: str, value: Any, max_chars: int) -> None:
    if not isinstance(value, str) or not 0 < len(value) <= max_chars or not value.isprintable():
        raise _bad(key, f"1 to {max_chars} printable characters", value)


def _bad(key: str, wanted: str, got: object) -> ValueError:
    return ValueError(f"{key}: wanted {wanted}, got {_short(got)}")


def _short(value: object) -> str:
    """What came may be huge, deep or hostile: ASCII, and not much of it."""
    if isinstance(value, int) and value.bit_length() > 128:
        return f"an integer of {value.bit_length()} bits"
    text = _SHORT.repr(value).encode("ascii", "backslashreplace").decode()
    return text if len(text) <= 120 else text[:117] + "..."


_SHORT = reprlib.Repr()
_SHORT.maxlevel = 3  # repr() of a list that JSON just accepted can exceed the recursion limit
_SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxdict = 16
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 120
