"""Cross entropy of rows under a frozen head, with and without a trained correction of its logits.

Base logits are head hidden, final ones head hidden + correction act (Domino, arXiv 2605.29707).
Both are made of one product with the head, and one product takes the sum of their gradients back
through it: 2 N V H + 3 N V E multiplications where two losses by themselves, the second one over
concatenated [hidden, act] and [head, correction], take 4 N V H + 3 N V E. Legend: N rows, H width
of the head, E of the correction, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from specforge_ext.ops._chunks import default_workspace_bytes
from specforge_ext.ops._native import FLOATS, check, in_autocast_dtype
from specforge_ext.ops._two_heads import two_head_loss_op
from specforge_ext.ops.results import RowLoss


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
    hidden_NH, head_VH, act_NE, correction_VE = in_autocast_dtype(
        hidden_NH, head_VH, act_NE, correction_VE
    )
    num_rows, vocab = hidden_NH.shape[0], head_VH.shape[0]
    of_all = hidden_NH.dtype
    for name, tensor, shape, dtypes in (
        ("hidden", hidden_NH, (num_rows, hidden_NH.shape[-1]), FLOATS),
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
    differentiates, loss = torch.is_grad_enabled(), RowLoss("hard_ce")
    loss_sum, rows_23N, correct_2N, *_ = two_head_loss_op(
        hidden_NH,
        act_NE,
        correction_VE,
        head_VH.detach(),
        None,
        None,
        label_N,
        None,
        weight_N.detach(),
        loss.kind,
        loss.temperature,
        loss.beta,
        loss.hard_weight,
        float(base_share),
        workspace_bytes,
        differentiates and hidden_NH.requires_grad,
        differentiates and act_NE.requires_grad,
        differentiates and correction_VE.requires_grad,
    )
    (final, *_), (base, *_) = rows_23N.detach()
    correct, base_correct = correct_2N.detach().bool()
    return CorrectedLabelLoss(loss_sum, final, correct, base, base_correct)
