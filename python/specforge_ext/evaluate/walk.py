"""Acceptance length without decoding: a renewal walk over text that the target said.

Legend of shapes: K depth, T tokens of all samples end to end, N samples, L tokens of the longest.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from specforge_ext.evaluate.interval import ratio_interval

WALK_CONVENTION = (
    "walk: tokens / verify steps expected of chain decoding along the given text, bonus included, "
    "full steps"
)


@dataclass(frozen=True)
class WalkEstimate:
    """length: expected tokens a verify step. ci95: bootstrap over samples.

    per_position: joint rates, as in decoding.
    rounds, tokens: [N] float64, expected counts of each sample.
    """

    length: float
    ci95: tuple[float, float]
    per_position: tuple[float, ...]
    rounds: Tensor
    tokens: Tensor
    convention: str = WALK_CONVENTION


def walk(rates: Tensor, cu_seqlens: Tensor, *, seed: int = 0) -> WalkEstimate:
    """Expected rounds and tokens of chain decoding along given continuations.

    rates: [K, T]; rates[i, a] is the chance that the token realised at a + 1 + i is accepted at
    depth i from anchor a, given that those before it were (greedy: 1 where the draft's argmax is
    the token; sampling: min(1, q / p) of the token, q and p at the temperature of the text).
    cu_seqlens: [N + 1], samples in the rows; a sample's first row is the first anchor, the token
    that prefill said.
    From anchor a the walk goes on to a + i + 1 with chance r_0 .. r_{i-1} (1 - r_i), and to a + K +
    1 if all K are accepted. Anchors within K + 1 of their sample's end are not counted and their
    rates not read, as decoding does not count steps that its budget could cut short.
    Source: renewal argument; visits are those of decoding, given the text. Chain drafts only.
    Raises ValueError if a rate that is read lies outside [0, 1], or no anchor can be counted.
    """
    depth = rates.shape[0]
    offsets = cu_seqlens.to(device=rates.device, dtype=torch.int64)
    if rates.dim() != 2 or int(offsets[0]) != 0 or int(offsets[-1]) != rates.shape[1]:
        raise ValueError(
            f"walk: wanted rates [K, T] with T = cu_seqlens[-1] = {int(offsets[-1])}, "
            f"got {list(rates.shape)}"
        )
    lengths_N = offsets[1:] - offsets[:-1]
    anchors = max(int(lengths_N.max()) - depth - 1, 0)
    column = torch.arange(anchors, device=rates.device)
    counted_NL = column < (lengths_N - depth - 1)[:, None]
    if not bool(counted_NL.any()):
        raise ValueError(
            f"walk: wanted a sample of at least {depth + 2} tokens, "
            f"got {int(lengths_N.max())} at most"
        )
    index_NL = torch.where(counted_NL, offsets[:-1, None] + column, 0)
    r_KNL = torch.where(counted_NL, rates.double()[:, index_NL], 0.0)
    if not bool(((r_KNL >= 0) & (r_KNL <= 1)).all()):
        raise ValueError("walk: wanted rates in [0, 1] at every counted anchor")

    reach_KNL = r_KNL.cumprod(0)
    visits_NL = _visits(reach_KNL) * counted_NL
    accepted_KN = (reach_KNL * visits_NL).sum(2)
    rounds_N = visits_NL.sum(1)
    tokens_N = rounds_N + accepted_KN.sum(0)
    rounds = float(rounds_N.sum())
    return WalkEstimate(
        length=float(tokens_N.sum()) / rounds,
        ci95=ratio_interval(tokens_N, rounds_N, seed=seed),
        per_position=tuple((accepted_KN.sum(1) / rounds).tolist()),
        rounds=rounds_N,
        tokens=tokens_N,
    )


def _visits(reach_KNL: Tensor) -> Tensor:
    """[N, L] float64, chance that decoding starts a step at each anchor; it does at the first.

    reach_KNL[k]: chance that drafted tokens 0..k are all accepted from the anchor.
    """
    depth, num_samples, anchors = reach_KNL.shape
    ones = torch.ones_like(reach_KNL[:1])
    # step_NLK[..., i]: chance that the next anchor is i + 1 further on.
    step_NLK = -torch.diff(torch.cat([ones, reach_KNL, torch.zeros_like(ones)]), dim=0).permute(
        1, 2, 0
    )
    visits = reach_KNL.new_zeros(num_samples, anchors + depth + 1)
    visits[:, 0] = 1.0
    for anchor in range(anchors):
        visits[:, anchor + 1 : anchor + depth + 2] += visits[:, anchor, None] * step_NLK[:, anchor]
    return visits[:, :anchors]
