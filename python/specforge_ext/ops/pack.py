"""From samples to a packed batch, and from its mask to the rows that a draft runs and scores."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from specforge_ext import _C
from specforge_ext.ops._native import stream_of
from specforge_ext.ops.results import TttMaps


def ttt_maps(mask_T: Tensor, cu_seqlens: Tensor, ttt_length: int) -> TttMaps:
    """The row maps of `TttMaps` for a packed batch. Their sizes depend on the mask: one sync,
    and a break in the graph of torch.compile.

    mask: [T] uint8 or bool, 1 where a position is scored (its teacher's argmax is in the draft's
        vocabulary already). cu_seqlens: [N + 1] int32. Both on one device.
    ttt_length: L, 1 to 64 steps.
    ValueError if a sample's last position has mask 1 (it has no next hidden row to be its teacher),
    or a tensor does not fit. Definition: csrc/pack/ttt_maps.h.
    """
    mask_T, stream = mask_T.to(torch.uint8).contiguous(), stream_of(mask_T)
    counts = cu_seqlens.new_empty(ttt_length + 3, dtype=torch.int64)
    _C.ttt_counts(mask_T, cu_seqlens, counts, stream)
    *num_active, num_pairs, num_teachers, misplaced = counts.tolist()
    if misplaced >= 0:
        sample = int(torch.searchsorted(cu_seqlens.cpu(), misplaced, right=True)) - 1
        raise ValueError(
            f"ttt_maps: mask must be 0 at the last position of every sample, got 1 at the end of "
            f"sample {sample}, packed position {misplaced}"
        )
    total = sum(num_active)
    active, parent, source, step, teacher, teacher_rows = (
        cu_seqlens.new_empty(size, dtype=torch.int32)
        for size in (total, total - num_active[0], num_pairs, num_pairs, num_pairs, num_teachers)
    )
    _C.ttt_fill(
        mask_T, cu_seqlens, counts, active, parent, source, step, teacher, teacher_rows, stream
    )
    per_step = torch.split(active, num_active)
    return TttMaps(
        active=per_step,
        parent=(per_step[0], *torch.split(parent, num_active[1:])),
        pair_source=source,
        pair_step=step,
        pair_teacher=teacher,
        teacher_rows=teacher_rows,
    )


def pack_samples(
    ids: Sequence[Tensor],
    masks: Sequence[Tensor],
    features: Sequence[Sequence[Tensor]],
    *,
    pin_memory: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, tuple[Tensor, ...]]:
    """N samples end to end, without padding.

    Returns ids [T] int64, mask [T] uint8, positions [T] int64 (from 0 in each sample), cu_seqlens
    [N + 1] int32, and each feature [T, width].
    ids[k]: [S_k] int32. masks[k]: [S_k] uint8. features[k][f]: [S_k, width_f], any dtype, the same
    for all k. CPU tensors; each byte is copied once. pin_memory: allocate page-locked outputs, for
    copies to a GPU. ValueError names the sample and the tensor that does not fit; at least one
    sample is needed.
    """
    if not ids:
        raise ValueError("pack_samples: wanted at least one sample, got none")
    if not len(ids) == len(masks) == len(features):
        raise ValueError(
            f"pack_samples: wanted ids, masks and features of as many samples, "
            f"got {len(ids)}, {len(masks)} and {len(features)}"
        )
    total = sum(len(sample) for sample in ids)

    def empty(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, pin_memory=pin_memory)

    out_ids, out_mask = empty(total, dtype=torch.int64), empty(total, dtype=torch.uint8)
    positions = empty(total, dtype=torch.int64)
    cu_seqlens = empty(len(ids) + 1, dtype=torch.int32)
    out = [empty(total, first.shape[-1], dtype=first.dtype) for first in features[0]]
    _C.pack_samples(
        list(ids),
        list(masks),
        [list(row) for row in features],
        out_ids,
        out_mask,
        positions,
        cu_seqlens,
        out,
    )
    return out_ids, out_mask, positions, cu_seqlens, tuple(out)
