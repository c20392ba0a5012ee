"""The definition of the wire encoding in plain torch and Python. Legend: N rows, W width."""

from __future__ import annotations

import torch
from torch import Tensor

E4M3_MAX = 448.0
MIN_AMAX = E4M3_MAX * 2.0**-126
_POLYNOMIAL = 0x82F63B78


def fp8_pack(x_NW: Tensor) -> tuple[Tensor, Tensor]:
    """(payload [N, W] uint8, scale [N] float32). x: any float dtype, [N, W]."""
    x_NW = x_NW.float()
    finite_N = x_NW.isfinite().all(dim=1)
    clean_NW = torch.where(finite_N[:, None], x_NW, 0)
    amax_N = clean_NW.abs().amax(dim=1) if x_NW.shape[1] else x_NW.new_zeros(len(x_NW))
    scale_N = torch.where(amax_N == 0, 1.0, amax_N.clamp_min(MIN_AMAX) / E4M3_MAX)
    codes_NW = (clean_NW * (1 / scale_N)[:, None]).to(torch.float8_e4m3fn).view(torch.uint8)
    payload_NW = torch.where(finite_N[:, None], codes_NW, 0x7F)
    return payload_NW, torch.where(finite_N, scale_N, torch.nan)


def fp8_unpack(payload_NW: Tensor, scale_N: Tensor, dtype: torch.dtype) -> Tensor:
    """[N, W] of `dtype`."""
    return (payload_NW.view(torch.float8_e4m3fn).float() * scale_N[:, None]).to(dtype)


def fp8_crc(payload_NW: Tensor, scale_N: Tensor) -> int:
    """crc32c of the payload's bytes, then the scales'."""
    scales = scale_N.cpu().contiguous().view(torch.uint8)
    return crc32c(bytes(payload_NW.cpu().flatten().tolist()) + bytes(scales.tolist()))


def crc32c(data: bytes) -> int:
    """Bit by bit (RFC 3720, section B.4)."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (_POLYNOMIAL if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF
