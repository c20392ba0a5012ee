"""Chains: the native draw against its definition, counts, uniformity, independence of packing."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from specforge_ext import ops
from specforge_ext.ops import reference
from specforge_ext.records import lengths_to_cu_seqlens

OPTIONS = {"seed": 2**64 - 5, "step": 2**32 - 1, "ratio": 0.8, "min_ratio": 0.2}


def masks(lengths: list[int], density: float) -> Tensor:
    """Runs of ones; 0 at the last position of each sample."""
    generator = torch.Generator().manual_seed(1)
    mask = torch.rand(sum(lengths), generator=generator) < density
    for end, n in zip(lengths_to_cu_seqlens(lengths).tolist()[1:], lengths, strict=True):
        mask[end - min(n, 1) : end] = False
    return mask


@pytest.mark.parametrize("num_depths", [1, 2, 8])
@pytest.mark.parametrize("density", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("lengths", [[], [0], [1, 2, 0, 3], [40, 1, 25]])
def test_draw_is_the_definition(lengths: list[int], density: float, num_depths: int) -> None:
    cu_seqlens, mask = lengths_to_cu_seqlens(lengths), masks(lengths, density)
    keys = torch.tensor([-1, 0, 2**63 - 1, 12345678901234][: len(lengths)], dtype=torch.int64)
    got = ops.cod_chains(mask, cu_seqlens, keys, num_depths=num_depths, **OPTIONS)
    wanted = reference.cod_chains(mask, cu_seqlens, keys, num_depths=num_depths, **OPTIONS)
    assert len(got) == len(wanted) == num_depths - 1
    for mine, theirs in zip(got, wanted, strict=True):
        assert mine.dtype == torch.int32 and torch.equal(mine, theirs)


@pytest.mark.parametrize(("ratio", "min_ratio"), [(0.8, 0.2), (1.0, 0.0), (0.3, 0.0), (0.5, 1.0)])
def test_counts_and_chains_are_as_described(ratio: float, min_ratio: float) -> None:
    """min(int((V - d) * share), candidates) rows, nested, inside their samples, scored."""
    lengths = [60, 2, 35]
    cu_seqlens, mask = lengths_to_cu_seqlens(lengths), masks(lengths, 0.9)
    options = {**OPTIONS, "ratio": ratio, "min_ratio": min_ratio}
    depths = ops.cod_chains(mask, cu_seqlens, torch.arange(3), num_depths=9, **options)
    for begin, end in pairwise(cu_seqlens.tolist()):
        scored = {t for t in range(begin, end) if mask[t]}
        candidates = scored - {begin}
        for d, anchors in enumerate(depths, 1):
            kept = [a + d for a in anchors.tolist() if begin <= a < end]
            assert kept == sorted(set(kept)) and set(kept) <= candidates
            share = int(max(0, len(scored) - d) * max(ratio**d, min_ratio))
            assert len(kept) == min(share, len(candidates))
            candidates = {t + 1 for t in kept} & scored


def test_draw_does_not_depend_on_the_packing() -> None:
    lengths, keys = [50, 7, 31], [11, -3, 2**40]
    samples = [masks([n], 0.9) for n in lengths]

    def draw(order: list[int]) -> dict[int, list[list[int]]]:
        cu_seqlens = lengths_to_cu_seqlens([lengths[k] for k in order])
        depths = ops.cod_chains(
            torch.cat([samples[k] for k in order]),
            cu_seqlens,
            torch.tensor([keys[k] for k in order]),
            num_depths=6,
            **{**OPTIONS, "seed": 7, "step": 3},
        )
        bounds = list(pairwise(cu_seqlens.tolist()))
        return {
            k: [[a - b for a in d.tolist() if b <= a < e] for d in depths]
            for k, (b, e) in zip(order, bounds, strict=True)
        }

    together = draw([0, 1, 2])
    assert draw([2, 0, 1]) == together
    assert {k: v for part in ([1], [2, 0]) for k, v in draw(part).items()} == together


def test_draw_depends_on_seed_step_and_sample() -> None:
    mask, cu_seqlens = masks([200], 1.0), lengths_to_cu_seqlens([200])

    def draw(seed: int, step: int, key: int) -> tuple[tuple[int, ...], ...]:
        options = {**OPTIONS, "seed": seed, "step": step}
        depths = ops.cod_chains(mask, cu_seqlens, torch.tensor([key]), num_depths=4, **options)
        return tuple(tuple(d.tolist()) for d in depths)

    draws = [(0, 0, 0), (1, 0, 0), (2**40, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 2**40)]
    for d in range(3):  # at every depth
        assert len({draw(*case)[d] for case in draws}) == len(draws)
    assert draw(5, 6, 7) == draw(5, 6, 7)


def test_draw_is_uniform() -> None:
    """Chi-square over the candidates of depth 1, and that depth 2 keeps the same share of each.

    Without replacement the statistic times (n - 1) / (n - k) is chi-square with n - 1 degrees of
    freedom. Its bounds leave 1e-4 on each side; the seed is fixed.
    """
    samples, n = 4000, 42  # V = 41 scored positions, 40 of them candidates at depth 1
    lengths = [n] * samples
    first, second = ops.cod_chains(
        masks(lengths, 1.0),
        lengths_to_cu_seqlens(lengths),
        torch.arange(samples),
        num_depths=3,
        **{**OPTIONS, "seed": 1, "step": 2, "ratio": 0.5, "min_ratio": 0.0},
    )
    kept = 20  # int(40 * 0.5)
    assert first.numel() == samples * kept
    counts = (first % n).bincount(minlength=40)[:40].double()
    expected = samples * kept / 40
    statistic = float(((counts - expected) ** 2).sum() / expected) * 39 / 20
    assert 14.0 < statistic < 83.0  # chi-square of 39 degrees of freedom
    # Depth 2 draws 9 = int(39 * 0.25) among the 19 or 20 chains that can go on, afresh: a chain
    # that had a small key at depth 1 has no better chance than another.
    counts = (second % n).bincount(minlength=39)[:39].double()
    assert second.numel() == samples * 9
    expected = samples * 9 / 39
    assert float(((counts - expected) ** 2).sum() / expected) < 83.0


def test_draw_names_what_does_not_fit() -> None:
    mask, keys = torch.ones(5, dtype=torch.uint8), torch.tensor([1, 2])
    bounds = lengths_to_cu_seqlens([2, 3])
    fine = {"seed": 0, "step": 0, "num_depths": 3, "ratio": 0.8, "min_ratio": 0.2}
    for change, message in (
        ({"seed": -1}, r"cod_chains: seed must be in \[0, 2\^64\), got -1"),
        ({"step": 2**32}, r"step must be in \[0, 2\^32\), got 4294967296"),
        ({"num_depths": 0}, "depths must be at least 1, got 0"),
        ({"ratio": 0.0}, r"ratio must be in \(0, 1\], got 0.0"),
        ({"ratio": float("nan")}, r"ratio must be in \(0, 1\], got nan"),
        ({"min_ratio": 1.5}, r"min_ratio must be in \[0, 1\], got 1.5"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.cod_chains(mask, bounds, keys, **(fine | change))
    with pytest.raises(ValueError, match=r"cu_seqlens must be \[N\+1=2\] i32, got \[3\] i32"):
        ops.cod_chains(mask, bounds, keys[:1], **fine)
    with pytest.raises(ValueError, match="sample_keys must be i64"):
        ops.cod_chains(mask, bounds, keys.int(), **fine)
    wrong = torch.tensor([0, 2, 4], dtype=torch.int32)
    with pytest.raises(ValueError, match="cu_seqlens must end at 5, got 4"):
        ops.cod_chains(mask, wrong, keys, **fine)
