"""SpecForge: the loss of its EAGLE-3 model, for all three objectives (KL, LK-alpha, LK-lambda).

Level: logits, and the teacher that is prepared for them. SpecForge keeps two float32 tensors of
probabilities, [batch, tokens, draft vocabulary] each, and per step takes a softmax of the draft's
logits for its acceptance rate. With ours, the first of the two holds the teacher's logits in their
own dtype and the second only the normaliser, [batch, tokens, 1]; a step's loss and acceptance rate
are one pass over both rows. SpecForge's model has read its logits for the last time when the loss
is called, and its own kernel writes the gradient over them in backward; so does ours.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from specforge_ext.integrations._patch import Parity, Peer, Target, compare, not_compiled
from specforge_ext.integrations._rows import soft_ce_and_accepted
from specforge_ext.ops import row_stats, teacher_stats

_MODEL = "specforge.algorithms.eagle3.model"
_LOSS = "_compute_loss_and_acceptance_rate"
_TEACHER = "_compute_target_p_padded"
_COMPACT_TEACHER = "compute_target_p_padded_from_hidden"

Teacher = tuple[Tensor, Tensor, Tensor, Tensor]
"""What SpecForge calls target_p, target_p_on_draft, target_token_ids and position_mask: here
logits [B, S + length, V], normaliser [B, S + length, 1], ids [B, S + length], mask [B, S, 1]."""


def _teacher(original: Callable[..., Any]) -> Callable[..., Teacher]:
    @not_compiled
    @torch.no_grad()
    def compute_target_p_padded(
        target: Tensor, t2d: Tensor, loss_mask: Tensor, length: int
    ) -> Teacher:
        lse, argmax = row_stats(target.contiguous().view(-1, target.shape[-1]))
        logits = F.pad(target[..., t2d], (0, 0, 0, length))
        return _padded(logits, lse, argmax.long(), t2d, loss_mask, length)

    return compute_target_p_padded


def _compact_teacher(original: Callable[..., Any]) -> Callable[..., Teacher]:
    @not_compiled
    @torch.no_grad()
    def compute_target_p_padded_from_hidden(
        hidden: Tensor,
        lm_head_weight: Tensor,
        t2d: Tensor,
        loss_mask: Tensor,
        length: int,
        *,
        chunk_size: int = 0,
    ) -> Teacher:
        """chunk_size is not used: ours bounds the workspace in bytes."""
        rows = hidden.contiguous().view(-1, hidden.shape[-1])
        lse, argmax = teacher_stats(rows, lm_head_weight)
        logits = F.linear(F.pad(hidden, (0, 0, 0, length)), lm_head_weight[t2d])
        return _padded(logits, lse, argmax, t2d, loss_mask, length)

    return compute_target_p_padded_from_hidden


def _padded(
    logits: Tensor, lse: Tensor, ids: Tensor, t2d: Tensor, loss_mask: Tensor, length: int
) -> Teacher:
    """The padding is never scored: SpecForge's mask moves in zeros wherever a step reaches it."""
    shape = (logits.shape[0], logits.shape[1] - length)
    ids = ids.view(shape)
    position_mask = t2d[ids][..., None].int() * loss_mask
    return (
        logits,
        F.pad(lse.view(*shape, 1), (0, 0, 0, length)),
        F.pad(ids, (0, length)),
        position_mask,
    )


