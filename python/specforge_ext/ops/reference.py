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

from specforge_ext.ops.results import DraftLoss, KlSchedule, RowLoss, TttMaps


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


def own_keys_merge(
    query: Tensor,
    out: Tensor,
    lse: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    rows: Sequence[Tensor | None],
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The merged (out [n, Hq, D], lse [n, Hq]); shapes as in `ops.own_keys_merge_`.

    Computed in the dtype of lse, all steps' scores at once.
    """
    wide, groups = lse.dtype, keys[0].shape[1]
    q_wide = _grouped(query.to(wide), groups)
    scores = torch.stack(
        [
            (q_wide * _take(k, r).to(wide)[:, :, None]).sum(-1)
            for k, r in zip(keys, rows, strict=True)
        ]
    )
    scores = scores.mul_(scale).flatten(2)
    merged = torch.logaddexp(lse, torch.logsumexp(scores, dim=0))
    result = _grouped(out.to(wide) * (lse - merged).exp()[..., None], groups)
    weights = _grouped((scores - merged).exp_().movedim(0, -1), groups)
    for j, (v, r) in enumerate(zip(values, rows, strict=True)):
        result.addcmul_(weights[..., j, None], _take(v, r).to(wide)[:, :, None])
    return result.flatten(1, 2).to(query.dtype), merged


def own_keys_grads(
    grad_out: Tensor,
    query: Tensor,
    out: Tensor,
    lse: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    rows: Sequence[Tensor | None],
    scale: float,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """(what the own keys add to the gradient of query, in the dtype of lse; gradients of keys; of
    values).

    out, lse: merged. Shapes as in `ops.own_keys_grads_`.
    """
    wide, groups = lse.dtype, keys[0].shape[1]
    q, grad = _grouped(query.to(wide), groups), _grouped(grad_out.to(wide), groups)
    delta = (grad * _grouped(out.to(wide), groups)).sum(-1)
    grad_query = torch.zeros_like(q)
    grad_keys, grad_values = [], []
    for keys_j, values_j, r in zip(keys, values, rows, strict=True):
        k, v = (_take(x, r).to(wide)[:, :, None] for x in (keys_j, values_j))
        weight = ((q * k).sum(-1) * scale - _grouped(lse, groups)).exp()
        dscore = (weight * ((grad * v).sum(-1) - delta) * scale)[..., None]
        grad_query.addcmul_(dscore, k)
        grad_keys.append(_put((dscore * q).sum(2), r, keys_j))
        grad_values.append(_put((weight[..., None] * grad).sum(2), r, values_j))
    return grad_query.flatten(1, 2), grad_keys, grad_values


def _grouped(x: Tensor, groups: int) -> Tensor:
    """[n, Hq, ...] -> [n, Hkv, G, ...]."""
    return torch.unflatten(x, 1, (groups, -1))


def _take(x: Tensor, rows: Tensor | None) -> Tensor:
    return x if rows is None else x.index_select(0, rows)


def _put(grad: Tensor, rows: Tensor | None, like: Tensor) -> Tensor:
    """The inverse of `_take` for gradients: rows are distinct, the others get zero."""
    grad = grad.to(like.dtype)
    return grad if rows is None else torch.zeros_like(like).index_copy_(0, rows, grad)


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
