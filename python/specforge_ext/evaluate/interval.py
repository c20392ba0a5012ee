"""Uncertainty over prompts: text differs more between prompts than rounds do within one."""

from __future__ import annotations

import numpy as np
from torch import Tensor

RESAMPLES = 2000


def ratio_interval(
    numerators: Tensor, denominators: Tensor, *, seed: int = 0, resamples: int = RESAMPLES
) -> tuple[float, float]:
    """95 % percentile bootstrap of sum(numerators) / sum(denominators), prompts resampled.

    numerators, denominators: [N], paired by prompt. Prompts with denominator 0 say nothing about
    the ratio and are left out. Raises ValueError when none is left.
    """
    told = (denominators > 0).cpu().numpy()
    over = numerators.double().cpu().numpy()[told]
    under = denominators.double().cpu().numpy()[told]
    if not len(under):
        raise ValueError("ratio_interval: wanted a prompt with at least one round, got none")
    draws = np.random.default_rng(seed).integers(len(under), size=(resamples, len(under)))
    ratios = over[draws].sum(1) / under[draws].sum(1)
    low, high = np.percentile(ratios, [2.5, 97.5])
    return float(low), float(high)
