"""Anchors and block masks against their definitions, torch's own masks and statistics.

Legend: T packed tokens, A blocks, B rows of a block.
"""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

import emulated
from specforge_ext import ops
from specforge_ext.ops import reference
from specforge_ext.records import lengths_to_cu_seqlens

NAMES = (
    "kv_num_blocks",
    "kv_indices",
    "full_kv_num_blocks",
    "full_kv_indices",
    "q_num_blocks",
    "q_indices",
    "full_q_num_blocks",
    "full_q_indices",
)


def random_anchors(lengths: list[int], counts: list[int], seed: int) -> tuple[Tensor, ...]:
    """anchors, cu_anchors, cu_seqlens; counts[k] anchors in sample k."""
    rng, cu_seqlens = random.Random(seed), lengths_to_cu_seqlens(lengths)
    begins = cu_seqlens.tolist()
    anchors = [
        begin + t
        for begin, length, count in zip(begins, lengths, counts, strict=False)
        for t in sorted(rng.sample(range(length), count))
    ]
    cu_anchors = lengths_to_cu_seqlens(counts)
    return torch.tensor(anchors, dtype=torch.int32), cu_anchors, cu_seqlens


def test_philox_known_values() -> None:
    """Vectors of the authors' own implementation (Random123, kat_vectors)."""
    known = {
        ((0, 0, 0, 0), 0): (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
        ((0xFFFFFFFF,) * 4, 2**64 - 1): (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            0x299F31D0A4093822,
        ): (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    }
    for (counter, key), words in known.items():
        assert reference.philox4x32(counter, key) == words


# Fewer candidates than max_anchors, as many, more; no candidate at all; samples of 0, 1 and 2.
@pytest.mark.parametrize("max_anchors", [1, 3, 1000])
@pytest.mark.parametrize("density", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("lengths", [[], [0], [1, 2, 0, 3], [40, 1, 25]])
def test_draw_is_the_definition(lengths: list[int], density: float, max_anchors: int) -> None:
    cu_seqlens = lengths_to_cu_seqlens(lengths)
    generator = torch.Generator().manual_seed(1)
    mask = torch.rand(sum(lengths), generator=generator) < density
    keys = torch.tensor([-1, 0, 2**63 - 1, 12345678901234][: len(lengths)], dtype=torch.int64)
    options = {"seed": 2**64 - 5, "step": 2**32 - 1, "max_anchors": max_anchors}
    got = ops.draw_anchors(mask, cu_seqlens, keys, **options)
    for mine, wanted in zip(
        got, reference.draw_anchors(mask, cu_seqlens, keys, **options), strict=True
    ):
        assert mine.dtype == torch.int32
        assert torch.equal(mine, wanted)
    for k, (first, last) in enumerate(pairwise(got[1].tolist())):
        drawn = got[0][first:last].tolist()
        begin, end = cu_seqlens[k : k + 2].tolist()
        candidates = [t for t in range(begin, end - 1) if mask[t] and mask[t + 1]]
        assert drawn == sorted(set(drawn) & set(candidates))
        assert len(drawn) == min(max_anchors, len(candidates))


def test_draw_does_not_depend_on_the_packing() -> None:
    lengths, keys = [50, 7, 31], [11, -3, 2**40]
    masks = [torch.rand(n, generator=torch.Generator().manual_seed(n)) < 0.8 for n in lengths]

    def draw(order: list[int]) -> dict[int, list[int]]:
        cu_seqlens = lengths_to_cu_seqlens([lengths[k] for k in order])
        anchors, cu_anchors = ops.draw_anchors(
            torch.cat([masks[k] for k in order]),
            cu_seqlens,
            torch.tensor([keys[k] for k in order]),
            seed=7,
            step=3,
            max_anchors=9,
        )
        parts = anchors.split(cu_anchors.diff().tolist())
        begins = cu_seqlens.tolist()
        return {
            k: (p - begins[i]).tolist() for i, (k, p) in enumerate(zip(order, parts, strict=True))
        }

    together = draw([0, 1, 2])
    assert draw([2, 0, 1]) == together
    assert {k: v for part in ([1], [2, 0]) for k, v in draw(part).items()} == together
    assert len(together[0]) == 9


def test_draw_depends_on_seed_step_and_sample() -> None:
    mask, cu_seqlens = torch.ones(200, dtype=torch.uint8), lengths_to_cu_seqlens([200])

    def draw(seed: int, step: int, key: int) -> tuple[int, ...]:
        anchors, _ = ops.draw_anchors(
            mask, cu_seqlens, torch.tensor([key]), seed=seed, step=step, max_anchors=20
        )
        return tuple(anchors.tolist())

    cases = [(0, 0, 0), (1, 0, 0), (2**40, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 2**40)]
    assert len({draw(*case) for case in cases}) == len(cases)
    assert draw(5, 6, 7) == draw(5, 6, 7)


def test_draw_is_uniform() -> None:
    """Chi-square over 40 candidates, and over pairs of neighbours, in 20000 steps of 8 of 40.

    Without replacement the statistic times (n - 1) / (n - k) is chi-square with n - 1 degrees of
    freedom. Its bounds leave 1e-4 on each side; the seed is fixed.
    """
    candidates, drawn, samples = 40, 8, 20_000
    mask = torch.ones(samples * (candidates + 1), dtype=torch.uint8)
    cu_seqlens = lengths_to_cu_seqlens([candidates + 1] * samples)
    anchors, cu_anchors = ops.draw_anchors(
        mask, cu_seqlens, torch.arange(samples), seed=1, step=2, max_anchors=drawn
    )
    assert (cu_anchors.diff() == drawn).all()
    offsets = (anchors % (candidates + 1)).view(samples, drawn)
    counts = offsets.flatten().bincount(minlength=candidates).double()
    expected = samples * drawn / candidates
    statistic = float(((counts - expected) ** 2).sum() / expected)
    statistic *= (candidates - 1) / (candidates - drawn)
    assert 14.0 < statistic < 83.0  # chi-square of 39 degrees of freedom
    # Chance that t and t + 1 are both drawn: k (k - 1) / (n (n - 1)); 5 standard deviations.
    neighbours = (offsets.diff(dim=1) == 1).sum().item()
    share = drawn * (drawn - 1) / candidates / (candidates - 1)
    mean = samples * (candidates - 1) * share
    assert abs(neighbours - mean) < 5 * (2 * mean) ** 0.5


def test_draw_names_what_does_not_fit() -> None:
    mask, keys = torch.ones(5, dtype=torch.uint8), torch.tensor([1, 2])
    bounds = lengths_to_cu_seqlens([2, 3])
    fine = {"seed": 0, "step": 0, "max_anchors": 1}
    for change, message in (
        ({"seed": -1}, r"seed must be in \[0, 2\^64\), got -1"),
        ({"step": 2**32}, r"step must be in \[0, 2\^32\), got 4294967296"),
        ({"max_anchors": 0}, "max_anchors must be at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.draw_anchors(mask, bounds, keys, **(fine | change))
    with pytest.raises(ValueError, match=r"cu_seqlens must be \[N\+1=2\] i32, got \[3\] i32"):
        ops.draw_anchors(mask, bounds, keys[:1], **fine)
    with pytest.raises(ValueError, match="sample_keys must be i64"):
        ops.draw_anchors(mask, bounds, keys.int(), **fine)
    for wrong, message in (
        ([1, 2, 5], "cu_seqlens must start at 0, got 1"),
        ([0, 6, 5], "cu_seqlens must not fall, got 5"),
        ([0, 2, 4], "cu_seqlens must end at 5, got 4"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.draw_anchors(mask, torch.tensor(wrong, dtype=torch.int32), keys, **fine)


def torch_tensors(
    inputs: tuple[Tensor, ...],
    context: int,
    block_size: int,
    window: int | None,
    tile: tuple[int, int],
) -> list[Tensor]:
    """The same from torch, out of the dense mask."""
    visible = reference.block_visibility(
        *inputs, num_context=context, block_size=block_size, window=window
    )
    mask = create_block_mask(
        lambda b, h, q, k: visible[q, k], None, None, *visible.shape, "cpu", BLOCK_SIZE=tile
    )
    return [getattr(mask, name) for name in NAMES]


# One block; a whole sample of anchors; more keys than a tile; empty samples and samples without
# anchors first, between and last.
MASK_CASES = [
    ([9], [1]),
    ([33], [33]),
    ([200], [7]),
    ([0, 40, 0, 21, 5, 0], [0, 6, 0, 3, 0, 0]),
    ([64, 64], [4, 4]),
    ([150, 90, 1], [11, 8, 1]),
]


@pytest.mark.parametrize("window", [None, 1, 5, 24, 1000])
@pytest.mark.parametrize(
    ("block_size", "tile"),
    [(1, (8, 8)), (4, (16, 8)), (16, (32, 64)), (5, (7, 3)), (16, (128, 128)), (16, (8, 16))],
)
@pytest.mark.parametrize(("lengths", "counts"), MASK_CASES)
def test_block_mask_is_torchs(
    lengths: list[int],
    counts: list[int],
    block_size: int,
    tile: tuple[int, int],
    window: int | None,
) -> None:
    inputs = random_anchors(lengths, counts, seed=block_size)
    got = ops.block_mask_tensors(
        *inputs, num_context=sum(lengths), block_size=block_size, window=window, tile=tile
    )
    wanted = torch_tensors(inputs, sum(lengths), block_size, window, tile)
    for name, tensor in zip(NAMES, wanted, strict=True):
        assert torch.equal(getattr(got, name), tensor), name


@pytest.mark.skipif(
    emulated.unavailable_reason() is not None, reason=str(emulated.unavailable_reason())
)
@pytest.mark.parametrize("order", emulated.ORDERS)
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize(("block_size", "tile"), [(4, (16, 8)), (5, (7, 3)), (3, (1, 1))])
@pytest.mark.parametrize(("lengths", "counts"), MASK_CASES)
def test_block_mask_kernel_is_the_cpus(
    lengths: list[int],
    counts: list[int],
    block_size: int,
    tile: tuple[int, int],
    window: int | None,
    order: str,
) -> None:
    emulated.set_order(order)
    inputs = random_anchors(lengths, counts, seed=block_size)
    shape = {"num_context": sum(lengths), "block_size": block_size, "tile": tile}
    got = emulated.block_mask(*inputs, **shape, window=window or 0)
    wanted = ops.block_mask_tensors(*inputs, **shape, window=window)
    for name, mine in zip(NAMES, got, strict=True):
        assert torch.equal(mine, getattr(wanted, name)[0, 0]), name


def test_block_mask_without_blocks() -> None:
    none, zero = torch.zeros(0, dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
    got = ops.block_mask_tensors(
        none, zero, torch.tensor([0, 300], dtype=torch.int32), num_context=300, block_size=16
    )
    assert got.kv_num_blocks.shape == (1, 1, 0)
    assert got.q_indices.shape == (1, 1, 3, 0)
    assert not got.q_num_blocks.any() and not got.full_q_num_blocks.any()


def test_block_mask_names_what_does_not_fit() -> None:
    anchors, cu_anchors, cu_seqlens = random_anchors([9, 4], [2, 1], seed=0)

    def build(**change: object) -> None:
        options: dict[str, object] = {"num_context": 13, "block_size": 4} | change
        ops.block_mask_tensors(
            options.pop("anchors", anchors),  # type: ignore[arg-type]
            options.pop("cu_anchors", cu_anchors),  # type: ignore[arg-type]
            cu_seqlens,
            **options,  # type: ignore[arg-type]
        )

    build()
    far = anchors.clone()
    far[2] = 8
    for change, message in (
        ({"window": 0}, "window must be at least 1 or None, got 0"),
        ({"block_size": 0}, "block_size must be at least 1, got 0"),
        ({"tile": (0, 8)}, "q_tile must be at least 1, got 0"),
        ({"tile": (8, 0)}, "kv_tile must be at least 1, got 0"),
        ({"num_context": 12}, "cu_seqlens must end at 12, got 13"),
        ({"num_context": 2**31}, r"T \+ A \* block_size must be below 2\^31"),
        ({"anchors": anchors.long()}, "anchors must be i32"),
        ({"anchors": anchors[:2]}, "cu_anchors must end at 2, got 3"),
        ({"anchors": far}, "each anchor must lie inside its sample, got 8"),
        ({"cu_anchors": cu_anchors[:2]}, r"cu_seqlens must be \[N\+1=2\] i32, got \[3\] i32"),
    ):
        with pytest.raises(ValueError, match=message):
            build(**change)
