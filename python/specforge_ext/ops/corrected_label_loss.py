"""Cross entropy of rows under a frozen head, with and without a trained correction of its logits.

Base logits are head hidden, final ones head hidden + correction act (Domino, arXiv 2605.29707).
Both are made of one product with the head, and one product takes the sum of their gradients back
through it: 2 N V H + 3 N V E multiplications where two losses by themselves, the second one over
concatenated [hidden, act] and [head, correction], take 4 N V H + 3 N V E. Logits exist one chunk
at a time. Legend: N rows, H width of the head, E of the correction, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from specforge_ext import _C
from specforge_ext.ops._chunks import cut, default_workspace_bytes
from specforge_ext.ops._draft_loss import scaled
from specforge_ext.ops._matmul import (
    HeadGrad,
    corrected_logits_into,
    empty_buffer,
    hidden_grad_into,
    logits_dtype,
    logits_into,
)
from specforge_ext.ops._native import check, stream_of

_FLOATS = (torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class CorrectedLabelLoss:
    """loss_sum: [] float32, sum of weight * ((1 - base_share) final + base_share base), nats,
    differentiable. loss, base_loss: [N] float32, nats, detached, not weighted; 0 where the weight
    is 0. correct, base_correct: [N] bool, argmax == label (the lowest index on ties).
    """

    loss_sum: Tensor
    loss: Tensor
    correct: Tensor
    base_loss: Tensor
    base_correct: Tensor


def corrected_label_loss(
    hidden_NH: Tensor,
    head_VH: Tensor,
    act_NE: Tensor,
    correction_VE: Tensor,
    label_N: Tensor,
    weight_N: Tensor,
    *,
    base_share: float,
    workspace_bytes: int | None = None,
) -> CorrectedLabelLoss:
    """-log softmax(z)[label] of each row, for z = head hidden and z = head hidden + correction act.

    hidden: [N, H]; head: [V, H], frozen: it gets no gradient; act: [N, E]; correction: [V, E].
    These four float32 or bfloat16, the same; under autocast they are cast to its dtype. label: [N]
    int32 in [0, V). weight: [N] float32. base_share: of the loss without correction, 0 to 1; the
    other's is the rest. workspace_bytes: bound on the logits that exist at a time, two rows for
    each of `hidden`; by default as in `draft_loss`. Deterministic, differentiable once.
    ValueError names what does not fit. Formulas: csrc/loss/loss_rows.h, kHardCe.
    """
    if torch.is_autocast_enabled(hidden_NH.device.type):
        dtype = torch.get_autocast_dtype(hidden_NH.device.type)
        hidden_NH, head_VH = hidden_NH.to(dtype), head_VH.to(dtype)
        act_NE, correction_VE = act_NE.to(dtype), correction_VE.to(dtype)
    num_rows, vocab = hidden_NH.shape[0], head_VH.shape[0]
    of_all = hidden_NH.dtype
    for name, tensor, shape, dtypes in (
        ("hidden", hidden_NH, (num_rows, hidden_NH.shape[-1]), _FLOATS),
        ("head", head_VH, (vocab, hidden_NH.shape[-1]), (of_all,)),
        ("act", act_NE, (num_rows, act_NE.shape[-1]), (of_all,)),
        ("correction", correction_VE, (vocab, act_NE.shape[-1]), (of_all,)),
        ("label", label_N, (num_rows,), (torch.int32,)),
        ("weight", weight_N, (num_rows,), (torch.float32,)),
    ):
        check("corrected_label_loss", name, tensor, shape, *dtypes)
    if not 0 <= base_share <= 1:
        raise ValueError(f"corrected_label_loss: base_share must be 0 to 1, got {base_share}")
    if workspace_bytes is None:
        workspace_bytes = default_workspace_bytes(hidden_NH.device, vocab=vocab)
    enabled = torch.is_grad_enabled()
    loss_sum, losses_2N, correct_2N, *_ = _corrected_label_loss(
        hidden_NH,
        act_NE,
        correction_VE,
        head_VH.detach(),
        label_N,
        weight_N.detach(),
        float(base_share),
        workspace_bytes,
        enabled and hidden_NH.requires_grad,
        enabled and act_NE.requires_grad,
        enabled and correction_VE.requires_grad,
    )
    losses_2N, correct_2N = losses_2N.detach(), correct_2N.detach().bool()
    return CorrectedLabelLoss(loss_sum, losses_2N[1], correct_2N[1], losses_2N[0], correct_2N[0])


class _Pass:
    """One of the two losses of a chunk's rows: values, and the gradient in place of the logits.

    share: of this loss in the sum. losses [N] and correct [N]: written.
    """

    def __init__(self, share: float, losses: Tensor, correct: Tensor, most_rows: int) -> None:
        self.share = share
        self._losses, self._correct = losses, correct
        self._unused_C = [losses.new_empty(most_rows) for _ in range(3)]
        self._index_C = torch.arange(most_rows, dtype=torch.int32, device=losses.device)

    def run(
        self, logits: Tensor, label: Tensor, weight: Tensor, rows: slice, *, differentiates: bool
    ) -> None:
        count = logits.shape[0]
        unused = [x[:count] for x in self._unused_C]
        _C.loss_rows(
            logits,
            None,
            self._index_C[:count],
            # A share of 0 may not be taken for a row of weight 0, whose loss is not computed.
            weight * self.share if self.share else weight,
            self._losses[rows],
            unused[0],
            self._correct[rows],
            unused[1],
            unused[2],
            kind="hard_ce",
            temperature=1.0,
            beta=0.5,
            hard_weight=0.0,
            writes_gradient=differentiates and self.share != 0,
            teacher_lse=None,
            teacher_argmax=None,
            label=label,
            kl_weight=None,
            stream=stream_of(logits),
        )


@torch.library.custom_op("specforge_ext::corrected_label_loss", mutates_args=())
def _corrected_label_loss(
    hidden_NH: Tensor,
    act_NE: Tensor,
    correction_VE: Tensor,
    head_VH: Tensor,
    label_N: Tensor,
    weight_N: Tensor,
    base_share: float,
    workspace_bytes: int,
    wants_hidden_grad: bool,
    wants_act_grad: bool,
    wants_correction_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss_sum [], losses [2, N] f32 base and final, correct [2, N] u8, d loss_sum / d hidden,
    act and correction). A gradient that is not wanted is an empty tensor.
    """
    num_rows, vocab = hidden_NH.shape[0], head_VH.shape[0]
    dtype = logits_dtype(hidden_NH)
    row_bytes = 2 * vocab * dtype.itemsize
    if workspace_bytes < row_bytes:
        raise ValueError(
            f"corrected_label_loss: workspace_bytes must hold two rows of logits, {row_bytes} "
            f"bytes, got {workspace_bytes}"
        )
    index_N = torch.arange(num_rows, dtype=torch.int32)
    chunks = cut(index_N, row_bytes=row_bytes, teacher_bytes=0, workspace_bytes=workspace_bytes)
    most_rows = max((chunk.num_rows for chunk in chunks), default=0)
    contiguous = torch.contiguous_format
    hidden_grad_NH, act_grad_NE = (
        torch.empty_like(x if wanted else x[:0], memory_format=contiguous)
        for x, wanted in ((hidden_NH, wants_hidden_grad), (act_NE, wants_act_grad))
    )
    correction_grad = None
    if wants_correction_grad:
        correction_grad = HeadGrad(correction_VE, num_chunks=len(chunks))
    differentiates = wants_hidden_grad or wants_act_grad or wants_correction_grad
    losses_2N = hidden_NH.new_empty((2, num_rows), dtype=torch.float32)
    correct_2N = hidden_NH.new_empty((2, num_rows), dtype=torch.uint8)
    base, final = (
        _Pass(share, losses_2N[k], correct_2N[k], most_rows)
        for k, share in enumerate((base_share, 1 - base_share))
    )
    buffers_2CV = empty_buffer(hidden_NH, (2, most_rows, vocab), dtype)
    with torch.autocast(hidden_NH.device.type, enabled=False):
        for chunk in chunks:
            rows, count = chunk.rows, chunk.num_rows
            base_CV, final_CV = buffers_2CV[0, :count], buffers_2CV[1, :count]
            label, weight, act = label_N[rows], weight_N[rows], act_NE[rows]
            logits_into(base_CV, hidden_NH[rows], head_VH)
            corrected_logits_into(final_CV, base_CV, act, correction_VE)
            base.run(base_CV, label, weight, rows, differentiates=differentiates)
            final.run(final_CV, label, weight, rows, differentiates=differentiates)
            if not final.share:
                act_grad_NE[rows] = 0
            elif wants_act_grad:
                hidden_grad_into(act_grad_NE[rows], final_CV, correction_VE)
            if final.share and correction_grad:
                correction_grad.add(final_CV, act)
            if wants_hidden_grad:
                if base.share and final.share:
                    base_CV += final_CV
                through_head = base_CV if base.share else final_CV
                hidden_grad_into(hidden_grad_NH[rows], through_head, head_VH)
    mixed_N = base_share * losses_2N[0].double() + (1 - base_share) * losses_2N[1].double()
    return (
        (mixed_N * weight_N).sum().float(),
        losses_2N,
        correct_2N,
        hidden_grad_NH,
        act_grad_NE,
        correction_grad.result() if correction_grad else correction_VE.new_empty(0),
    )