def _loss(original: Callable[..., Any]) -> Callable[..., Any]:
    model: Any = importlib.import_module(_MODEL)
    masked_mean = importlib.import_module("specforge.core.lk_loss")._masked_mean
    smallest = 1e-8  # SpecForge's bound on the count that it divides by

    @not_compiled
    def compute_loss_and_acceptance_rate(
        *,
        logits: Tensor,
        target_p: Tensor,
        target_p_on_draft: Tensor,
        position_mask: Tensor,
        lk_loss_type: str | None,
        kl_scale: float,
        kl_decay: float,
        reduce_metrics_fn: Callable[..., tuple[Tensor, Tensor]] | None = None,
        reduce_loss_fn: Callable[[Tensor], Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        if target_p_on_draft.shape[-1] != 1:  # probabilities: a caller that is not the model
            return original(  # type: ignore[no-any-return]
                logits=logits,
                target_p=target_p,
                target_p_on_draft=target_p_on_draft,
                position_mask=position_mask,
                lk_loss_type=lk_loss_type,
                kl_scale=kl_scale,
                kl_decay=kl_decay,
                reduce_metrics_fn=reduce_metrics_fn,
                reduce_loss_fn=reduce_loss_fn,
            )
        scored = position_mask.squeeze(-1) != 0
        ce, accepted = soft_ce_and_accepted(logits, target_p, target_p_on_draft.squeeze(-1), scored)
        if lk_loss_type is None:
            accepted = accepted.detach()

        def mean(values: Tensor) -> Any:
            return masked_mean(values, position_mask, smallest, reduce_metrics_fn)

        kl_loss = ce.mean() if reduce_loss_fn is None else reduce_loss_fn(ce.mean())
        rate = mean(accepted)
        log_rate = mean(torch.where(accepted > 0, accepted, 1).log())
        loss = kl_loss
        if lk_loss_type is not None:
            loss = model.compute_lk_loss(
                kl_loss=kl_loss,
                acceptance_rate=rate,
                log_acceptance_rate=log_rate,
                lk_loss_type=lk_loss_type,
                kl_scale=kl_scale,
                kl_decay=kl_decay,
            )
        return rate.detach(), loss

    return compute_loss_and_acceptance_rate


def _parity(
    originals: dict[str, Any], ours: dict[str, Any], device: torch.device
) -> Sequence[Parity]:
    generator = torch.Generator().manual_seed(0)
    batch, tokens, width, vocab, length = 2, 9, 16, 389, 2
    hidden = torch.randn(batch, tokens, width, generator=generator).to(device)
    head = torch.randn(vocab, width, generator=generator).to(device)
    t2d = (torch.arange(vocab) % 3 != 2).to(device)
    draft = torch.randn(batch, tokens, int(t2d.sum()), generator=generator).to(device)
    loss_mask = (torch.arange(tokens, device=device) % 4 != 1).long()[None, :, None]
    loss_mask = loss_mask.expand(batch, tokens, 1)
    inputs = {
        _TEACHER: {"target": F.linear(hidden, head)},
        _COMPACT_TEACHER: {"hidden": hidden, "lm_head_weight": head},
    }

    def run(functions: dict[str, Any], teacher: str, kind: str | None) -> tuple[Tensor, Tensor]:
        options = {"t2d": t2d, "loss_mask": loss_mask, "length": length}
        target_p, on_draft, ids, mask = functions[teacher](**inputs[teacher], **options)
        leaf = draft.clone().requires_grad_()
        rate, loss = functions[_LOSS](
            logits=leaf * 1.0,  # both write the gradient over the logits
            target_p=target_p[:, :tokens].contiguous(),
            target_p_on_draft=on_draft[:, :tokens].contiguous(),
            position_mask=mask,
            lk_loss_type=kind,
            kl_scale=1.0,
            kl_decay=3.0,
        )
        loss.backward()
        assert leaf.grad is not None
        return torch.stack([loss, rate, ids.double().mean() / vocab]), leaf.grad

    return [
        compare(
            f"{kind or 'kl'} with {teacher}",
            _by_original(run, originals, teacher, kind, device),
            run(ours, teacher, kind),
        )
        for teacher in (_TEACHER, _COMPACT_TEACHER)
        for kind in (None, "alpha", "lambda")
    ]


def _by_original(
    run: Callable[..., tuple[Tensor, Tensor]],
    originals: dict[str, Any],
    teacher: str,
    kind: str | None,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """SpecForge's own; on a CPU, where its Triton kernel cannot run, its torch reference."""
    model: Any = importlib.import_module(_MODEL)
    kernel = model.LogSoftmaxLoss
    with torch.compiler.set_stance("force_eager"):
        if device.type == "cpu":
            model.LogSoftmaxLoss = TorchReference
        try:
            return run(originals, teacher, kind)
        finally:
            model.LogSoftmaxLoss = kernel


class TorchReference:
    """SpecForge's own torch definition of its kernel, under the kernel's calling convention."""

    @staticmethod
    def apply(logits: Tensor, target_p: Tensor, position_mask: Tensor) -> Tensor:
        reference = importlib.import_module("specforge.core.loss")._compute_loss
        value: Tensor = reference(logits, target_p, position_mask)
        return value


PEER = Peer(
    name="specforge",
    versions=("0.2.0",),
    targets=(
        Target(_MODEL, _LOSS, _loss),
        Target(_MODEL, _TEACHER, _teacher),
        Target(_MODEL, _COMPACT_TEACHER, _compact_teacher),
    ),
    parity=_parity,
)
