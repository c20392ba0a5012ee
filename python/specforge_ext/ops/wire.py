"""The wire encoding `fp8_e4m3_row`: e4m3 codes, one float32 scale per token and layer, one crc32c;
and the crc32c of bytes that are not encoded.

Definition: csrc/wire/{fp8_rows,bytes_crc}.h, and in plain torch `ops.reference.wire`.
Legend: T tokens, L layers, W width of a layer; N = T * L rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from specforge_ext import _C
from specforge_ext.ops._native import check, stream_of

_CRC_PART_BYTES = 64 << 10
"""kCrcPartBytes (csrc/wire/bytes_crc.h)."""
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class CorruptRows(ValueError):
    """The checksum of what came is not the one that was sent."""


@dataclass(frozen=True)
class Fp8Rows:
    """payload: [T, L * W] uint8, the bits of float8_e4m3fn. scale: [T, L] float32. crc: crc32c of
    the payload's bytes followed by those of the scales; None: not computed, not checked."""

    payload: Tensor
    scale: Tensor
    crc: int | None


def _pack(x_NW: Tensor, payload: Tensor, scale: Tensor, checksum: bool) -> Tensor:
    row_crc, summary = _workspace(scale)
    _C.fp8_pack(x_NW, payload, scale, row_crc, summary, checksum, stream_of(x_NW))
    return summary


def _unpack(payload_NW: Tensor, scale_N: Tensor, y: Tensor, checksum: bool) -> Tensor:
    row_crc, summary = _workspace(scale_N)
    _C.fp8_unpack(payload_NW, scale_N, y, row_crc, summary, checksum, stream_of(y))
    return summary


# What torch.compile traces. Called directly, a registered op costs 50 us: as much as 500 KiB do.
_pack_op = torch.library.custom_op(
    "specforge_ext::fp8_pack_", _pack, mutates_args=("payload", "scale")
)
_unpack_op = torch.library.custom_op("specforge_ext::fp8_unpack_", _unpack, mutates_args=("y",))


@_pack_op.register_fake
def _(x_NW: Tensor, payload: Tensor, scale: Tensor, checksum: bool) -> Tensor:
    return scale.new_empty(2, dtype=torch.int64)


@_unpack_op.register_fake
def _(payload_NW: Tensor, scale_N: Tensor, y: Tensor, checksum: bool) -> Tensor:
    return scale_N.new_empty(2, dtype=torch.int64)


def _workspace(scale_N: Tensor) -> tuple[Tensor, Tensor]:
    return (
        scale_N.new_empty(scale_N.shape, dtype=torch.int32),
        scale_N.new_empty(2, dtype=torch.int64),
    )


def crc32c(data: Tensor) -> int:
    """Of bytes where they lie: [nbytes] uint8, contiguous, on the CPU or a GPU.

    Waits for the device. ValueError for another tensor, or for one on a GPU if this was built
    without CUDA.
    """
    part_crc = data.new_empty(-(-data.numel() // _CRC_PART_BYTES), dtype=torch.int32)
    crc = data.new_empty(1, dtype=torch.int64)
    _C.bytes_crc(data, part_crc, crc, stream_of(data))
    return int(crc)


def fp8_pack(
    x: Tensor,
    *,
    layers: int = 1,
    checksum: bool = True,
    out: tuple[Tensor, Tensor] | None = None,
) -> Fp8Rows:
    """Quantise a feature: each token's L layers get a scale each.

    x: [T, L * W] float32, bfloat16 or float16, contiguous.
    out: (payload [T, L * W] uint8, scale [T, L] float32), contiguous, to write into; else they are
        allocated on the device of x.
    Waits for the device. ValueError if a value is not finite (it names the first token and layer;
    `out` is written all the same), or if a tensor does not fit.
    """
    _check_feature("fp8_pack", x, x.shape, layers)
    if out is None:
        out = x.new_empty(x.shape, dtype=torch.uint8), _new_scale(x, layers)
    payload, scale = out
    _check_encoded("fp8_pack", payload, scale, x.shape, layers)
    rows = (x.shape[0] * layers, x.shape[1] // layers)
    pack = _pack_op if torch.compiler.is_compiling() else _pack
    summary = pack(x.view(rows), payload.view(rows), scale.view(-1), checksum)
    crc, not_finite = summary.tolist()
    if not_finite:
        token, layer = divmod(int(scale.view(-1).isnan().nonzero()[0]), layers)
        raise ValueError(
            f"fp8_pack: x must be finite, got NaN or infinity in {not_finite} of "
            f"{scale.numel()} rows, first in token {token}, layer {layer}"
        )
    return Fp8Rows(payload, scale, crc if checksum else None)


def fp8_unpack(
    rows: Fp8Rows, *, dtype: torch.dtype = torch.bfloat16, out: Tensor | None = None
) -> Tensor:
    """The feature [T, L * W] that `rows` hold: float(code) * scale, rounded to nearest even.

    out: where to write, contiguous, of any of the three dtypes; else a new tensor of `dtype`.
    Waits for the device if there is a checksum. CorruptRows (a ValueError) if it is not that of
    the bytes: `out` then holds what those bytes decode to. ValueError if a tensor does not fit.
    """
    shape = rows.payload.shape
    layers = rows.scale.shape[-1] if rows.scale.dim() == 2 else 0
    if out is None:
        out = rows.payload.new_empty(shape, dtype=dtype)
    _check_feature("fp8_unpack", out, shape, layers)
    _check_encoded("fp8_unpack", rows.payload, rows.scale, shape, layers)
    row_shape = (shape[0] * layers, shape[1] // layers)
    checksum = rows.crc is not None
    unpack = _unpack_op if torch.compiler.is_compiling() else _unpack
    summary = unpack(
        rows.payload.view(row_shape), rows.scale.view(-1), out.view(row_shape), checksum
    )
    if rows.crc is not None and (came := int(summary[0])) != rows.crc:
        raise CorruptRows(f"fp8_unpack: wanted crc32c {rows.crc:08x}, got {came:08x}")
    return out


def _new_scale(x: Tensor, layers: int) -> Tensor:
    return x.new_empty(x.shape[0], layers, dtype=torch.float32)


def _check_feature(op: str, feature: Tensor, shape: torch.Size, layers: int) -> None:
    if len(shape) != 2 or layers < 1 or shape[1] % layers:
        raise ValueError(
            f"{op}: wanted [tokens, layers * width], got {list(shape)} and {layers} layers"
        )
    check(op, "feature", feature, tuple(shape), *_FLOATS)
    _check_contiguous(op, "feature", feature)


def _check_encoded(op: str, payload: Tensor, scale: Tensor, shape: torch.Size, layers: int) -> None:
    check(op, "payload", payload, tuple(shape), torch.uint8)
    check(op, "scale", scale, (shape[0], layers), torch.float32)
    _check_contiguous(op, "payload", payload)
    _check_contiguous(op, "scale", scale)


def _check_contiguous(op: str, name: str, tensor: Tensor) -> None:
    if not tensor.is_contiguous():
        raise ValueError(
            f"{op}: {name} must be contiguous, got {list(tensor.shape)} "
            f"with strides {list(tensor.stride())}"
        )
