"""What the ops return. Legend: T packed tokens, L TTT steps, R teacher rows, P pairs."""

from __future__ import annotations

from dataclasses import dataclass

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
    step_loss, step_correct, step_accepted, step_rows: [L] float64, detached: per step, the sums
        over the rows whose weight is not 0 of the UNWEIGHTED loss, of [student argmax == teacher
        argmax], of sum_v min(teacher, student), and of 1.
    """

    loss_sum: Tensor
    step_loss: Tensor
    step_correct: Tensor
    step_accepted: Tensor
    step_rows: Tensor


@dataclass(frozen=True)
class SoftCeRows:
    """loss, accepted: [rows] float32. correct: [rows] uint8. The gradient is in the logits."""

    loss: Tensor
    accepted: Tensor
    correct: Tensor


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
