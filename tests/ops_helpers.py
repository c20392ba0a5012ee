"""Shared by the tests of ops: what "right" means, and cases to be right on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def assert_no_worse(got: Tensor, truth: Tensor, baseline: Tensor, *, slack: float) -> None:
    """The error of `got` against the float64 truth is that of the same-dtype baseline, or less.

    slack: relative to the largest magnitude of the truth, for rounding that differs by luck.
    """
    assert got.shape == truth.shape
    assert torch.isfinite(got).all()
    if not got.numel():
        return
    scale = max(float(truth.abs().max()), 1e-30)
    error = float((got.double() - truth).abs().max()) / scale
    allowed = float((baseline.double() - truth).abs().max()) / scale + slack
    assert error <= allowed, f"relative error {error:.3e}, allowed {allowed:.3e}"


@dataclass(frozen=True)
class LossCase:
    """Inputs of draft_loss: N rows, R teachers, widths H and G, V words of the draft."""

    hidden: Tensor
    head: Tensor
    teacher_hidden: Tensor
    teacher_head: Tensor
    teacher_lse: Tensor
    row_to_teacher: Tensor
    row_weight: Tensor
    row_step: Tensor
    num_steps: int

    @property
    def keywords(self) -> dict[str, Tensor | int]:
        return {
            "row_to_teacher": self.row_to_teacher,
            "row_weight": self.row_weight,
            "row_step": self.row_step,
            "num_steps": self.num_steps,
        }

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        return (
            self.hidden,
            self.head,
            self.teacher_hidden,
            self.teacher_head,
            self.teacher_lse,
        )

    def to(self, dtype: torch.dtype, side: torch.dtype | None = None) -> LossCase:
        """A copy in another dtype; `side` is that of teacher_lse and row_weight."""
        side = side or torch.float32

        def cast(tensor: Tensor) -> Tensor:
            return tensor.detach().to(dtype, copy=True)

        return LossCase(
            cast(self.hidden).requires_grad_(),
            cast(self.head).requires_grad_(),
            cast(self.teacher_hidden),
            cast(self.teacher_head),
            self.teacher_lse.to(side),
            self.row_to_teacher,
            self.row_weight.to(side),
            self.row_step,
            self.num_steps,
        )


def loss_case(
    rows: int,
    teachers: int,
    vocab: int,
    *,
    width: int = 24,
    teacher_width: int = 16,
    dtype: torch.dtype = torch.float32,
    outside: float = 0.3,
    seed: int = 0,
) -> LossCase:
    """Random rows, a third of weight 0; lse over the full vocabulary is `outside` nats more."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator) * scale).to(dtype)

    hidden, head = randn(rows, width), randn(vocab, width, scale=0.5)
    teacher_hidden = randn(teachers, teacher_width)
    teacher_head = randn(vocab, teacher_width, scale=0.7)
    logits = teacher_hidden.double() @ teacher_head.double().T
    lse = torch.logsumexp(logits, dim=-1) + outside
    weight = torch.rand(rows, generator=generator) + 0.5
    weight[torch.rand(rows, generator=generator) < 1 / 3] = 0
    index = torch.randint(0, max(teachers, 1), (rows,), generator=generator).sort().values
    step = torch.randint(0, 7, (rows,), generator=generator)
    return LossCase(
        hidden.requires_grad_(),
        head.requires_grad_(),
        teacher_hidden,
        teacher_head,
        lse.float(),
        index.to(torch.int32),
        weight,
        step.to(torch.int32),
        7,
    )
