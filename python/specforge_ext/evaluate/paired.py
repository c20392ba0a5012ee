"""Are two ways of training equally good? Pairs of runs, equal but for one thing.

N pairs give N ratios; their logarithms are taken to be normal. Source of the test: Schuirmann,
J. Pharmacokinet. Biopharm. 15 (1987) 657. Student's distribution: Abramowitz and Stegun 26.7.3-4,
which is exact for whole degrees of freedom.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Equivalence:
    """Of the ratio variant / baseline over pairs.

    ratio: geometric mean. ci95: its 95 % interval by Student's t. spread: standard deviation of the
    log ratios. margin: equivalent means a ratio within 1 / (1 + margin) .. 1 + margin.
    p_value: the larger one of the two one-sided tests; equivalent: it is below 0.05.
    """

    pairs: int
    ratio: float
    ci95: tuple[float, float]
    spread: float
    margin: float
    p_value: float
    equivalent: bool


def equivalence(
    baseline: Sequence[float], variant: Sequence[float], *, margin: float
) -> Equivalence:
    """Two one-sided paired t-tests on the log ratios, at 5 %.

    baseline[i], variant[i]: positive, of the same pair. ValueError for fewer than two pairs, for
    lists of unequal length, values that are not positive, or such a margin.
    """
    if len(baseline) != len(variant) or len(baseline) < 2:
        raise ValueError(
            f"equivalence: wanted two or more pairs, got {len(baseline)} and {len(variant)} values"
        )
    if min(*baseline, *variant) <= 0:
        raise ValueError(f"equivalence: wanted positive values, got {min(*baseline, *variant)}")
    if not 0 < margin < math.inf:
        raise ValueError(f"equivalence: margin must be above 0, got {margin}")
    logs = [math.log(b / a) for a, b in zip(baseline, variant, strict=True)]
    freedom = len(logs) - 1
    mean, spread = statistics.mean(logs), statistics.stdev(logs)
    error = spread / math.sqrt(len(logs))
    half = student_quantile(0.975, freedom) * error
    bound = math.log1p(margin)
    p_value = max(_upper_tail(bound + side * mean, error, freedom) for side in (1, -1))
    return Equivalence(
        pairs=len(logs),
        ratio=math.exp(mean),
        ci95=(math.exp(mean - half), math.exp(mean + half)),
        spread=spread,
        margin=margin,
        p_value=p_value,
        equivalent=p_value < 0.05,
    )


def student_cdf(t: float, freedom: int) -> float:
    """P(T <= t) of Student's distribution with `freedom` >= 1 degrees of freedom."""
    if freedom < 1:
        raise ValueError(f"student_cdf: wanted 1 degree of freedom or more, got {freedom}")
    angle = math.atan2(t, math.sqrt(freedom))
    cosine, sine = math.cos(angle), math.sin(angle)
    odd = freedom % 2
    # P(-t <= T <= t), a finite series in cos^2 whose factors are 1/2, 3/4, ... or 2/3, 4/5, ...
    term, total = (cosine, cosine if freedom > 1 else 0.0) if odd else (1.0, 1.0)
    for k in range(3 if odd else 2, freedom - 1, 2):
        term *= (k - 1) / k * cosine**2
        total += term
    within = 2 / math.pi * (angle + sine * total) if odd else sine * total
    return 0.5 + within / 2


def student_quantile(p: float, freedom: int) -> float:
    """t with student_cdf(t, freedom) = p, 0 < p < 1, to 1e-12 of the larger of |t| and 1."""
    if not 0 < p < 1:
        raise ValueError(f"student_quantile: wanted p within 0..1, got {p}")
    high = 1.0
    while student_cdf(high, freedom) < max(p, 1 - p):
        high *= 2
    low = -high
    while high - low > 1e-12 * max(1.0, abs(low)):
        middle = (low + high) / 2
        if student_cdf(middle, freedom) < p:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def _upper_tail(distance: float, error: float, freedom: int) -> float:
    """Of the test that the mean lies a `distance` within a bound; `error` is that of the mean."""
    if error == 0:
        return 0.0 if distance > 0 else 1.0
    return student_cdf(-distance / error, freedom)
