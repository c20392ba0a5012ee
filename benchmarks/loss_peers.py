"""The loss of an EAGLE-3 step in plain torch and with SpecForge's functions.

As people run it: every step computes all tokens, and a mask multiplies what does not count
(`torch-eager`, `torch-compile`, `specforge`). Given our rows: only those that count
(`...-compacted`, `torch-chunked`). Legend: T tokens, L steps, N rows that count, R teachers, H
width, V draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from specforge_ext import ops

WIDTH, STEPS, SCORED, DECAY = 512, 7, 0.6, 0.8
CHUNK_ROWS = 256
"""Rows per checkpoint of torch-chunked: 32 MB of float32 logits at 32000 words."""


@dataclass(frozen=True)
class Rows:
    """N rows of all steps in order of their teacher, and the same among all T * L.

    The teacher of token t at step i is that of t + i.
    """

    hidden: Tensor  # [N, H]
    head: Tensor  # [V, H]
    teacher_hidden: Tensor  # [R, H]
    teacher_head: Tensor  # [V, H]
    teacher_lse: Tensor  # [R] float32, over the target's vocabulary
    row_to_teacher: Tensor  # [N] int32
    row_weight: Tensor  # [N] float32
    row_step: Tensor  # [N] int32
    all_hidden: Tensor  # [L, T, H]
    all_teacher_hidden: Tensor  # [T, H]
    all_teacher_lse: Tensor  # [T]
    mask: Tensor  # [T] float32
    place: Tensor  # [N]: all_hidden.flatten(0, 1)[place] is hidden
    label: Tensor  # [R] int32, a token of the draft's vocabulary


Loss = Callable[[Rows], tuple[Tensor, Tensor]]
"""(loss [], sums [4, L] without gradient: loss, correct, accepted, 1)."""


def make_rows(
    *, tokens: int, dtype: torch.dtype, draft_vocab: int, vocab: int, decay: float = DECAY
) -> Rows:
    generator = torch.Generator().manual_seed(0)
    mask = (torch.rand(tokens, generator=generator) < SCORED).to(torch.uint8)
    mask[-1] = 0
    maps = ops.ttt_maps(mask, torch.tensor([0, tokens], dtype=torch.int32), STEPS)

    def randn(*shape: int, scale: float) -> Tensor:
        return torch.randn(*shape, generator=generator).mul_(scale).to(dtype)

    head = randn(draft_vocab, WIDTH, scale=WIDTH**-0.5)
    target_head = randn(vocab, WIDTH, scale=3 * WIDTH**-0.5)
    teacher_hidden = randn(tokens, WIDTH, scale=1.0)
    lse, _ = ops.teacher_stats(teacher_hidden, target_head, workspace_bytes=8 << 20)
    teachers = maps.teacher_rows.long()
    step = maps.pair_step.long()
    place = step * tokens + teachers[maps.pair_teacher.long()] - step
    hidden = randn(STEPS, tokens, WIDTH, scale=1.0)
    return Rows(
        hidden=hidden.flatten(0, 1)[place].requires_grad_(),
        head=head.requires_grad_(),
        teacher_hidden=teacher_hidden[teachers],
        teacher_head=target_head[:draft_vocab].clone(),
        teacher_lse=lse[teachers],
        row_to_teacher=maps.pair_teacher,
        row_weight=decay ** step.float(),
        row_step=maps.pair_step,
        all_hidden=hidden.requires_grad_(),
        all_teacher_hidden=teacher_hidden,
        all_teacher_lse=lse,
        mask=mask.float(),
        place=place,
        label=torch.randint(0, draft_vocab, teachers.shape, generator=generator).int(),
    )


def _row_terms(
    logits: Tensor, p: Tensor, in_full: Tensor, teacher_argmax: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Per row: loss, and without gradient correct and accepted."""
    log_q = torch.log_softmax(logits.float(), dim=-1)
    row_loss = -(p * log_q).sum(dim=-1)
    with torch.no_grad():
        accepted = torch.minimum(in_full, log_q.exp()).sum(dim=-1)
        correct = (log_q.argmax(dim=-1) == teacher_argmax).float()
    return row_loss, correct, accepted