@_corrected_label_loss.register_fake
def _(
    hidden_NH: Tensor,
    act_NE: Tensor,
    correction_VE: Tensor,
    head_VH: Tensor,
    label_N: Tensor,
    weight_N: Tensor,
    base_share: float,
    workspace_bytes: int,
    wants_hidden_grad: bool,
    wants_act_grad: bool,
    wants_correction_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows = hidden_NH.shape[0]
    return (
        hidden_NH.new_empty((), dtype=torch.float32),
        hidden_NH.new_empty((2, rows), dtype=torch.float32),
        hidden_NH.new_empty((2, rows), dtype=torch.uint8),
        hidden_NH.new_empty(hidden_NH.shape if wants_hidden_grad else (0, hidden_NH.shape[1])),
        act_NE.new_empty(act_NE.shape if wants_act_grad else (0, act_NE.shape[1])),
        correction_VE.new_empty(correction_VE.shape if wants_correction_grad else (0,)),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.wants, ctx.num_inputs = inputs[-3:], len(inputs)
    ctx.save_for_backward(*output[3:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_loss: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled():  # create_graph: its result would lack the terms of this op
        raise RuntimeError(
            "corrected_label_loss: second derivatives are not available (create_graph=True)"
        )
    grads: list[Tensor | None] = [None] * ctx.num_inputs
    if grad_loss is not None:
        for k, (saved, wanted) in enumerate(zip(ctx.saved_tensors, ctx.wants, strict=True)):
            grads[k] = scaled(saved, grad_loss) if wanted else None
    return tuple(grads)


_corrected_label_loss.register_autograd(_backward, setup_context=_save)
