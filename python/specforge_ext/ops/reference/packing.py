"""Which rows of a packed batch do what, and the batch itself."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from specforge_ext.ops.results import TttMaps


def ttt_maps(mask_T: Tensor, cu_seqlens: Tensor, ttt_length: int) -> TttMaps:
    """Straight from the definition: O(T * L^2) Python. See `TttMaps`."""
    mask, bounds = mask_T.tolist(), cu_seqlens.tolist()
    samples = [range(a, b) for a, b in pairwise(bounds)]
    for k, rows in enumerate(samples):
        if rows and mask[rows[-1]]:
            raise ValueError(
                "ttt_maps: mask must be 0 at the last position of every sample, "
                f"got 1 at the end of sample {k}"
            )

    def is_active(t: int, step: int, rows: range) -> bool:
        return any(t + j in rows and mask[t + j] for j in range(step, ttt_length))

    active = [
        [t for rows in samples for t in rows if is_active(t, step, rows)]
        for step in range(ttt_length)
    ]
    parent = [active[0]] + [
        [active[step - 1].index(t) for t in active[step]] for step in range(1, ttt_length)
    ]
    teacher_rows = [u for u in range(len(mask)) if mask[u]]
    pairs = [
        (u, step)
        for rows in samples
        for u in rows
        for step in range(ttt_length)
        if mask[u] and u - step in rows
    ]
    start = [sum(map(len, active[:step])) for step in range(ttt_length)]

    def to_tensor(values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=mask_T.device)

    return TttMaps(
        active=tuple(map(to_tensor, active)),
        parent=tuple(map(to_tensor, parent)),
        pair_source=to_tensor([start[i] + active[i].index(u - i) for u, i in pairs]),
        pair_step=to_tensor([i for _, i in pairs]),
        pair_teacher=to_tensor([teacher_rows.index(u) for u, _ in pairs]),
        teacher_rows=to_tensor(teacher_rows),
    )


def pack_samples(
    ids: Sequence[Tensor],
    masks: Sequence[Tensor],
    features: Sequence[Sequence[Tensor]],
    *,
    scales: Sequence[Sequence[Tensor | None]] = (),
    dtype: torch.dtype = torch.bfloat16,
) -> tuple[Tensor, Tensor, Tensor, Tensor, tuple[Tensor, ...]]:
    """(ids [T] int64, mask [T] uint8, positions [T] int64, cu_seqlens [N + 1] int32, features).

    features[k][f] is feature f of sample k, with scales[k][f] where it is encoded. At least one
    sample.
    """
    lengths = torch.tensor([0] + [len(sample) for sample in ids])
    plain = [
        [
            tensor
            if not scales or scales[k][f] is None
            else decode_fp8(tensor, scales[k][f], dtype)
            for f, tensor in enumerate(row)
        ]
        for k, row in enumerate(features)
    ]
    return (
        torch.cat(list(ids)).long(),
        torch.cat(list(masks)),
        torch.cat([torch.arange(len(sample)) for sample in ids]),
        lengths.cumsum(0).to(torch.int32),
        tuple(torch.cat(list(columns)) for columns in zip(*plain, strict=True)),
    )


def decode_fp8(codes_SW: Tensor, scales_SG: Tensor | None, dtype: torch.dtype) -> Tensor:
    """[S, W] in `dtype`: the e4m3fn value of each code times the scale of its group."""
    assert scales_SG is not None
    values = codes_SW.view(torch.float8_e4m3fn).float()
    group_width = values.shape[1] // scales_SG.shape[1]
    return (values * scales_SG.repeat_interleave(group_width, dim=1)).to(dtype)
