"""trl: the generalised JSD of its GKD trainer (on-policy distillation, arXiv 2306.13649).

Level: logits. The trainer hands both models' logits to a static method, and may return the
student's with the loss, so they are not written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from specforge_ext.integrations._patch import Parity, Peer, Target, compare, not_compiled
from specforge_ext.integrations._rows import row_losses, teacher_entropy
from specforge_ext.ops import RowLoss

IGNORED_LABEL = -100


def _replacement(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @not_compiled
    def generalized_jsd_loss(
        student_logits: Tensor,
        teacher_logits: Tensor,
        labels: Tensor | None = None,
        beta: float = 0.5,
        temperature: float = 1.0,
        reduction: str = "batchmean",
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        per_token = num_items_in_batch is None and reduction not in ("batchmean", "sum", "mean")
        if per_token or (torch.is_grad_enabled() and teacher_logits.requires_grad):
            # Per vocabulary entry, or with a gradient for the teacher: what our kernel has not.
            return original(
                student_logits, teacher_logits, labels, beta, temperature, reduction,
                num_items_in_batch,
            )  # fmt: skip
        scored = None if labels is None else labels != IGNORED_LABEL
        losses = _divergence(student_logits, teacher_logits, scored, beta, temperature)
        total = losses.sum()
        if num_items_in_batch is not None:
            if isinstance(num_items_in_batch, Tensor):
                num_items_in_batch = num_items_in_batch.to(total.device)
            return total / num_items_in_batch
        if reduction == "sum":
            return total
        num_rows = losses.numel() if scored is None else scored.sum()
        if reduction == "mean":
            return total / (num_rows * student_logits.shape[-1])
        # Of all rows the mean is over the batch, of the scored ones over these: trl's "batchmean".
        return total / (max(len(losses), 1) if scored is None else scored.sum().clamp_min(1))

    return generalized_jsd_loss


def _divergence(
    student: Tensor, teacher: Tensor, scored: Tensor | None, beta: float, temperature: float
) -> Tensor:
    """[...] nats: beta 0 is KL(teacher, student), 1 KL(student, teacher), between them the JSD."""
    if beta == 0:
        loss = RowLoss("soft_ce", temperature=temperature)
        entropy = teacher_entropy(teacher, temperature=temperature, scored=scored)
        return row_losses(student, teacher, loss=loss, scored=scored)[0] - entropy
    if beta == 1:
        loss = RowLoss("reverse_kl", temperature=temperature)
    else:
        loss = RowLoss("jsd", temperature=temperature, beta=float(beta))
    return row_losses(student, teacher, loss=loss, scored=scored)[0]


def _cases() -> Iterator[tuple[str, dict[str, Any]]]:
    for beta in (0.0, 0.3, 0.5, 1.0):
        yield f"beta {beta}", {"beta": beta, "temperature": 1.0}
    yield "temperature 2", {"beta": 0.5, "temperature": 2.0}
    for reduction in ("sum", "mean"):
        yield f"reduction {reduction}", {"reduction": reduction}
    yield "num_items_in_batch", {"num_items_in_batch": 7}


def _parity(
    originals: dict[str, Any], ours: dict[str, Any], device: torch.device
) -> Sequence[Parity]:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(2, 6, 257, generator=generator).to(device) for _ in range(2))
    labels = torch.tensor([[1, -100, 3, 4, -100, 5], [-100, -100, 1, 1, 2, 3]], device=device)

    def run(function: Callable[..., Tensor], **options: Any) -> tuple[Tensor, Tensor]:
        leaf = student.clone().requires_grad_()
        # Sliced as the trainer slices: not contiguous.
        value = function(leaf[:, :-1], teacher[:, :-1], **options)
        value.backward()  # type: ignore[no-untyped-call]
        assert leaf.grad is not None
        return value, leaf.grad

    name = "generalized_jsd_loss"
    cases = [(case, options | {"labels": labels[:, 1:]}) for case, options in _cases()]
    cases.append(("no labels", {}))
    return [
        compare(case, run(originals[name], **options), run(ours[name], **options))
        for case, options in cases
    ]


PEER = Peer(
    name="trl",
    versions=("1.16.0",),
    targets=(
        Target("trl.experimental.gkd.gkd_trainer", "GKDTrainer.generalized_jsd_loss", _replacement),
    ),
    parity=_parity,
)
