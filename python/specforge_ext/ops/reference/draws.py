"""What is drawn at random, from a key, a step and a sample alone."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor


def philox4x32(counter: Sequence[int], key: int) -> tuple[int, int, int, int]:
    """Four 32-bit words from four and a 64-bit key. Salmon et al., SC 2011: Philox4x32-10."""
    c, low, high, mask = list(counter), key & 0xFFFFFFFF, key >> 32, 0xFFFFFFFF
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(b >> 32) ^ c[1] ^ low, b & mask, (a >> 32) ^ c[3] ^ high, a & mask]
        low, high = (low + 0x9E3779B9) & mask, (high + 0xBB67AE85) & mask
    return c[0], c[1], c[2], c[3]


def draw_anchors(
    loss_mask_T: Tensor,
    cu_seqlens: Tensor,
    sample_keys: Tensor,
    *,
    seed: int,
    step: int,
    max_anchors: int,
) -> tuple[Tensor, Tensor]:
    """As ops.draw_anchors."""
    anchors: list[int] = []
    cu_anchors = [0]
    for key, (begin, end) in zip(sample_keys.tolist(), pairwise(cu_seqlens.tolist()), strict=True):
        words = key & 0xFFFFFFFF, key >> 32 & 0xFFFFFFFF
        drawn = []
        for t in range(begin, end - 1):
            if loss_mask_T[t] and loss_mask_T[t + 1]:
                low, high, *_ = philox4x32((t - begin, step, *words), seed)
                drawn.append((high << 32 | low, t))
        anchors += sorted(t for _, t in sorted(drawn)[:max_anchors])
        cu_anchors.append(len(anchors))
    return torch.tensor(anchors, dtype=torch.int32), torch.tensor(cu_anchors, dtype=torch.int32)


def cod_chains(
    loss_mask_T: Tensor,
    cu_seqlens: Tensor,
    sample_keys: Tensor,
    *,
    seed: int,
    step: int,
    num_depths: int,
    ratio: float,
    min_ratio: float,
) -> tuple[Tensor, ...]:
    """As ops.cod_chains."""
    anchors: list[list[int]] = [[] for _ in range(1, num_depths)]
    for key, (begin, end) in zip(sample_keys.tolist(), pairwise(cu_seqlens.tolist()), strict=True):
        words = key & 0xFFFFFFFF, key >> 32 & 0xFFFFFFFF
        valid = {t for t in range(begin, end) if loss_mask_T[t]}
        candidates = sorted(valid - {begin})
        for depth in range(1, num_depths):
            low, high, *_ = philox4x32((2**31 + depth, step, *words), seed)
            of_depth = high << 32 | low
            drawn = []
            for t in candidates:
                low, high, *_ = philox4x32((t - begin, step, *words), of_depth)
                drawn.append((high << 32 | low, t))
            wanted = int(max(0, len(valid) - depth) * max(ratio**depth, min_ratio))
            kept = sorted(t for _, t in sorted(drawn)[:wanted])
            anchors[depth - 1] += [t - depth for t in kept]
            candidates = [t + 1 for t in kept if t + 1 in valid]
    return tuple(torch.tensor(of_depth, dtype=torch.int32) for of_depth in anchors)
