"""speculators: the per-position losses of all its drafts (EAGLE-3, P-EAGLE, DFlash, ...).

Level: logits. Its models make the logits inside their forward pass, take argmaxes of them after the
loss and may give them to several loss terms, so they are not written. Replaced are the masked
reduction, through which every training loss goes, and the table of fused kernels, through which its
functions are called directly: with ours, the fused losses also run without Triton.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from specforge_ext.integrations._patch import Parity, Peer, Target, compare, not_compiled
from specforge_ext.integrations._rows import row_losses, teacher_entropy
from specforge_ext.ops import RowLoss

LossFunction = Callable[..., Tensor]

_KINDS = {
    "kl_div_loss": "kl",
    "reverse_kl_div_loss": "reverse_kl",
    "js_div_loss": "jsd",
    "ce_loss": "hard_ce",
    "tv_loss": "tv",
    "neg_log_acceptance_loss": "nla",
    "lk_hybrid_loss": "lk_hybrid",
}
_FUSED_NAMES = {
    f"fused_{name}": kind for name, kind in _KINDS.items() if name != "neg_log_acceptance_loss"
} | {"fused_nla_loss": "nla"}
_ETA = 3.0  # speculators' default, for lk_hybrid
_MIN_ACCEPTANCE = 1e-5  # speculators clamps the rate there before it takes the logarithm


def _loss_function(original: LossFunction) -> LossFunction:
    known = _kinds_of_functions()

    @not_compiled
    def loss_function(
        logits: Tensor,
        targets: Tensor,
        loss_mask: Tensor,
        pos_idx: Tensor,
        loss_fn: LossFunction | None = None,
        decay_fn: LossFunction | None = None,
    ) -> Tensor:
        kind = "kl" if loss_fn is None else known.get(loss_fn)
        if kind is None or (torch.is_grad_enabled() and targets.requires_grad):
            # A loss of the user's own, or a gradient for the teacher: what our kernel has not.
            options = {} if loss_fn is None else {"loss_fn": loss_fn}
            return original(logits, targets, loss_mask, pos_idx, decay_fn=decay_fn, **options)
        losses = _losses(kind, logits, targets, scored=loss_mask != 0)
        mask = loss_mask.to(losses.dtype)
        losses = losses * mask
        if decay_fn is not None:
            losses = losses * decay_fn(pos_idx.to(losses.dtype), elementwise_loss=losses)
        return (losses.sum(dim=1) / (mask.sum(dim=1) + 1e-5)).mean()

    return loss_function


def _fused_kernel(original: Callable[[str], LossFunction]) -> Callable[[str], LossFunction]:
    def fused_kernel(name: str) -> LossFunction:
        if name not in _FUSED_NAMES:
            return original(name)

        @not_compiled
        def loss(logits: Tensor, targets: Tensor, eta: float = _ETA) -> Tensor:
            return _losses(_FUSED_NAMES[name], logits, targets, eta=eta)

        return loss

    return fused_kernel


def _kinds_of_functions() -> dict[LossFunction, str]:
    modules = ("speculators.losses.utils", "speculators.losses.eager")
    return {
        getattr(importlib.import_module(module), name): kind
        for module in modules
        for name, kind in _KINDS.items()
    }


def _losses(
    kind: str, logits: Tensor, targets: Tensor, *, scored: Tensor | None = None, eta: float = _ETA
) -> Tensor:
    """[...] float32, nats, 0 on rows that are not scored."""
    if kind == "kl":
        entropy = teacher_entropy(targets, scored=scored)
        return row_losses(logits, targets, loss=RowLoss("soft_ce"), scored=scored)[0] - entropy
    if kind == "tv":
        return row_losses(logits, targets, loss=RowLoss("l1"), scored=scored)[0] / 2
    if kind == "nla":
        accepted = 1 - row_losses(logits, targets, loss=RowLoss("l1"), scored=scored)[0] / 2
        return -torch.log(accepted.clamp_min(_MIN_ACCEPTANCE))
    if kind == "lk_hybrid":
        _, accepted = row_losses(logits.detach(), targets, loss=RowLoss("l1"), scored=scored)
        weight = torch.exp(-eta * accepted)
        losses, _ = row_losses(
            logits, targets, loss=RowLoss("lk_lambda"), scored=scored, kl_weight=weight
        )
        return losses - weight * teacher_entropy(targets, scored=scored)
    return row_losses(logits, targets, loss=RowLoss(kind), scored=scored)[0]


def _parity(
    originals: dict[str, Any], ours: dict[str, Any], device: torch.device
) -> Sequence[Parity]:
    generator = torch.Generator().manual_seed(0)
    logits, targets = (torch.randn(1, 12, 257, generator=generator).to(device) for _ in range(2))
    mask = torch.tensor([[1, 0, 1, 1, 0, 1, 1, 1, 0, 1, 1, 1]], device=device, dtype=torch.bool)
    pos_idx = torch.arange(12, device=device)[None] % 4
    eager = importlib.import_module("speculators.losses.eager")

    def run(function: LossFunction) -> tuple[Tensor, Tensor]:
        leaf = logits.clone().requires_grad_()
        value = function(leaf)
        (value if value.dim() == 0 else value.square().sum()).backward()  # type: ignore[no-untyped-call]
        assert leaf.grad is not None
        return value, leaf.grad

    def decay(pos_idx: Tensor, elementwise_loss: Tensor) -> Tensor:
        return 0.8**pos_idx

    results = []
    for name in _KINDS:
        reference = getattr(eager, name)

        def masked(function: LossFunction, loss_fn: LossFunction = reference) -> Any:
            return lambda leaf: function(
                leaf, targets, mask, pos_idx, loss_fn=loss_fn, decay_fn=decay
            )

        function = "loss_function"
        results.append(compare(name, run(masked(originals[function])), run(masked(ours[function]))))
        fused = "fused_nla_loss" if name == "neg_log_acceptance_loss" else f"fused_{name}"

        def direct(function: LossFunction) -> Any:
            return lambda leaf: function(leaf, targets)

        results.append(
            compare(fused, run(direct(reference)), run(direct(ours["_fused_kernel"](fused))))
        )
    return results


PEER = Peer(
    name="speculators",
    versions=("0.9.0",),
    targets=(
        Target("speculators.losses.utils", "loss_function", _loss_function),
        Target("speculators.losses.utils", "_fused_kernel", _fused_kernel),
    ),
    parity=_parity,
)
