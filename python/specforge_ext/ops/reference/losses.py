"""Row losses and what is summed of them. Legend: N rows, R teacher rows, V vocabulary (the draft's,
unless said), H and E widths.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from specforge_ext.ops.results import DraftLoss, KlSchedule, RowLoss


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


def _top_k(row: _Row, teacher_NV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The part of the soft cross entropy that the teacher's k largest words make, equals of the
    k-th included.
    """
    least_N1 = teacher_NV.topk(min(k, teacher_NV.shape[-1]), dim=-1).values[:, -1:]
    p = row.p * (teacher_NV >= least_N1)
    return -_times(p, row.log_q).sum(dim=-1), p.sum(dim=-1, keepdim=True) * row.q - p


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
    if spec.top_k:
        top_N, top_gradient_NV = _top_k(row, t_NW[:, :vocab], spec.top_k)
        loss_N = loss_N + spec.top_k_weight * top_N
        gradient_NV = gradient_NV + spec.top_k_weight * top_gradient_NV
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
    teacher_hidden_RG: Tensor | None = None,
    teacher_head_UG: Tensor | None = None,
    teacher_lse_R: Tensor | None = None,
    *,
    loss: RowLoss | str = "soft_ce",
    row_to_teacher: Tensor,
    row_weight: Tensor,
    row_step: Tensor,
    num_steps: int,
    teacher_argmax: Tensor | None = None,
    label: Tensor | None = None,
    kl_schedule: KlSchedule | None = None,
) -> DraftLoss:
    """`ops.draft_loss` with all logits at once, differentiable by torch's own autograd."""
    spec = RowLoss(loss) if isinstance(loss, str) else loss
    logits_NV = hidden_NH.masked_fill(row_weight[:, None] == 0, 0) @ head_VH.T
    teacher_RU = None
    if teacher_hidden_RG is not None and teacher_head_UG is not None:
        teacher_RU = teacher_hidden_RG @ teacher_head_UG.T

    def rows_of(spec: RowLoss, label: Tensor | None, kl_weight: Tensor | None) -> LossRows:
        return loss_rows(
            logits_NV,
            teacher_RU,
            loss=spec,
            row_to_teacher=row_to_teacher,
            weight=row_weight,
            teacher_lse=teacher_lse_R,
            teacher_argmax=teacher_argmax,
            label=label,
            kl_weight=kl_weight,
        )

    def sums_of(rows: LossRows) -> Tensor:
        return step_sums(
            rows.loss.detach(),
            rows.accepted.detach(),
            rows.correct,
            rows.top_prob.detach(),
            rows.entropy.detach(),
            row_weight,
            row_step,
            num_steps,
        )

    kl_weight_N = None
    if spec.kind == "lk_lambda":
        first = sums_of(rows_of(RowLoss("soft_ce", temperature=spec.temperature), None, None))
        acceptance_L = first[2] / first[3].clamp_min(1)
        kl_weight_L = (kl_schedule or KlSchedule()).weight(acceptance_L)
        kl_weight_N = kl_weight_L.to(row_weight.dtype)[row_step.long()]
    rows = rows_of(spec, label, kl_weight_N)
    sums_7L = sums_of(rows)
    return DraftLoss((row_weight * rows.loss).sum(), *sums_7L[:4], *sums_7L[5:])


def teacher_stats(hidden_RH: Tensor, head_VH: Tensor) -> tuple[Tensor, Tensor]:
    """(lse [R], argmax [R] int64) of hidden @ head.T over the full vocabulary."""
    lse_R, argmax_R = row_stats(hidden_RH @ head_VH.T)
    return lse_R, argmax_R.long()


def corrected_label_loss(
    hidden_NH: Tensor,
    head_VH: Tensor,
    act_NE: Tensor,
    correction_VE: Tensor,
    label_N: Tensor,
    weight_N: Tensor,
    *,
    base_share: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss_sum [], base losses [N], final losses [N]), in the dtype of `hidden`, by autograd."""
    base_NV = hidden_NH @ head_VH.detach().T
    final_NV = base_NV + act_NE @ correction_VE.T
    base_N, final_N = (
        torch.logsumexp(z, 1) - z.gather(1, label_N.long()[:, None])[:, 0]
        for z in (base_NV, final_NV)
    )
    mixed_N = (1 - base_share) * final_N + base_share * base_N
    return (weight_N * mixed_N).sum(), base_N.detach(), final_N.detach()
