"""Row losses over logits that a peer has made, as autograd functions.

Two ways, because peers differ in what happens to their logits afterwards:

row_losses            the peer reads its logits again (metrics, outputs). The scored rows are copied
                      and the copy becomes the gradient during the forward pass, so that backward
                      keeps neither the logits nor the teacher's.
soft_ce_and_accepted  nobody reads the logits after the loss but backward, where the gradient takes
                      their place, as in SpecForge's own kernel.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from specforge_ext.ops import RowLoss, loss_rows_, row_stats


def row_losses(
    logits: Tensor,
    teacher: Tensor,
    *,
    loss: RowLoss,
    scored: Tensor | None = None,
    kl_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(loss, accepted), [...] float32 each and 0 on rows that are not scored.

    logits, teacher: [..., vocab] float32 or bfloat16; neither is written. scored: [...] bool, None:
    all rows; the others are not read, and their gradient is 0. kl_weight: [...] float32, for
    lk_lambda. The labels of hard_ce are the teacher's first choices. Differentiable once, in
    `logits` through `loss`. ValueError (ops.loss_rows_) names what does not fit.
    """
    values: tuple[Tensor, Tensor] = _RowLosses.apply(logits, teacher, scored, kl_weight, loss)  # type: ignore[no-untyped-call]
    return values


def teacher_entropy(
    teacher: Tensor, *, temperature: float = 1.0, scored: Tensor | None = None
) -> Tensor:
    """[...] float32, nats: entropy of softmax(teacher / temperature); 0 on rows not scored.

    A KL divergence is the soft cross entropy less this.
    """
    rows, where = _rows_of(teacher.detach(), scored)
    out = loss_rows_(
        rows.data,  # counts as a write, which it is not here
        None,
        loss=RowLoss("hard_ce", temperature=temperature),
        row_to_teacher=torch.zeros_like(_arange(rows)),
        weight=rows.new_ones(rows.shape[:1], dtype=torch.float32),
        label=torch.zeros(1, dtype=torch.int32, device=rows.device),
        writes_gradient=False,
    )
    return _spread(out.entropy, where, teacher.shape[:-1])


def soft_ce_and_accepted(
    logits: Tensor, teacher: Tensor, teacher_lse: Tensor, scored: Tensor
) -> tuple[Tensor, Tensor]:
    """(soft cross entropy, acceptance rate), [...] float32 each and 0 on rows not scored.

    logits, teacher: [..., vocab] float32 or bfloat16. teacher_lse: [...] float32, over the full
    vocabulary. scored: [...] bool. Both results are differentiable in `logits`, once; backward
    writes the gradient over the logits, unless the graph is retained.
    """
    values: tuple[Tensor, Tensor] = _SoftCeAndAccepted.apply(logits, teacher, teacher_lse, scored)  # type: ignore[no-untyped-call]
    return values


class _RowLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        teacher: Tensor,
        scored: Tensor | None,
        kl_weight: Tensor | None,
        loss: RowLoss,
    ) -> tuple[Tensor, Tensor]:
        wants_grad = bool(ctx.needs_input_grad[0])
        rows, where = _rows_of(logits, scored)
        if wants_grad and rows.data_ptr() == logits.data_ptr():
            rows = rows.clone()
        of_teacher, row_to_teacher = _teacher_rows(teacher, scored, where)
        is_hard = loss.kind == "hard_ce"
        out = loss_rows_(
            rows if wants_grad else rows.data,
            None if is_hard else of_teacher,
            loss=loss,
            row_to_teacher=row_to_teacher,
            weight=rows.new_ones(rows.shape[:1], dtype=torch.float32),
            label=row_stats(of_teacher)[1] if is_hard else None,
            kl_weight=None if kl_weight is None else _picked(kl_weight, where),
            writes_gradient=wants_grad,
        )
        if wants_grad:
            ctx.save_for_backward(rows, where)
            ctx.shape = logits.shape
        accepted = _spread(out.accepted, where, logits.shape[:-1])
        ctx.mark_non_differentiable(accepted)
        return _spread(out.loss, where, logits.shape[:-1]), accepted

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        rows, where = ctx.saved_tensors
        scale = _picked(grad_loss, where)[:, None].to(rows.dtype)
        gradient = rows * scale if _keeps_graph() else rows.mul_(scale)
        if where is None:
            return gradient.view(ctx.shape), None, None, None, None
        full = gradient.new_zeros(ctx.shape)
        full.view(-1, ctx.shape[-1]).index_copy_(0, where, gradient)
        return full, None, None, None, None


