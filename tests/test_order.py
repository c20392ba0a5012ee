"""The order is a pure function; the same samples on any world size; balance; named errors."""

from __future__ import annotations

import random

import pytest

from specforge_ext.loader.order import GlobalStep, OrderConfig, global_steps, micro_batches, share


def _lengths(n: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randint(5, 120) for _ in range(n)]


def test_every_epoch_holds_every_sample_once() -> None:
    lengths = _lengths(301)
    steps = global_steps(lengths, OrderConfig(batch_tokens=500, epochs=3), seed=7)
    assert [s.step for s in steps] == list(range(len(steps)))
    for epoch in range(3):
        seen = [i for s in steps if s.epoch == epoch for i in s.samples]
        assert sorted(seen) == list(range(301))


def test_pure_in_seed_and_different_between_epochs() -> None:
    lengths = _lengths(100)
    config = OrderConfig(batch_tokens=400, epochs=2)
    first = global_steps(lengths, config, seed=1)
    assert first == global_steps(lengths, config, seed=1)
    assert first != global_steps(lengths, config, seed=2)
    epoch = [[i for s in first if s.epoch == e for i in s.samples] for e in (0, 1)]
    assert epoch[0] != epoch[1]


def test_golden_order() -> None:
    """Frozen: a change here breaks the resumption of every run that was saved before it."""
    steps = global_steps([3, 5, 4, 6, 2, 7], OrderConfig(batch_tokens=10), seed=0)
    assert [s.samples for s in steps] == GOLDEN


GOLDEN = [(3, 2), (5, 4), (0, 1)]


def test_budget_holds() -> None:
    lengths = _lengths(500)
    steps = global_steps(lengths, OrderConfig(batch_tokens=400), seed=3)
    assert all(sum(lengths[i] for i in s.samples) <= 600 for s in steps)
    assert all(sum(lengths[i] for i in s.samples) <= 400 for s in steps[:-1])
    assert all(sum(lengths[i] for i in s.samples) > 400 - 120 for s in steps[:-1])


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_ranks_partition_a_step_and_are_balanced(world_size: int) -> None:
    lengths = _lengths(400)
    config = OrderConfig(batch_tokens=2000, micro_batch_tokens=300)
    for step in global_steps(lengths, config, seed=5):
        shares = [share(step, lengths, rank=r, world_size=world_size) for r in range(world_size)]
        assert sorted(i for part in shares for i in part) == sorted(step.samples)
        loads = [sum(lengths[i] for i in part) for part in shares]
        assert max(loads) - min(loads) <= 120
        parts = [
            micro_batches(step, lengths, config, rank=r, world_size=world_size)
            for r in range(world_size)
        ]
        for part, taken in zip(parts, shares, strict=True):
            assert all(part) and sorted(i for b in part for i in b) == sorted(taken)
            assert all(sum(lengths[i] for i in b) <= 300 for b in part)


def test_max_steps() -> None:
    assert len(global_steps(_lengths(100), OrderConfig(batch_tokens=200, max_steps=3), seed=0)) == 3


def test_errors_name_the_key() -> None:
    with pytest.raises(ValueError, match=r"sample 1 has 50 tokens, the budget is 40"):
        global_steps([10, 50], OrderConfig(batch_tokens=40), seed=0)
    with pytest.raises(ValueError, match=r"epochs\n.*greater than or equal to 1"):
        global_steps([10], OrderConfig(epochs=0), seed=0)
    with pytest.raises(ValueError, match="data set is empty"):
        global_steps([], OrderConfig(), seed=0)


def test_more_ranks_than_samples_leave_a_rank_without_work() -> None:
    step = GlobalStep(0, 0, (0,))
    parts = [micro_batches(step, [10], OrderConfig(), rank=r, world_size=2) for r in (0, 1)]
    assert parts == [[[0]], []]
