"""Batches sent ahead: the order of what is queued, checked with a side that writes it down.

The device is `meta`: another device than the batches', as real to `PackedBatch.to` as a GPU.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import trainer_toy as toy
from specforge_ext.copies import counting
from specforge_ext.loader import StepData
from specforge_ext.records import PackedBatch
from specforge_ext.trainer.prefetch import DevicePrefetcher, tensors_of

CPU, META = torch.device("cpu"), torch.device("meta")


class WrittenDown:
    """A SideQueue: marks are numbers, `calls` is what was asked for in its order."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []
        self.kept: list[Tensor] = []
        self._marks = itertools.count()

    def run(self, copy: Callable[[], PackedBatch]) -> tuple[PackedBatch, Any]:
        batch, mark = copy(), next(self._marks)
        self.calls.append(("send", batch.sample_ids[0]))
        return batch, (batch.sample_ids[0], mark)

    def join(self, mark: Any) -> None:
        self.calls.append(("join", mark[0]))

    def keep(self, tensor: Tensor) -> None:
        self.kept.append(tensor)

    def current(self) -> Any:
        self.calls.append(("current", None))
        return len(self.calls)

    def wait(self, mark: Any) -> None:
        self.calls.append(("wait", self.calls[mark - 2][1]))


def steps(*sizes: int) -> list[StepData]:
    """Steps of so many micro-batches of one sample, "s<step>.<micro-batch>"; each sees the next."""
    made = [
        StepData(step, tuple(toy.make_batch(step, [i]) for i in range(size)), 0.0, size, size)
        for step, size in enumerate(sizes)
    ]

    def first_of(step: int) -> Callable[[], PackedBatch | None]:
        following = made[step + 1].micro_batches if step + 1 < len(made) else ()
        return lambda: following[0] if following else None

    return [replace(data, upcoming=first_of(data.step)) for data in made]


def train(prefetcher: DevicePrefetcher, side: WrittenDown, data: StepData) -> list[PackedBatch]:
    seen = []
    for batch in prefetcher.batches(data):
        side.calls.append(("compute", batch.sample_ids[0]))
        seen.append(batch)
    return seen


def test_the_next_batch_is_sent_before_this_one_is_computed_on() -> None:
    side = WrittenDown()
    prefetcher = DevicePrefetcher(META, side)
    first, second = steps(2, 1)
    train(prefetcher, side, first)
    train(prefetcher, side, second)
    assert side.calls == [
        ("send", "s0.0"),  # nobody sent it ahead
        ("join", "s0.0"),
        ("send", "s0.1"),
        ("compute", "s0.0"),
        ("current", None),
        ("join", "s0.1"),
        ("send", "s1.0"),  # of the next step
        ("compute", "s0.1"),
        ("current", None),
        ("join", "s1.0"),
        ("compute", "s1.0"),
        ("current", None),
    ]


def test_every_batch_is_sent_once_and_joined_before_its_use() -> None:
    side = WrittenDown()
    prefetcher = DevicePrefetcher(META, side)
    plan = steps(3, 0, 1, 4, 2)
    for data in plan:
        train(prefetcher, side, data)
    names = [b.sample_ids[0] for data in plan for b in data.micro_batches]
    for what in ("send", "join", "compute"):
        assert [name for kind, name in side.calls if kind == what] == names
    for name in names:
        places = [side.calls.index((what, name)) for what in ("send", "join", "compute")]
        assert places == sorted(places)


def test_never_more_than_three_batches_on_the_device() -> None:
    """Sent, and not known to be done with: the host has waited for the rest."""
    side = WrittenDown()
    prefetcher = DevicePrefetcher(META, side)
    for data in steps(5, 1, 3):
        train(prefetcher, side, data)
    alive, most = set(), 0
    for kind, name in side.calls:
        if kind == "send":
            alive.add(name)
        elif kind == "wait":
            alive.remove(name)
        most = max(most, len(alive))
    assert most == 3
    waits = [name for kind, name in side.calls if kind == "wait"]
    assert waits == [name for kind, name in side.calls if kind == "compute"][: len(waits)]


