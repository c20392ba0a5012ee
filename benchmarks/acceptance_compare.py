"""What benchmarks/acceptance.py says of two trainings: how far apart losses and lengths are."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from specforge_ext.evaluate import EvalResult, summarise
from specforge_ext.evaluate.interval import RESAMPLES, ratio_interval
from specforge_ext.evaluate.paired import equivalence

MARGIN = 0.02
"""Ratios within 1 / (1 + MARGIN) .. 1 + MARGIN are called equal."""


@dataclass(frozen=True)
class LossGap:
    """|loss - SpecForge's| / SpecForge's: at the first step, the largest of the first ten, of all,
    and of the means over the last tenth of the steps. doubling[k]: the largest of steps 2^k to
    2^(k+1) - 1, counted from 1.
    """

    first: float
    first_ten: float
    largest: float
    last_tenth: float
    doubling: tuple[float, ...]


@dataclass(frozen=True)
class Ratio:
    """Of acceptance lengths, side / SpecForge, all seeds pooled. ci95: over prompts.

    seeds95: by Student's t over seeds, where there are two or more.
    """

    ratio: float
    ci95: tuple[float, float]
    seeds95: tuple[float, float] | None

    @property
    def verdict(self) -> str:
        low, high = self.ci95
        if high < 1:
            return "worse"
        if low > 1:
            return "better"
        if low >= 1 / (1 + MARGIN) and high <= 1 + MARGIN:
            return f"equal within {MARGIN:.0%}"
        return "not told apart"


def loss_gap(baseline: Sequence[float], other: Sequence[float]) -> LossGap:
    gaps = [abs(b - a) / abs(a) for a, b in zip(baseline, other, strict=True)]
    tenth = max(1, len(gaps) // 10)
    ends = [statistics.mean(losses[-tenth:]) for losses in (baseline, other)]
    return LossGap(
        first=gaps[0],
        first_ten=max(gaps[:10]),
        largest=max(gaps),
        last_tenth=abs(ends[1] - ends[0]) / abs(ends[0]),
        doubling=tuple(
            max(gaps[2**k - 1 : 2 ** (k + 1) - 1]) for k in range(len(gaps).bit_length())
        ),
    )


def pooled(runs: Sequence[EvalResult]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and rounds of each prompt, [N] each, over all seeds."""
    tokens = torch.stack([run.round_tokens for run in runs]).sum(0)
    rounds = torch.stack([run.rounds for run in runs]).sum(0)
    return tokens.double().numpy(), rounds.double().numpy()


def length_of(runs: Sequence[EvalResult]) -> tuple[float, tuple[float, float]]:
    """Acceptance length of all runs together, and its interval."""
    tokens, rounds = (torch.from_numpy(x) for x in pooled(runs))
    return float(tokens.sum() / rounds.sum()), ratio_interval(tokens, rounds)


def compare(baseline: Sequence[EvalResult], other: Sequence[EvalResult]) -> Ratio:
    """Prompts are resampled for both alike: what is hard for one is hard for the other."""
    (base_tokens, base_rounds), (tokens, rounds) = pooled(baseline), pooled(other)
    draws = np.random.default_rng(0).integers(len(rounds), size=(RESAMPLES, len(rounds)))

    def ratio(pick: Any) -> Any:
        mine = tokens[pick].sum(-1) / rounds[pick].sum(-1)
        return mine / (base_tokens[pick].sum(-1) / base_rounds[pick].sum(-1))

    low, high = np.percentile(ratio(draws), [2.5, 97.5])
    seeds = None
    if len(other) > 1:
        lengths = [[summarise(run, draft="").length for run in runs] for runs in (baseline, other)]
        seeds = equivalence(*lengths, margin=MARGIN).ci95
    return Ratio(float(ratio(np.arange(len(rounds)))), (float(low), float(high)), seeds)
