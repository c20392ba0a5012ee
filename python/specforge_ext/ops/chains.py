"""Chains of P-EAGLE (arXiv 2602.01469): which anchors look how deep. Legend: T packed tokens, N
samples, K depths.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specforge_ext import _C


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
    """K - 1 tensors, the anchors of depths 1 to K - 1: packed positions, ascending, int32.

    Anchor a of depth d stands for the row at a + d, whose loss mask is 1. At depth d a sample with
    V such positions keeps min(int(max(0, V - d) * max(ratio ** d, min_ratio)), candidates) rows,
    uniformly without replacement; candidates continue a chain kept at depth d - 1. The draw is a
    function of (seed, step, sample key, depth, offset in the sample) alone: neither the packing nor
    the number of ranks changes it. Depth 0 is every position.

    loss_mask_T: [T] uint8 or bool. cu_seqlens: [N + 1] int32. sample_keys: [N] int64, any 64 bits
    that tell a sample from all others. CPU tensors. 0 <= seed < 2^64, 0 <= step < 2^32, K >= 1.
    ValueError if one does not fit. Definition: csrc/pack/cod_chains.h.
    """
    if not 0 <= seed < 2**64:
        raise ValueError(f"cod_chains: seed must be in [0, 2^64), got {seed}")
    mask_T = loss_mask_T.to(torch.uint8).contiguous()
    depths = max(num_depths, 0)
    anchors = torch.empty(max(depths - 1, 0) * int(mask_T.count_nonzero()), dtype=torch.int32)
    cu_depths = torch.empty(depths, dtype=torch.int32)
    _C.cod_chains(mask_T, cu_seqlens, sample_keys, seed, step, ratio, min_ratio, anchors, cu_depths)
    sizes = cu_depths.diff().tolist()
    return torch.split(anchors[: sum(sizes)].clone(), sizes) if sizes else ()
