"""Which rows a step of multi-token prediction scores, and against what.

Legend of shapes: T tokens of a packed batch, P scored rows, R teacher rows, L steps, H hidden size,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from specforge_ext.methods._ttt_plan import TttPlan
from specforge_ext.methods.mtp.config import MtpConfig
from specforge_ext.ops import DraftLoss, KlSchedule, RowLoss, draft_loss


def scorable(config: MtpConfig, labelled: Tensor, lengths: Sequence[int]) -> Tensor:
    """[T] uint8, CPU: of the rows with loss mask 1 and a next row, those with something to be
    scored against. A distribution needs the next row alone, a label one token more.
    """
    mask = labelled.to(torch.uint8)
    if config.loss == "labels":
        ends = torch.tensor([n for n in lengths if n], dtype=torch.int64).cumsum(0)
        mask[(ends - 2).clamp_min(0)] = 0
    return mask


def step_loss(
    config: MtpConfig,
    student: Tensor,
    head: Tensor,
    plan: TttPlan,
    last: Tensor,
    input_ids: Tensor,
) -> DraftLoss:
    """Sum over rows and steps. student: [P, H] normed; head: [V, H], which gets no gradient."""
    decay = torch.tensor(
        [config.step_decay**i for i in range(config.num_steps)], device=student.device
    )
    labels = config.loss == "labels"
    schedule = KlSchedule(scale=config.kl_scale, decay=config.kl_decay)
    following = plan.teacher_rows + 1
    return draft_loss(
        student,
        head,
        None if labels else last.index_select(0, following).to(head.dtype),
        None if labels else head,
        loss=RowLoss("hard_ce" if labels else config.loss, temperature=config.temperature),
        row_to_teacher=plan.pair_teacher,
        row_weight=decay[plan.pair_step.long()],
        row_step=plan.pair_step,
        num_steps=config.num_steps,
        label=input_ids.index_select(0, following + 1).to(torch.int32) if labels else None,
        kl_schedule=schedule if config.loss == "lk_lambda" else None,
    )