def _teacher(hidden: Tensor, head: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """p over the draft's vocabulary, the target's probabilities there, and its first choice."""
    with torch.no_grad():
        logits = (hidden @ head.T).float()
        in_full = torch.exp(logits - lse[:, None])
        return torch.softmax(logits, dim=-1), in_full, logits.argmax(dim=-1)


def _step(
    hidden: Tensor,
    head: Tensor,
    p: Tensor,
    in_full: Tensor,
    teacher_argmax: Tensor,
    mask: Tensor,
) -> tuple[Tensor, Tensor]:
    row_loss, *rest = _row_terms(hidden @ head.T, p, in_full, teacher_argmax)
    columns = torch.stack([row_loss.detach(), *rest, torch.ones_like(mask)])
    return (mask * row_loss).sum(), columns @ mask


def _all_rows(
    rows: Rows,
    teacher: Callable[..., tuple[Tensor, ...]],
    step: Callable[..., tuple[Tensor, Tensor]],
) -> tuple[Tensor, Tensor]:
    """Teachers once, padded by L rows, of which each step sees T; rows past the end are masked."""
    tokens = rows.mask.shape[0]
    columns = teacher(rows.all_teacher_hidden, rows.teacher_head, rows.all_teacher_lse)
    p, in_full, argmax = (F.pad(x, (0, 0) * (x.dim() - 1) + (0, STEPS)) for x in columns)
    mask = F.pad(rows.mask, (0, STEPS))
    losses, sums = [], []
    for i in range(STEPS):
        part = slice(i, i + tokens)
        loss, step_sums = step(
            rows.all_hidden[i], rows.head, p[part], in_full[part], argmax[part], mask[part]
        )
        losses.append(DECAY**i * loss)
        sums.append(step_sums)
    return torch.stack(losses).sum(), torch.stack(sums, dim=1)


def eager() -> Loss:
    return lambda rows: _all_rows(rows, _teacher, _step)


def compiled() -> Loss:
    teacher, step = (torch.compile(f, dynamic=False) for f in (_teacher, _step))
    return lambda rows: _all_rows(rows, teacher, step)


def specforge() -> Loss:
    """SpecForge 0.2.0's loss (the one that runs on a CPU, compiled) and acceptance, in its loop."""
    from specforge.core.lk_loss import compute_acceptance_rate
    from specforge.core.loss import _compute_loss

    def step(
        hidden: Tensor,
        head: Tensor,
        p: Tensor,
        in_full: Tensor,
        teacher_argmax: Tensor,
        mask: Tensor,
    ) -> tuple[Tensor, Tensor]:
        logits, position_mask = (hidden @ head.T)[None], mask[None, :, None]
        loss = _compute_loss(logits, p[None], position_mask) * mask.numel()
        with torch.no_grad():
            correct = ((logits[0].argmax(-1) == teacher_argmax) * mask).sum()
            rate, _ = compute_acceptance_rate(
                logits=logits, target_probs=in_full[None], position_mask=position_mask
            )
            scored = mask.sum()
        return loss, torch.stack([loss.detach(), correct, rate * scored, scored])

    return lambda rows: _all_rows(rows, _teacher, step)


def _compacted(
    hidden: Tensor,
    head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    teacher_lse: Tensor,
    row_to_teacher: Tensor,
    row_weight: Tensor,
    row_step: Tensor,
) -> tuple[Tensor, Tensor]:
    index = row_to_teacher.long()
    columns = _teacher(teacher_hidden, teacher_head, teacher_lse)
    row_loss, *rest = _row_terms(hidden @ head.T, *(x[index] for x in columns))
    sums = torch.stack([row_loss.detach(), *rest, torch.ones_like(row_weight)])
    return (row_weight * row_loss).sum(), torch.zeros(4, STEPS).index_add_(1, row_step, sums)


def _compacted_inputs(rows: Rows) -> tuple[Tensor, ...]:
    return tuple(vars(rows).values())[:8]


def eager_compacted() -> Loss:
    return lambda rows: _compacted(*_compacted_inputs(rows))


def compiled_compacted() -> Loss:
    loss = torch.compile(_compacted, dynamic=False)
    return lambda rows: loss(*_compacted_inputs(rows))


def chunked() -> Loss:
    """Our rows, CHUNK_ROWS at a time, each recomputed in backward."""

    def loss(rows: Rows) -> tuple[Tensor, Tensor]:
        losses, sums = [], []
        for start in range(0, rows.hidden.shape[0], CHUNK_ROWS):
            part = slice(start, start + CHUNK_ROWS)
            index = rows.row_to_teacher[part]
            teachers = slice(int(index[0]), int(index[-1]) + 1)
            chunk_loss, chunk_sums = checkpoint(
                _compacted,
                rows.hidden[part],
                rows.head,
                rows.teacher_hidden[teachers],
                rows.teacher_head,
                rows.teacher_lse[teachers],
                index - teachers.start,
                rows.row_weight[part],
                rows.row_step[part],
                use_reentrant=False,
            )
            losses.append(chunk_loss)
            sums.append(chunk_sums)
        return torch.stack(losses).sum(), torch.stack(sums).sum(dim=0)

    return loss


def linear_cross_entropy() -> Loss:
    """torch's own chunked head and cross entropy with labels; it takes no weights of rows."""
    options = torch.nn.LinearCrossEntropyOptions()

    def loss(rows: Rows) -> tuple[Tensor, Tensor]:
        label = rows.label[rows.row_to_teacher.long()].long()
        return F.linear_cross_entropy(
            rows.hidden, rows.head, label, reduction="sum", options=options
        ), torch.zeros(4, STEPS)

    return loss


def hard_eager() -> Loss:
    def loss(rows: Rows) -> tuple[Tensor, Tensor]:
        label = rows.label[rows.row_to_teacher.long()].long()
        logits = (rows.hidden @ rows.head.T).float()
        return F.cross_entropy(logits, label, reduction="sum"), torch.zeros(4, STEPS)

    return loss
