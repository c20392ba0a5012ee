"""The definitions of the ops, in plain torch: slow, short, judged in float64.

Every function follows the dtype of its inputs, so that the same lines serve as the float64 truth
and as the same-dtype baseline. Legend: N rows, R teacher rows, V vocabulary (the draft's, unless
said), H width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from specforge_ext.ops.results import DraftLoss, RowLoss, TttMaps


def row_stats(logits_NV: Tensor) -> tuple[Tensor, Tensor]:
    """(logsumexp [N] in the dtype of the logits, argmax [N] int32, the lowest index on ties)."""
    return torch.logsumexp(logits_NV, dim=-1), lowest_argmax(logits_NV)


def lowest_argmax(logits_NV: Tensor) -> Tensor:
    """[N] int32. torch.argmax does not say which index it takes among equals."""
    is_max = logits_NV == logits_NV.amax(dim=-1, keepdim=True)
    return is_max.to(torch.uint8).argmax(dim=-1).to(torch.int32)


@dataclass(frozen=True)
class LossRows:
    """What `loss_rows` defines: the results of [N], and gradient [N, V] = d sum(weight loss)."""

    loss: Tensor
    accepted: Tensor
    correct: Tensor
    top_prob: Tensor
    entropy: Tensor
    gradient: Tensor


@dataclass(frozen=True)
class _Row:
    """One side of a comparison, per row: log q, q, log p, p, pt [N, V]; y, w [N, 1]; beta."""

    log_q: Tensor
    q: Tensor
    log_p: Tensor
    p: Tensor
    pt: Tensor
    onehot: Tensor
    w: Tensor
    beta: float


def _times(weight: Tensor, value: Tensor) -> Tensor:
    """weight * value where 0 * inf is 0."""
    return torch.where(weight == 0, torch.zeros_like(value), weight * value)


def _centred(q: Tensor, s: Tensor) -> Tensor:
    """q (s - sum q s)"""
    return _times(q, s - _times(q, s).sum(dim=-1, keepdim=True))


def _hard(row: _Row) -> tuple[Tensor, Tensor]:
    return -(row.onehot * row.log_q).sum(dim=-1), row.q - row.onehot


def _soft(row: _Row) -> tuple[Tensor, Tensor]:
    return -_times(row.p, row.log_q).sum(dim=-1), row.q - row.p


def _reverse_kl(row: _Row) -> tuple[Tensor, Tensor]:
    s = row.log_q - row.log_p
    return _times(row.q, s).sum(dim=-1), _centred(row.q, s)


def _jsd(row: _Row) -> tuple[Tensor, Tensor]:
    m = row.beta * row.p + (1 - row.beta) * row.q
    log_m = torch.log(m.clamp_min(torch.finfo(m.dtype).tiny))  # where p and q are both 0
    s = row.log_q - log_m
    from_p = _times(row.p, row.log_p - log_m).sum(dim=-1)
    from_q = _times(row.q, s).sum(dim=-1)
    gradient = (1 - row.beta) * _centred(row.q, s)
    return row.beta * from_p + (1 - row.beta) * from_q, gradient


def _l1(row: _Row) -> tuple[Tensor, Tensor]:
    difference = row.q - row.p
    return difference.abs().sum(dim=-1), _centred(row.q, torch.sign(difference))


def _overlap(row: _Row) -> Tensor:
    return torch.minimum(row.pt, row.q).sum(dim=-1)


def _lk_alpha(row: _Row) -> tuple[Tensor, Tensor]:
    a = _overlap(row)
    is_zero = a < torch.finfo(torch.float32).tiny
    safe = a.masked_fill(is_zero, 1)
    gradient = -_centred(row.q, (row.q < row.pt).to(row.q.dtype)) / safe[:, None]
    return -torch.log(safe), gradient.masked_fill(is_zero[:, None], 0)


def _lk_lambda(row: _Row) -> tuple[Tensor, Tensor]:
    kl, kl_gradient = _soft(row)
    w = row.w
    gradient = w * kl_gradient - (1 - w) * _centred(row.q, (row.q < row.pt).to(row.q.dtype))
    return w[:, 0] * kl + (1 - w[:, 0]) * (1 - _overlap(row)), gradient


_KINDS = {
    "hard_ce": _hard,
    "soft_ce": _soft,
    "reverse_kl": _reverse_kl,
    "jsd": _jsd,
    "l1": _l1,
    "lk_alpha": _lk_alpha,
    "lk_lambda": _lk_lambda,
}


def loss_rows(
    logits_NV: Tensor,
    teacher_RW: Tensor | None,
    *,
    loss: RowLoss | str = "soft_ce",
    row_to_teacher: Tensor,
    weight: Tensor,
    teacher_lse: Tensor | None = None,
    teacher_argmax: Tensor | None = None,
    label: Tensor | None = None,
    kl_weight: Tensor | None = None,
) -> LossRows:
    """`ops.loss_rows_` out of place: csrc/loss/loss_rows.h, line by line.

    The loss is differentiable by torch; `gradient` is the header's formula. A row of weight 0
    contributes exact zeros, whatever it or its teacher holds.
    """
    spec = RowLoss(loss) if isinstance(loss, str) else loss
    vocab, dtype = logits_NV.shape[1], logits_NV.dtype
    scored_N = weight != 0
    index_N = row_to_teacher.long()

    def of_rows(side_R: Tensor) -> Tensor:
        side_N = side_R[index_N]
        return side_N.masked_fill(~scored_N if side_N.ndim == 1 else ~scored_N[:, None], 0)

    z_NV = logits_NV.masked_fill(~scored_N[:, None], 0)
    scaled_NV = z_NV / spec.temperature
    t_NW = z_NV.detach() if teacher_RW is None else of_rows(teacher_RW)
    scaled_NW = t_NW / spec.temperature
    if teacher_lse is None:
        pt_NV = torch.softmax(scaled_NW, dim=-1)[:, :vocab]
        wanted_N = lowest_argmax(t_NW)
    else:
        pt_NV = torch.exp(scaled_NW[:, :vocab] - of_rows(teacher_lse)[:, None])
        wanted_N = (
            lowest_argmax(t_NW[:, :vocab]) if teacher_argmax is None else of_rows(teacher_argmax)
        )
    onehot_NV = torch.zeros_like(z_NV)
    if label is not None:
        onehot_NV = torch.nn.functional.one_hot(of_rows(label).long(), vocab).to(dtype)
    w_N1 = torch.zeros_like(z_NV[:, :1])
    if kl_weight is not None:
        w_N1 = kl_weight.masked_fill(~scored_N, 0)[:, None].to(dtype)
    row = _Row(
        log_q=torch.log_softmax(scaled_NV, dim=-1),
        q=torch.softmax(scaled_NV, dim=-1),
        log_p=torch.log_softmax(scaled_NW[:, :vocab], dim=-1),
        p=torch.softmax(scaled_NW[:, :vocab], dim=-1),
        pt=pt_NV,
        onehot=onehot_NV,
        w=w_N1,
        beta=spec.beta,
    )
    loss_N, gradient_NV = _KINDS[spec.kind](row)
    accepted_N = _overlap(row)
    if spec.kind == "hard_ce":
        accepted_N = (onehot_NV * row.q).sum(dim=-1)
        wanted_N = onehot_NV.argmax(dim=-1).to(torch.int32)
    if spec.hard_weight:
        hard_N, hard_gradient_NV = _hard(row)
        loss_N = loss_N + spec.hard_weight * hard_N
        gradient_NV = gradient_NV + spec.hard_weight * hard_gradient_NV

    def scored(values_N: Tensor) -> Tensor:
        return values_N.masked_fill(~scored_N, 0)

    gradient_NV = weight[:, None].to(dtype) * gradient_NV / spec.temperature
    return LossRows(
        loss=scored(loss_N),
        accepted=scored(accepted_N),
        correct=scored((lowest_argmax(z_NV) == wanted_N).to(torch.uint8)),
        top_prob=scored(row.q.amax(dim=-1)),
        entropy=scored(-_times(row.q, row.log_q).sum(dim=-1)),
        gradient=gradient_NV.masked_fill(~scored_N[:, None], 0),
    )


def step_sums(
    loss_N: Tensor,
    accepted_N: Tensor,
    correct_N: Tensor,
    top_prob_N: Tensor,
    entropy_N: Tensor,
    weight_N: Tensor,
    row_step_N: Tensor,
    num_steps: int,
) -> Tensor:
    """[7, L] float64: per step, sums in the order of csrc/loss/step_sums.h."""
    scored_N = weight_N != 0
    columns = (
        loss_N.double(),
        correct_N.double(),
        accepted_N.double(),
        torch.ones_like(loss_N, dtype=torch.float64),
        weight_N.double() * loss_N.double(),
        top_prob_N.double(),
        entropy_N.double(),
    )
    values_7N = torch.stack([column.masked_fill(~scored_N, 0) for column in columns])
    is_step_LN = row_step_N[None, :] == torch.arange(num_steps, device=row_step_N.device)[:, None]
    return values_7N @ is_step_LN.double().T


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
        rows = loss_rows(
            logits_NV,
            teacher_RV,
            row_to_teacher=row_to_teacher,
            weight=row_weight,
            teacher_lse=teacher_lse_R,
        )
        sums_7L = step_sums(
            rows.loss,
            rows.accepted,
            rows.correct,
            rows.top_prob,
            rows.entropy,
            row_weight,
            row_step,
            num_steps,
        )
        p_NV = torch.softmax(teacher_RV[row_to_teacher.long()], dim=-1)
        p_NV = p_NV.masked_fill(~scored_N[:, None], 0)
    # sum p = 1 on scored rows; on the others p, and with it the row's loss and gradient, are 0.
    loss_sum = -(row_weight[:, None] * p_NV * torch.log_softmax(logits_NV, dim=-1)).sum()
    return DraftLoss(loss_sum, sums_7L[0], sums_7L[1], sums_7L[2], sums_7L[3])


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
