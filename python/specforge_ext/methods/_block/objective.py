"""What a predicted row weighs, and what is reported of all of them (DFlash, arXiv 2602.06036).

Legend of shapes: A blocks, B rows of a block, P predicted rows, K slots that can predict.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from specforge_ext.methods._block.plan import Blocks

DpaceKind = Literal["suffix", "prefix", "suffix_over_prefix"]


def slot_decay(block_size: int, *, gamma: float | None, first: int) -> Tensor:
    """[B] float32 on the CPU: exp(-(k - first) / gamma) of slot k, 1 before `first`; None: ones."""
    if gamma is None:
        return torch.ones(block_size)
    distance = (torch.arange(block_size, dtype=torch.float64) - first).clamp_min(0)
    return torch.exp(-distance / gamma).float()


@torch.no_grad()
def dpace_weight(loss: Tensor, supervised: Tensor, *, alpha: float, kind: DpaceKind) -> Tensor:
    """Weights of D-PACE (arXiv 2605.18810), [A, B] float32, 0 where not supervised.

    loss: [A, B] cross entropies, nats. A slot is passed with s = (1 - alpha) exp(-loss) + alpha (1
    where not supervised); prefix = the product of s up to and with the slot: the chance to get past
    it. "suffix": the sum of the prefixes from the slot on, which is what it is worth to the length
    accepted; "prefix"; "suffix_over_prefix": the worth once the slot is reached.
    """
    mask = supervised.float()
    passed = torch.where(supervised, (1 - alpha) * torch.exp(-loss.float()) + alpha, 1.0)
    prefix = passed.cumprod(1)
    if kind == "prefix":
        return prefix * mask
    suffix = (prefix * mask).flip(1).cumsum(1).flip(1)
    if kind == "suffix":
        return suffix * mask
    return suffix / prefix.clamp_min(torch.finfo(prefix.dtype).tiny) * mask


RATIOS = {"loss": "rows", "correct": "rows", "accepted": "blocks"}
"""Which sums `slot_metrics` divides by which, see StepLoss.ratios."""


@torch.no_grad()
def slot_metrics(blocks: Blocks, loss: Tensor, correct: Tensor, *, first: int) -> dict[str, Tensor]:
    """Sums per slot, [K] float64, K = B - first; slots before `first` predict nothing.

    loss [P], nats, correct [P] bool: of the predicted rows. `loss` and `correct` are sums over the
    `rows` of the slot. `accepted` counts, among the `blocks` all of whose slots up to this one are
    supervised, those in which all of these are correct: what greedy decoding from a uniform anchor
    would accept if the target repeated the text. Its ratio falls with the slot, and the sum of the
    ratios is a length without the bonus token.
    """
    seen = blocks.supervised[:, first:].double()
    right = blocks.by_block(correct.double())[:, first:]
    return {
        "loss": blocks.by_block(loss.double())[:, first:].sum(0),
        "correct": right.sum(0),
        "rows": seen.sum(0),
        "accepted": right.cumprod(1).sum(0),
        "blocks": seen.cumprod(1).sum(0),
    }
