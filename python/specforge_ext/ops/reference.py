"""The definitions of the ops, in plain torch: slow, short, judged in float64.

Every function follows the dtype of its inputs, so that the same lines serve as the float64 truth
and as the same-dtype baseline. Legend: N rows, R teacher rows, V vocabulary (the draft's, unless
said), H width.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from specforge_ext.ops.results import DraftLoss, TttMaps


def row_stats(logits_NV: Tensor) -> tuple[Tensor, Tensor]:
    """(logsumexp [N] in the dtype of the logits, argmax [N] int32, the lowest index on ties)."""
    return torch.logsumexp(logits_NV, dim=-1), lowest_argmax(logits_NV)


def lowest_argmax(logits_NV: Tensor) -> Tensor:
    """[N] int32. torch.argmax does not say which index it takes among equals."""
    is_max = logits_NV == logits_NV.amax(dim=-1, keepdim=True)
    return is_max.to(torch.uint8).argmax(dim=-1).to(torch.int32)


def soft_ce_rows(
    logits_NV: Tensor,
    teacher_RV: Tensor,
    row_to_teacher_N: Tensor,
    weight_N: Tensor,
    teacher_lse_R: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss [N], accepted [N], correct [N] uint8, d sum(weight * loss) / d logits [N, V]).

    loss = lse(z) - sum p z with p = softmax(teacher) over V; accepted = sum min(pt, softmax(z))
    with pt = exp(teacher - teacher_lse), teacher_lse the normaliser over the full vocabulary. A row
    of weight 0 contributes exact zeros, whatever it or its teacher holds.
    """
    scored_N = weight_N != 0
    index_N = row_to_teacher_N.long()
    z_NV = logits_NV.masked_fill(~scored_N[:, None], 0)
    t_NV = teacher_RV[index_N].masked_fill(~scored_N[:, None], 0)
    lse_N = teacher_lse_R[index_N].masked_fill(~scored_N, 0)
    q_NV, p_NV = torch.softmax(z_NV, dim=-1), torch.softmax(t_NV, dim=-1)
    loss_N = -(p_NV * torch.log_softmax(z_NV, dim=-1)).sum(dim=-1)
    accepted_N = torch.minimum(torch.exp(t_NV - lse_N[:, None]), q_NV).sum(dim=-1)
    correct_N = (lowest_argmax(z_NV) == lowest_argmax(t_NV)) & scored_N
    gradient_NV = weight_N[:, None] * (q_NV - p_NV)
    return (
        loss_N.masked_fill(~scored_N, 0),
        accepted_N.masked_fill(~scored_N, 0),
        correct_N.to(torch.uint8),
        gradient_NV.masked_fill(~scored_N[:, None], 0),
    )


def step_sums(
    loss_N: Tensor,
    accepted_N: Tensor,
    correct_N: Tensor,
    weight_N: Tensor,
    row_step_N: Tensor,
    num_steps: int,
) -> Tensor:
    """[5, L] float64: per step, sums of loss, correct, accepted, 1 and weight * loss."""
    scored_N = weight_N != 0
    columns = (
        loss_N.double(),
        correct_N.double(),
        accepted_N.double(),
        torch.ones_like(loss_N, dtype=torch.float64),
        weight_N.double() * loss_N.double(),
    )
    values_5N = torch.stack([column.masked_fill(~scored_N, 0) for column in columns])
    is_step_LN = row_step_N[None, :] == torch.arange(num_steps, device=row_step_N.device)[:, None]
    return values_5N @ is_step_LN.double().T


def draft_loss(
    hidden_NH: Tensor,
    head_VH: Tensor,
    teacher_hidden_RH: Tensor,
    teacher_head_VH: Tensor,
    teacher_lse_R: Tensor,
    *,
    row_to_teacher: Tensor,
    row_weight: Tensor,
    row_step: Tensor,
    num_steps: int,
) -> DraftLoss:
    """`ops.draft_loss` with all logits at once, differentiable by torch's own autograd."""
    scored_N = row_weight != 0
    hidden_NH = hidden_NH.masked_fill(~scored_N[:, None], 0)
    logits_NV = hidden_NH @ head_VH.T
    with torch.no_grad():
        teacher_RV = teacher_hidden_RH @ teacher_head_VH.T
        loss_N, accepted_N, correct_N, _ = soft_ce_rows(
            logits_NV, teacher_RV, row_to_teacher, row_weight, teacher_lse_R
        )
        sums_5L = step_sums(loss_N, accepted_N, correct_N, row_weight, row_step, num_steps)
        p_NV = torch.softmax(teacher_RV[row_to_teacher.long()], dim=-1)
        p_NV = p_NV.masked_fill(~scored_N[:, None], 0)
    # sum p = 1 on scored rows; on the others p, and with it the row's loss and gradient, are 0.
    loss_sum = -(row_weight[:, None] * p_NV * torch.log_softmax(logits_NV, dim=-1)).sum()
    return DraftLoss(loss_sum, sums_5L[0], sums_5L[1], sums_5L[2], sums_5L[3])


def teacher_stats(hidden_RH: Tensor, head_VH: Tensor) -> tuple[Tensor, Tensor]:
    """(lse [R], argmax [R] int64) of hidden @ head.T over the full vocabulary."""
    lse_R, argmax_R = row_stats(hidden_RH @ head_VH.T)
    return lse_R, argmax_R.long()


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
    ids: Sequence[Tensor], masks: Sequence[Tensor], features: Sequence[Sequence[Tensor]]
) -> tuple[Tensor, Tensor, Tensor, Tensor, tuple[Tensor, ...]]:
    """(ids [T] int64, mask [T] uint8, positions [T] int64, cu_seqlens [N + 1] int32, features).

    features[k][f] is feature f of sample k. At least one sample.
    """
    lengths = torch.tensor([0] + [len(sample) for sample in ids])
    return (
        torch.cat(list(ids)).long(),
        torch.cat(list(masks)),
        torch.cat([torch.arange(len(sample)) for sample in ids]),
        lengths.cumsum(0).to(torch.int32),
        tuple(torch.cat(list(columns)) for columns in zip(*features, strict=True)),
    )


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


def block_visibility(
    anchors: Tensor,
    cu_anchors: Tensor,
    cu_seqlens: Tensor,
    *,
    num_context: int,
    block_size: int,
    window: int | None = None,
) -> Tensor:
    """[A * B, T + A * B] bool: which keys a query of block attention sees (arXiv 2602.06036)."""
    blocks = anchors.numel()
    visible = torch.zeros(blocks * block_size, num_context + blocks * block_size, dtype=torch.bool)
    bounds = list(zip(pairwise(cu_anchors.tolist()), cu_seqlens.tolist(), strict=False))
    for (first, last), begin in bounds:
        for block in range(first, last):
            anchor, own = int(anchors[block]), num_context + block * block_size
            for slot in range(block_size):
                row = visible[block * block_size + slot]
                if window is None:
                    row[begin:anchor] = row[own : own + block_size] = True
                else:
                    row[max(begin, anchor + slot - (window - 1)) : anchor] = True
                    row[own : own + slot + 1] = True
    return visible