class _SoftCeAndAccepted(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, teacher: Tensor, teacher_lse: Tensor, scored: Tensor
    ) -> tuple[Tensor, Tensor]:
        rows, of_teacher = _flat(logits), _flat(teacher)
        out = loss_rows_(
            rows.data,
            of_teacher,
            row_to_teacher=_arange(rows),
            weight=scored.flatten().float(),
            teacher_lse=teacher_lse.flatten(),
            writes_gradient=False,
        )
        ctx.save_for_backward(logits, teacher, teacher_lse, scored)
        ctx.set_materialize_grads(False)
        return out.loss.view(scored.shape), out.accepted.view(scored.shape)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_ce: Tensor | None, grad_accepted: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        logits, teacher, teacher_lse, scored = ctx.saved_tensors
        if grad_ce is None and grad_accepted is None:
            return None, None, None, None
        rows = _flat(logits)
        if _keeps_graph() and rows.data_ptr() == logits.data_ptr():
            rows = rows.clone()
        loss, weight, kl_weight = _mixture(grad_ce, grad_accepted)
        loss_rows_(
            rows,
            _flat(teacher),
            loss=loss,
            row_to_teacher=_arange(rows),
            weight=weight.float().masked_fill(~scored, 0).flatten(),
            teacher_lse=teacher_lse.flatten(),
            kl_weight=None if kl_weight is None else kl_weight.float().flatten(),
        )
        return rows.view(logits.shape), None, None, None


def _mixture(
    grad_ce: Tensor | None, grad_accepted: Tensor | None
) -> tuple[RowLoss, Tensor, Tensor | None]:
    """A row loss, weight and kl_weight whose gradient is grad_ce d ce + grad_accepted d accepted.

    That of lk_lambda is weight (kl_weight d ce - (1 - kl_weight) d accepted).
    """
    if grad_accepted is None:
        assert grad_ce is not None
        return RowLoss("soft_ce"), grad_ce, None
    if grad_ce is None:
        return RowLoss("lk_lambda"), -grad_accepted, torch.zeros_like(grad_accepted)
    weight = grad_ce - grad_accepted
    return RowLoss("lk_lambda"), weight, (grad_ce / weight).masked_fill(weight == 0, 0)


def _keeps_graph() -> bool:
    """Whether the backward pass that runs now was asked to retain the graph.

    Torch has no public name for it; torch.compile's donated buffers rest on the same question.
    """
    keeps: bool = torch._C._autograd._get_current_graph_task_keep_graph()
    return keeps


def _flat(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(-1, tensor.shape[-1])


def _arange(rows: Tensor) -> Tensor:
    return torch.arange(rows.shape[0], dtype=torch.int32, device=rows.device)


def _rows_of(tensor: Tensor, scored: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """(scored rows [n, vocab] contiguous, their indices among all rows; None: all of them)."""
    if scored is None:
        return _flat(tensor), None
    where = scored.flatten().nonzero().squeeze(1)
    if tensor.is_contiguous():
        return _flat(tensor).index_select(0, where), where
    # Gathers from the strided tensor, where flattening first would copy all of it.
    return tensor.detach()[scored], where


def _teacher_rows(
    teacher: Tensor, scored: Tensor | None, where: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(teacher rows, row_to_teacher): all rows if that needs no copy, else the scored ones."""
    if where is not None and teacher.is_contiguous():
        return _flat(teacher), where.to(torch.int32)
    rows, _ = _rows_of(teacher, scored)
    return rows, _arange(rows)


def _picked(values: Tensor, where: Tensor | None) -> Tensor:
    flat = values.detach().flatten().float()
    return flat if where is None else flat[where]


def _spread(values: Tensor, where: Tensor | None, shape: torch.Size) -> Tensor:
    if where is None:
        return values.view(shape)
    return values.new_zeros(shape.numel()).index_copy_(0, where, values).view(shape)