def test_memory_is_kept_for_the_stream_that_reads_it() -> None:
    """record_stream for every tensor of every batch that is handed on, and for no other."""
    side = WrittenDown()
    [data] = steps(2)
    seen = train(DevicePrefetcher(META, side), side, data)
    assert all(tensor.device == META for batch in seen for tensor in tensors_of(batch))
    assert len(tensors_of(seen[0])) == 5
    wanted = [tensor for batch in seen for tensor in tensors_of(batch)]
    assert [id(tensor) for tensor in side.kept] == [id(tensor) for tensor in wanted]


def test_a_batch_that_was_not_expected_is_sent_then() -> None:
    """After a step that was dropped, say: the one ahead is let go."""
    side = WrittenDown()
    prefetcher = DevicePrefetcher(META, side)
    first, _, third = steps(1, 1, 1)
    train(prefetcher, side, first)
    [batch] = train(prefetcher, side, third)
    assert batch.sample_ids == ("s2.0",)
    assert [name for kind, name in side.calls if kind == "send"] == ["s0.0", "s1.0", "s2.0"]


def test_features_are_counted_when_they_are_used() -> None:
    side = WrittenDown()
    prefetcher = DevicePrefetcher(META, side)
    for data in steps(2, 1):
        with counting() as copies:
            train(prefetcher, side, data)
        nbytes = sum(b.features["x"].nbytes for b in data.micro_batches)
        assert copies == {"device": nbytes}
    there = replace(data, micro_batches=tuple(b.to(META) for b in data.micro_batches))
    with counting() as copies:
        train(prefetcher, side, there)
    assert copies.total() == 0


def test_on_the_cpu_the_batches_are_handed_on() -> None:
    [data] = steps(3)

    def not_asked() -> PackedBatch | None:
        raise AssertionError("there is nothing to send ahead")

    with counting() as copies:
        seen = list(DevicePrefetcher(CPU).batches(replace(data, upcoming=not_asked)))
    assert all(a is b for a, b in zip(seen, data.micro_batches, strict=True))
    assert copies.total() == 0


@pytest.fixture
def cuda() -> Iterator[torch.device]:
    if not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")
    yield torch.device("cuda", torch.cuda.current_device())


def pinned(batch: PackedBatch) -> PackedBatch:
    return replace(
        batch,
        input_ids=batch.input_ids.pin_memory(),
        loss_mask=batch.loss_mask.pin_memory(),
        positions=batch.positions.pin_memory(),
        cu_seqlens=batch.cu_seqlens.pin_memory(),
        features={name: feature.pin_memory() for name, feature in batch.features.items()},
    )


@pytest.mark.gpu
def test_values_arrive_while_the_device_is_busy(cuda: torch.device) -> None:
    """Large batches, slow work on each, memory let go at once: reuse too early would show."""
    big = 4 << 20
    batches = tuple(
        pinned(replace(toy.make_batch(0, [i]), features={"x": torch.full((big,), float(i))}))
        for i in range(8)
    )
    prefetcher = DevicePrefetcher(cuda)
    sums = []
    for _ in range(3):
        for batch in prefetcher.batches(StepData(0, batches, 0.0, 0, 0)):
            torch.cuda._sleep(20_000_000)
            sums.append(batch.features["x"].double().sum())
            del batch
    assert [float(s) for s in sums] == [float(i) * big for i in range(8)] * 3


@pytest.mark.gpu
def test_a_copy_does_not_wait_for_the_computation(cuda: torch.device) -> None:
    """The next batch has arrived before the work on this one, queued earlier, is done."""
    batches = tuple(pinned(toy.make_batch(0, [i])) for i in range(2))
    prefetcher = DevicePrefetcher(cuda)
    for _ in prefetcher.batches(StepData(0, batches, 0.0, 0, 0)):
        pass  # memory for the next time: getting it from the driver may wait for the device
    torch.cuda.synchronize(cuda)
    torch.cuda._sleep(400_000_000)
    ended = torch.cuda.Event()
    ended.record()
    stream = prefetcher.batches(StepData(0, batches, 0.0, 0, 0))
    next(stream)
    assert prefetcher._ahead is not None
    prefetcher._ahead[2].synchronize()
    assert not ended.query()
    stream.close()
    torch.cuda.synchronize(cuda)
