"""What the target says about a packed batch, for drafts of the EAGLE-3 kind (arXiv 2503.01840).

The row at u, which has read the token at u + 1, is judged by the target's hidden row u + 1, if the
loss mask of u is 1. Legend of shapes: T tokens of a packed batch, H target hidden size, V / Vd
vocabularies of target and draft.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from specforge_ext.ops import DraftLoss, draft_first_permutation, teacher_stats
from specforge_ext.records import DraftVocab, StepLoss


class Teacher(NamedTuple):
    """What the target says about the rows with loss mask 1.

    lse: [T] float32, nats, over the full vocabulary at the loss's temperature, 0 elsewhere.
    mask: [T] uint8, CPU, 1 where the row counts. labelled: [T] bool, CPU, where the loss mask is 1
    and the sample has a next row.
    """

    lse: Tensor
    mask: Tensor
    labelled: Tensor


class ScoredSums(NamedTuple):
    """loss: sums over rows. labelled: [L] float64, rows of each step or depth whose loss mask is 1,
    wherever the target's first choice lies.
    """

    loss: DraftLoss
    labelled: Tensor

    def as_step(self, weight_sum: Tensor) -> StepLoss:
        """Metrics [L]: loss, accepted (sums over `rows`), correct (over `scored`, the labelled
        ones), rows, scored.
        """
        loss = self.loss
        return StepLoss(
            loss_sum=loss.loss_sum,
            weight_sum=weight_sum,
            metrics={
                "loss": loss.step_loss,
                "accepted": loss.step_accepted,
                "correct": loss.step_correct,
                "rows": loss.step_rows,
                "scored": self.labelled,
            },
            ratios={"loss": "rows", "accepted": "rows", "correct": "scored"},
        )


@torch.no_grad()
def teacher_of(
    loss_mask: Tensor,
    last: Tensor,
    lengths: Sequence[int],
    *,
    head: Tensor,
    draft_vocab_size: int,
    temperature: float,
) -> Teacher:
    """loss_mask [T] uint8, last [T, H] after the final norm, head [V, H] from `draft_first`.

    Reads `last` only where the loss mask of the position before is 1.
    """
    labelled = labelled_rows(loss_mask, lengths)
    rows = labelled.nonzero()[:, 0].to(last.device)
    hidden = last.index_select(0, rows + 1).to(head.dtype)
    row_lse, argmax = teacher_stats(hidden, head, temperature=temperature)
    lse = row_lse.new_zeros(loss_mask.shape[0]).index_copy_(0, rows, row_lse)
    mask = labelled.to(torch.uint8)
    mask[labelled] = (argmax < draft_vocab_size).cpu().to(torch.uint8)
    return Teacher(lse=lse, mask=mask, labelled=labelled)


def labelled_rows(loss_mask: Tensor, lengths: Sequence[int]) -> Tensor:
    """[T] bool, CPU: where the loss mask is 1 and the sample has a next row."""
    return loss_mask.cpu().bool() & ~_last_of_sample(lengths)


def draft_first(head: Tensor, vocab: DraftVocab) -> Tensor:
    """Rows of the head [V, H], the draft's tokens first, both parts in ascending order."""
    if vocab.is_full:
        return head.detach()
    return head.detach().index_select(0, draft_first_permutation(vocab.t2d).to(head.device))


def _last_of_sample(lengths: Sequence[int]) -> Tensor:
    """[T] bool, CPU."""
    out = torch.zeros(sum(lengths), dtype=torch.bool)
    ends = torch.tensor([n for n in lengths if n], dtype=torch.int64).cumsum(0)
    out[ends - 1] = True
    return out


def tokens_at(input_ids: Tensor, rows: Tensor, shift: int) -> Tensor:
    """Token ids `shift` after each row. Beyond the batch: the last one, for rows that score
    nothing.
    """
    return input_ids.index_select(0, (rows + shift).clamp_max(input_ids.shape[0] - 1))
