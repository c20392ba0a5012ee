"""The top-k part of draft_loss (HASS, arXiv 2408.15766) against its definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from specforge_ext import ops
from specforge_ext.ops import RowLoss, reference


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("full_teacher", [True, False])
def test_top_k_op_is_its_definition(full_teacher: bool, dtype: torch.dtype) -> None:
    """Several chunks; a row of weight 0 with a teacher of NaN; words that tie with the k-th."""
    generator = torch.Generator().manual_seed(0)

    def rand(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    rows, words, all_words, width = 37, 19, 31, 8
    hidden, head, teacher, teacher_head = (
        rand(rows, width), rand(words, width), rand(12, width), rand(all_words, width)
    )  # fmt: skip
    teacher_head[3] = teacher_head[5]
    teacher[11] = float("nan")
    row_to_teacher = torch.arange(rows, dtype=torch.int32) // 3
    row_to_teacher.clamp_(max=11)
    weight = torch.rand(rows, generator=generator)
    weight[row_to_teacher == 11] = 0
    spec = RowLoss("soft_ce", temperature=1.3, top_k=4, top_k_weight=0.6)
    options: dict[str, Any] = {
        "loss": spec,
        "row_to_teacher": row_to_teacher,
        "row_step": (torch.arange(rows) % 2).int(),
        "num_steps": 2,
    }
    lse = torch.logsumexp(teacher.float() @ teacher_head.float().T / 1.3, 1)
    if not full_teacher:
        teacher_head = teacher_head[:words]
    results = []
    for function, kind in ((ops.draft_loss, dtype), (reference.draft_loss, torch.float64)):
        wide = torch.promote_types(kind, torch.float32)
        h, w = (x.detach().to(kind).requires_grad_() for x in (hidden, head))
        out = function(
            h,
            w,
            teacher.to(kind),
            teacher_head.to(kind),
            None if full_teacher else lse.to(wide),
            row_weight=weight.to(wide),
            **options,
            **({"workspace_bytes": 4096} if function is ops.draft_loss else {}),
        )
        out.loss_sum.backward()
        assert h.grad is not None and w.grad is not None
        results.append((out, h.grad.double(), w.grad.double()))
    (mine, *gradients), (wanted, *expected) = results
    slack = 3e-6 if dtype == torch.float32 else 3e-2
    assert mine.loss_sum.item() == pytest.approx(wanted.loss_sum.item(), rel=slack)
    for name in ("step_loss", "step_accepted", "step_top_prob", "step_entropy"):
        got, right = (getattr(x, name).double() for x in (mine, wanted))
        torch.testing.assert_close(got, right, rtol=slack, atol=1e-6)
    assert torch.equal(mine.step_rows, wanted.step_rows)
    for got, right in zip(gradients, expected, strict=True):
        scale = float(right.abs().max())
        assert float((got - right).abs().max()) <= slack * scale


def test_top_k_refuses() -> None:
    logits, one = torch.zeros(1, 4), torch.ones(1)
    rows = torch.zeros(1, dtype=torch.int32)
    with pytest.raises(ValueError, match="loss_rows: top_k must be 0, got 2"):
        ops.loss_rows_(
            logits, logits, loss=RowLoss("soft_ce", top_k=2), row_to_teacher=rows, weight=one
        )
    for spec, message in (
        (RowLoss("jsd", top_k=2), "top_k must be 0, or positive with soft_ce and no hard_weight"),
        (RowLoss("soft_ce", top_k=-1), "top_k must be 0, or positive"),
        (RowLoss("soft_ce", top_k=1, top_k_weight=0.0), "top_k_weight must be above 0, got 0.0"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.draft_loss(
                logits, logits.expand(5, 4).contiguous(), logits, logits.expand(5, 4).contiguous(),
                loss=spec, row_to_teacher=rows, row_weight=one, row_step=rows, num_steps=1,
            )  # fmt: skip
