"""Rotary position embedding (RoFormer, arXiv 2104.09864) in the half-rotation layout of HF Llama.

Legend of shapes: n rows, D head dimension, R <= D columns of it that turn.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

ROPE_TYPES = ("default", "linear", "llama3")


class Rope:
    """Cosine and sine tables for positions.

    Not a module: a buffer would be rounded by `module.to(dtype)`, and positions of a few thousand
    need float32 frequencies.
    """

    def __init__(
        self, head_dim: int, *, theta: float, scaling: Mapping[str, object] | None = None
    ) -> None:
        """head_dim: R of the tables; less than a head's width turns its first R columns.

        ValueError if head_dim is odd or the scaling is of an unknown type or incomplete.
        """
        self.head_dim = head_dim
        self.inv_freq = inverse_frequencies(head_dim, theta=theta, scaling=scaling)

    def tables(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos, sin [n, 1, R] float32 for positions [n] of any integer dtype."""
        angles = positions[:, None].float() * self.inv_freq.to(positions.device)
        angles = torch.cat((angles, angles), dim=-1)[:, None]
        return angles.cos(), angles.sin()


def rotate(x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """x [n, heads, D], the first R columns turned by its rows' angles; computed in float32 or
    wider, returned in x's dtype.
    """
    cos, sin = tables
    if cos.shape[-1] < x.shape[-1]:
        width = cos.shape[-1]
        return torch.cat((rotate(x[..., :width], tables), x[..., width:]), dim=-1)
    wide = x if x.dtype == torch.float64 else x.float()
    low, high = wide.chunk(2, dim=-1)
    return (wide * cos + torch.cat((-high, low), dim=-1) * sin).to(x.dtype)


def inverse_frequencies(
    head_dim: int, *, theta: float, scaling: Mapping[str, object] | None = None
) -> Tensor:
    """[D / 2] float32, radians per position.

    scaling: HF's `rope_scaling` (or `rope_parameters`) of type default, linear or llama3.
    """
    if head_dim <= 0 or head_dim % 2:
        raise ValueError(f"rope head_dim: wanted a positive even number, got {head_dim}")
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    inv_freq = 1.0 / theta**exponents
    kind = rope_type(scaling)
    if scaling is None or kind == "default":
        return inv_freq
    if kind == "linear":
        return inv_freq / _number(scaling, "factor")
    return _llama3(inv_freq, scaling)


def rope_type(scaling: Mapping[str, object] | None) -> str:
    """One of ROPE_TYPES; ValueError names what came otherwise."""
    if scaling is None:
        return "default"
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in ROPE_TYPES:
        raise ValueError(f"rope_scaling.rope_type: wanted one of {list(ROPE_TYPES)}, got {kind!r}")
    return str(kind)


def _llama3(inv_freq: Tensor, scaling: Mapping[str, object]) -> Tensor:
    """Llama 3.1: wavelengths beyond the original context are stretched, with a linear ramp
    between.
    """
    factor = _number(scaling, "factor")
    low, high = _number(scaling, "low_freq_factor"), _number(scaling, "high_freq_factor")
    context = _number(scaling, "original_max_position_embeddings")
    if high <= low:
        raise ValueError(
            f"rope_scaling.high_freq_factor: wanted more than low_freq_factor {low}, got {high}"
        )
    turns = context * inv_freq / (2 * math.pi)
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return keep * inv_freq + (1 - keep) * inv_freq / factor


def _number(scaling: Mapping[str, object], key: str) -> float:
    value = scaling.get(key)
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < math.inf:
        raise ValueError(f"rope_scaling.{key}: wanted a positive number, got {value!r}")
    return float(value)
