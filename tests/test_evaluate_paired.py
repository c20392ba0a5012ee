"""The test of equivalence over pairs of runs."""

from __future__ import annotations

import math
import random

import pytest

from specforge_ext.evaluate.paired import equivalence, student_cdf, student_quantile


# One, two degrees of freedom have closed forms; many are almost normal.
@pytest.mark.parametrize("t", [-3.0, -0.5, 0.0, 0.1, 1.0, 12.7])
def test_student_where_it_is_known(t: float) -> None:
    assert student_cdf(t, 1) == pytest.approx(0.5 + math.atan(t) / math.pi, abs=1e-14)
    assert student_cdf(t, 2) == pytest.approx(0.5 + t / (2 * math.sqrt(2 + t * t)), abs=1e-14)
    normal = 0.5 * math.erfc(-t / math.sqrt(2))
    assert student_cdf(t, 1_000_000) == pytest.approx(normal, abs=1e-6)


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 5, 7, 8, 30, 31])
def test_student_against_its_density(freedom: int) -> None:
    """The integral of the density, by Simpson's rule."""
    top, steps = 1.7, 2000
    norm = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2))
    norm /= math.sqrt(freedom * math.pi)
    heights = [
        norm * (1 + (top * i / steps) ** 2 / freedom) ** (-(freedom + 1) / 2)
        for i in range(steps + 1)
    ]
    weights = [1, *([4, 2] * (steps // 2))[:-1], 1]
    area = sum(h * w for h, w in zip(heights, weights, strict=True)) * top / steps / 3
    assert student_cdf(top, freedom) == pytest.approx(0.5 + area, abs=1e-12)
    assert student_cdf(-top, freedom) == pytest.approx(0.5 - area, abs=1e-12)


@pytest.mark.parametrize(
    ("p", "freedom", "t"), [(0.975, 7, 2.364624), (0.95, 7, 1.894579), (0.975, 1, 12.706205)]
)
def test_quantiles_of_the_tables(p: float, freedom: int, t: float) -> None:
    assert student_quantile(p, freedom) == pytest.approx(t, abs=1e-6)
    assert student_quantile(1 - p, freedom) == pytest.approx(-t, abs=1e-6)
    assert student_cdf(student_quantile(p, freedom), freedom) == pytest.approx(p, abs=1e-12)


def test_decides_as_the_90_percent_interval_does() -> None:
    """Two one-sided tests at 5 % reject exactly where the 90 % interval lies within the bounds."""
    rng = random.Random(1)
    decisions = set()
    for _ in range(300):
        shift, spread = rng.uniform(-0.03, 0.03), rng.uniform(0.001, 0.02)
        baseline = [rng.uniform(1, 5) for _ in range(8)]
        variant = [x * math.exp(rng.gauss(shift, spread)) for x in baseline]
        found = equivalence(baseline, variant, margin=0.02)
        half = student_quantile(0.95, 7) * found.spread / math.sqrt(8)
        inside = abs(math.log(found.ratio)) + half < math.log(1.02)
        assert found.equivalent == inside
        decisions.add(inside)
    assert decisions == {True, False}


def test_numbers_by_hand() -> None:
    found = equivalence([1.0, 1.0], [math.exp(0.01), math.exp(-0.01)], margin=0.05)
    assert found.ratio == pytest.approx(1.0)
    assert found.spread == pytest.approx(0.01 * math.sqrt(2))
    half = 12.706204736 * 0.01
    assert found.ci95 == pytest.approx((math.exp(-half), math.exp(half)))
    t = math.log(1.05) / 0.01
    assert found.p_value == pytest.approx(0.5 - math.atan(t) / math.pi)


@pytest.mark.parametrize(("factor", "equivalent"), [(1.0, True), (1.01, True), (1.03, False)])
def test_pairs_without_any_spread(factor: float, equivalent: bool) -> None:
    found = equivalence([2.0, 2.0], [2.0 * factor] * 2, margin=0.02)
    assert (found.equivalent, found.p_value) == (equivalent, 0.0 if equivalent else 1.0)


@pytest.mark.parametrize(
    ("baseline", "variant", "message"),
    [
        ([1.0], [1.0], "wanted two or more pairs, got 1 and 1 values"),
        ([1.0, 2.0], [1.0], "wanted two or more pairs, got 2 and 1 values"),
        ([1.0, 2.0], [1.0, 0.0], "wanted positive values, got 0.0"),
    ],
)
def test_what_are_no_pairs(baseline: list[float], variant: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        equivalence(baseline, variant, margin=0.02)


def test_what_is_out_of_range() -> None:
    for margin in (0.0, -2.0, float("nan")):
        with pytest.raises(ValueError, match=f"margin must be above 0, got {margin}"):
            equivalence([1.0, 2.0], [1.0, 2.0], margin=margin)
    with pytest.raises(ValueError, match=r"wanted p within 0\.\.1, got 1"):
        student_quantile(1.0, 3)
    with pytest.raises(ValueError, match="wanted 1 degree of freedom or more, got 0"):
        student_cdf(1.0, 0)
