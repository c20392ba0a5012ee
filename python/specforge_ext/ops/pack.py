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
    scales: Sequence[Sequence[Tensor | None]] = (),
    dtype: torch.dtype | Sequence[torch.dtype] = torch.bfloat16,
    device: torch.device | str = "cpu",
    pin_memory: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, tuple[Tensor, ...]]:
    """N samples end to end, without padding.

    Returns ids [T] int64, mask [T] uint8, positions [T] int64 (from 0 in each sample), cu_seqlens
    [N + 1] int32, and each feature [T, width].
    ids[k]: [S_k] int32. masks[k]: [S_k] uint8. features[k][f]: [S_k, width_f], any dtype, the same
    for all k. Each byte is read and written once.
    scales[k][f]: None, or [S_k, groups] float32: features[k][f] is then fp8 (e4m3fn, as uint8 or
    torch.float8_e4m3fn) with one scale per group of width_f / groups elements, and is decoded to
    `dtype` (one for all, or one a feature): float32, bfloat16 or, on the CPU, float16. A feature
    that is encoded in one sample may be plain in another, of dtype `dtype`.
    device: where the batch is made. "cpu": of CPU tensors; pin_memory allocates page-locked
    outputs, for copies to a GPU. A CUDA device: of tensors on it or in page-locked host memory, on
    the current stream, without a synchronisation; sources must stay unchanged until it has passed.
    ValueError names the sample and the tensor that does not fit; at least one sample is needed.
    """
    if not ids:
        raise ValueError("pack_samples: wanted at least one sample, got none")
    sizes = (len(ids), len(masks), len(features), len(scales) or len(ids))
    if len(set(sizes)) != 1:
        raise ValueError(
            f"pack_samples: wanted ids, masks, features and scales of as many samples, "
            f"got {sizes[0]}, {sizes[1]}, {sizes[2]} and {sizes[3]}"
        )
    place = torch.device(device)
    if place.type == "cuda":
        _expect_reachable([*ids, *masks, *(t for row in (*features, *scales) for t in row)])
    total = sum(len(sample) for sample in ids)

    def empty(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=place, pin_memory=pin_memory)

    out_ids, out_mask = empty(total, dtype=torch.int64), empty(total, dtype=torch.uint8)
    positions = empty(total, dtype=torch.int64)
    cu_seqlens = empty(len(ids) + 1, dtype=torch.int32)
    dtypes = [dtype] * len(features[0]) if isinstance(dtype, torch.dtype) else dtype
    out = [
        empty(total, first.shape[-1], dtype=decoded if _is_encoded(scales, f) else first.dtype)
        for f, (first, decoded) in enumerate(zip(features[0], dtypes, strict=True))
    ]
    _C.pack_samples(
        list(ids),
        list(masks),
        [[_as_codes(tensor) for tensor in row] for row in features],
        [list(row) for row in scales],
        out_ids,
        out_mask,
        positions,
        cu_seqlens,
        out,
        stream_of(out_ids),
    )
    return out_ids, out_mask, positions, cu_seqlens, tuple(out)


def _is_encoded(scales: Sequence[Sequence[Tensor | None]], f: int) -> bool:
    """In any sample. A row of scales that is too short is refused by the kernel's checks."""
    return any(f < len(row) and row[f] is not None for row in scales)


def _as_codes(tensor: Tensor) -> Tensor:
    return tensor.view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else tensor


def _expect_reachable(tensors: Sequence[Tensor | None]) -> None:
    """A kernel that reads pageable memory would end the process's CUDA context."""
    for tensor in tensors:
        if tensor is None or tensor.device.type != "cpu" or not tensor.numel():
            continue
        if not tensor.is_pinned():
            raise ValueError(
                "pack_samples: on a CUDA device, wanted sources on it or in page-locked memory, "
                f"got a pageable CPU tensor of shape {list(tensor.shape)}"
            )
