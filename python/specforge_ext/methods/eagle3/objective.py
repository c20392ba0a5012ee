"""Which loss the scored rows of an EAGLE-3 step have, and what each row weighs.

Per row all losses are those of `ops.draft_loss`; this file sets their weights. Legend of shapes: P
scored rows, R teacher rows, H hidden size, Vd draft vocabulary, L steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from specforge_ext.methods._ttt_plan import TttPlan
from specforge_ext.methods.eagle3.config import Eagle3Config
from specforge_ext.ops import DraftLoss, KlSchedule, RowLoss, draft_loss

_ACCEPTANCE_LOSSES = ("lk_alpha", "lk_lambda")


@dataclass(frozen=True)
class ScoredRows:
    """student [P, H] and head [Vd, H]; teacher_hidden [R, Ht], teacher_head [Vd, Ht] and the
    target's logsumexp at the config's temperature, [R] float32 nats.
    """

    student: Tensor
    head: Tensor
    teacher_hidden: Tensor
    teacher_head: Tensor
    teacher_lse: Tensor

    def loss(
        self, plan: TttPlan, row_loss: RowLoss, step_weight: Tensor, **kl: Tensor | KlSchedule
    ) -> DraftLoss:
        return draft_loss(
            self.student,
            self.head,
            self.teacher_hidden,
            self.teacher_head,
            self.teacher_lse,
            loss=row_loss,
            row_to_teacher=plan.pair_teacher,
            row_weight=step_weight[plan.pair_step.long()],
            row_step=plan.pair_step,
            num_steps=step_weight.numel(),
            **kl,  # type: ignore[arg-type]
        )


def padded_positions(lengths: Sequence[int]) -> int:
    """Positions of these samples in a padded batch."""
    return len(lengths) * max(lengths, default=0)


def step_loss(
    config: Eagle3Config, rows: ScoredRows, plan: TttPlan, lengths: Sequence[int]
) -> DraftLoss:
    """Sum over rows and steps, to be divided by the config's denominator."""
    row_loss = RowLoss(
        config.loss,
        temperature=config.temperature,
        top_k=config.top_k or 0,
        top_k_weight=config.top_k_weight,
    )
    decay = torch.tensor(
        [config.step_decay**i for i in range(config.ttt_length)], device=rows.student.device
    )
    schedule = KlSchedule(scale=config.kl_scale, decay=config.kl_decay)
    if config.loss not in _ACCEPTANCE_LOSSES:
        return rows.loss(plan, row_loss, decay)
    if config.denominator == "scored":
        kl = {"kl_schedule": schedule} if config.loss == "lk_lambda" else {}
        return rows.loss(plan, row_loss, decay, **kl)
    # SpecForge divides the sum of KL by all positions, that of acceptance by the step's own rows.
    count = torch.bincount(plan.pair_step, minlength=config.ttt_length).clamp_min(1)
    mean = padded_positions(lengths) / count.float()
    if config.loss == "lk_alpha":
        return rows.loss(plan, row_loss, decay * mean)
    kl_weight = schedule.weight(_mean_acceptance(rows, plan, config))
    both = kl_weight + (1 - kl_weight) * mean
    return rows.loss(plan, row_loss, decay * both, step_kl_weight=kl_weight / both)


@torch.no_grad()
def _mean_acceptance(rows: ScoredRows, plan: TttPlan, config: Eagle3Config) -> Tensor:
    """[L] float32, over each step's rows; 0 for a step without any."""
    ones = torch.ones(config.ttt_length, device=rows.student.device)
    sums = rows.loss(plan, RowLoss("soft_ce", temperature=config.temperature), ones)
    return (sums.step_accepted / sums.step_rows.clamp_min(1)).float()
