"""Blocks of the DFlash family (arXiv 2602.06036): where they begin, which tiles of keys they see.

Legend: T packed tokens, N samples, A blocks, B rows of a block.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specforge_ext import _C
from specforge_ext.ops._native import stream_of
from specforge_ext.ops.results import BlockMaskTensors


def draw_anchors(
    loss_mask_T: Tensor,
    cu_seqlens: Tensor,
    sample_keys: Tensor,
    *,
    seed: int,
    step: int,
    max_anchors: int,
) -> tuple[Tensor, Tensor]:
    """Anchors [A] int32, packed positions ascending, and cu_anchors [N + 1] int32.

    A position is a candidate if it and its successor have loss mask 1 and lie in one sample. Of
    each sample's candidates at most `max_anchors` are drawn, uniformly without replacement, from
    (seed, step, sample key, offset in the sample) alone: neither the packing nor the number of
    ranks changes the draw.

    loss_mask_T: [T] uint8 or bool. cu_seqlens: [N + 1] int32. sample_keys: [N] int64, any 64 bits
    that tell a sample from all others. CPU tensors. 0 <= seed < 2^64, 0 <= step < 2^32.
    ValueError if one does not fit. Definition: csrc/pack/anchors.h.
    """
    if not 0 <= seed < 2**64:
        raise ValueError(f"draw_anchors: seed must be in [0, 2^64), got {seed}")
    mask_T = loss_mask_T.to(torch.uint8).contiguous()
    lengths = cu_seqlens.diff()
    room = int((lengths - 1).clamp(min=0, max=max(max_anchors, 0)).sum())
    anchors = torch.empty(room, dtype=torch.int32)
    cu_anchors = torch.empty(lengths.numel() + 1, dtype=torch.int32)
    _C.draw_anchors(mask_T, cu_seqlens, sample_keys, seed, step, max_anchors, anchors, cu_anchors)
    return anchors[: int(cu_anchors[-1])].clone(), cu_anchors


def block_mask_tensors(
    anchors: Tensor,
    cu_anchors: Tensor,
    cu_seqlens: Tensor,
    *,
    num_context: int,
    block_size: int,
    window: int | None = None,
    tile: tuple[int, int] = (128, 128),
) -> BlockMaskTensors:
    """Which tiles of block attention hold visible pairs, straight from the anchors.

    Queries are the A * B block rows, keys the T context rows followed by the block rows. A query at
    slot j of the block at anchor a sees the context rows of its sample before a and its own block;
    with `window`, the context rows from a + j - (window - 1) on and its own block up to itself.

    anchors: [A] int32, each inside its sample. cu_anchors, cu_seqlens: [N + 1] int32. On one
    device, CPU or CUDA. num_context: T. tile: queries and keys of a tile.
    ValueError if one does not fit. Definition: csrc/pack/block_mask.h, ops/reference.
    """
    if window is not None and window < 1:
        raise ValueError(f"block_mask: window must be at least 1 or None, got {window}")
    q_tile, kv_tile = tile
    queries = anchors.numel() * block_size
    rows = -(-queries // max(q_tile, 1))
    columns = -(-(num_context + queries) // max(kv_tile, 1))

    def lists(height: int, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        num, full_num = anchors.new_empty(height), anchors.new_empty(height)
        return num, anchors.new_empty(height, width), full_num, anchors.new_empty(height, width)

    kv, q = lists(rows, columns), lists(columns, rows)
    _C.block_mask(
        anchors,
        cu_anchors,
        cu_seqlens,
        num_context,
        block_size,
        window or 0,
        q_tile,
        kv_tile,
        list(kv),
        list(q),
        stream_of(anchors),
    )
    return BlockMaskTensors(*(x[None, None] for x in (*kv, *q)))
