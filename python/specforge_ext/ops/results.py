"""What the ops return. Legend: T packed tokens, L TTT steps, R teacher rows, P pairs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TttMaps:
    """Which rows run and which are scored in training-time test (EAGLE-3, arXiv 2503.01840).

    With every index inside one sample: row t is active at step i iff mask[t + j] = 1 for some j in
    [i, L); position u with mask[u] = 1 is scored at step i by row u - i, which is a pair (u, i).

    active[i]: packed row indices, ascending. parent[i], i >= 1: where those rows lie within
        active[i - 1]; parent[0] is active[0], the place of its rows among all T.
    pair_source: [P] index into cat(active). pair_step: [P] i. pair_teacher: [P] index into
        teacher_rows, non-decreasing. Pairs are in order of (u, i).
    teacher_rows: [R] every u with mask[u] = 1, ascending. The hidden state that gives the teacher
        of u is row u + 1 of the packed batch, always in the same sample.
    All int32, on the device of the mask.
    """

    active: tuple[Tensor, ...]
    parent: tuple[Tensor, ...]
    pair_source: Tensor
    pair_step: Tensor
    pair_teacher: Tensor
    teacher_rows: Tensor

    @property
    def num_steps(self) -> int:
        return len(self.active)

    @property
    def num_active(self) -> tuple[int, ...]:
        return tuple(rows.numel() for rows in self.active)


@dataclass(frozen=True)
class DraftLoss:
    """Sums over rows; nothing is averaged.

    loss_sum: [] float32, sum of weight * loss in nats, differentiable in hidden and head.
    step_loss, step_correct, step_accepted, step_rows, step_top_prob, step_entropy: [L] float64,
        detached: per step, the sums over the rows whose weight is not 0 of the UNWEIGHTED loss, of
        [student argmax == teacher argmax], of sum_v min(teacher, student), of 1, of the student's
        largest probability and of its entropy in nats.
    """

    loss_sum: Tensor
    step_loss: Tensor
    step_correct: Tensor
    step_accepted: Tensor
    step_rows: Tensor
    step_top_prob: Tensor
    step_entropy: Tensor


@dataclass(frozen=True)
class RowLoss:
    """Which loss compares a draft's row with its teacher's. Checked where it is used.

    kind: "hard_ce", "soft_ce", "reverse_kl", "jsd", "l1", "lk_alpha" or "lk_lambda"
        (csrc/loss/loss_rows.h).
    temperature: divides both rows' logits, > 0. beta: the teacher's share of the JSD's mixture, in
        (0, 1). hard_weight: of the hard cross entropy that is added, >= 0.
    top_k, top_k_weight: with "soft_ce", the words whose teacher logit is at least the row's
        top_k-th largest of the draft's vocabulary count 1 + top_k_weight times, > 0 (HASS, arXiv
        2408.15766); 0: none. `draft_loss` only.
    """

    kind: str
    temperature: float = 1.0
    beta: float = 0.5
    hard_weight: float = 0.0
    top_k: int = 0
    top_k_weight: float = 1.0


@dataclass(frozen=True)
class LossRowsResult:
    """Per row, not weighted, [rows] each; all 0 where the weight is 0.

    loss: float32, nats. accepted: float32, chance that a token drawn from the draft is accepted.
    correct: uint8, whether the first choices agree. top_prob, entropy: float32, largest
    probability of the draft, and its entropy in nats.
    """

    loss: Tensor
    accepted: Tensor
    correct: Tensor
    top_prob: Tensor
    entropy: Tensor


@dataclass(frozen=True)
class KlSchedule:
    """How LK-lambda moves from KL to acceptance: the KL's weight is scale * exp(-decay * A), A the
    mean acceptance, 0 to 1 (arXiv 2602.23881).
    """

    scale: float = 1.0
    decay: float = 1.0

    def weight(self, acceptance: Tensor) -> Tensor:
        return self.scale * torch.exp(-self.decay * acceptance)


@dataclass(frozen=True)
class BlockMaskTensors:
    """The tensors of torch.nn.attention.flex_attention.BlockMask, int32.

    Q rows and K columns of tiles. kv_num_blocks: [1, 1, Q] partial tiles of a row. kv_indices:
    [1, 1, Q, K] their columns, ascending, then all others. full_*: tiles that are visible whole.
    q_*: the transpose, [1, 1, K] and [1, 1, K, Q].
    """

    kv_num_blocks: Tensor
    kv_indices: Tensor
    full_kv_num_blocks: Tensor
    full_kv_indices: Tensor
    q_num_blocks: Tensor
    q_indices: Tensor
    full_q_num_blocks: Tensor
    full_q_indices: Tensor
