"""Who is let into an arena: byte credits between two marks, and first come first served."""

from __future__ import annotations

import threading
import time

import pytest

from specforge_ext import _C
from specforge_ext.store.base import TransferTimeout

PAGE = 4096


def make(num_pages: int, *, high: float = 1.0, low: float = 1.0) -> _C.ArenaProducer:
    return _C.ArenaProducer(num_pages * PAGE, 64, high_watermark=high, low_watermark=low)


def pages(producer: _C.ArenaProducer, num_pages: int, timeout_s: float = 0) -> _C.ArenaReservation:
    return producer.acquire(num_pages * PAGE, timeout_s)


def wait_until_queued(producer: _C.ArenaProducer, num_waiting: int) -> None:
    """A wait of 0 s names how many came before it."""
    deadline = time.monotonic() + 20
    said = "there was room"
    while f"earlier waits: {num_waiting})" not in said:
        assert time.monotonic() < deadline, f"waited 20 s for {num_waiting} waits, got: {said}"
        time.sleep(0.005)
        try:
            pages(producer, 1).abort()
        except TransferTimeout as error:
            said = str(error)


class Waits:
    """Threads that acquire; `order` is in which order they were served."""

    def __init__(self, producer: _C.ArenaProducer) -> None:
        self.producer = producer
        self.order: list[str] = []
        self.held: list[_C.ArenaReservation] = []
        self.threads: list[threading.Thread] = []

    def start(self, name: str, num_pages: int, timeout_s: float = 60) -> None:
        def wait() -> None:
            try:
                self.held.append(pages(self.producer, num_pages, timeout_s))
                self.order.append(name)
            except TransferTimeout:
                self.order.append(f"{name} gave up")

        self.threads.append(threading.Thread(target=wait))
        self.threads[-1].start()
        wait_until_queued(self.producer, len(self.threads))

    def join(self) -> None:
        for thread in self.threads:
            thread.join(60)
            assert not thread.is_alive()


def test_large_is_not_starved_by_small() -> None:
    """There is room for the small ones all the time, but the large one came first."""
    producer = make(8)
    held = [pages(producer, 1) for _ in range(4)]
    waits = Waits(producer)
    waits.start("large", 8)
    for index in range(3):
        waits.start(f"small {index}", 1)
    assert waits.order == []
    for slot in held:
        slot.abort()
    waits.threads[0].join(60)
    assert waits.order == ["large"]
    waits.held.pop().abort()
    waits.join()
    assert sorted(waits.order[1:]) == ["small 0", "small 1", "small 2"]


def test_served_in_order() -> None:
    producer = make(2)
    held = pages(producer, 2)
    waits = Waits(producer)
    for index in range(4):
        waits.start(str(index), 2)
    for index in range(4):
        (waits.held.pop() if index else held).abort()
        waits.threads[index].join(60)
        assert waits.order == [str(i) for i in range(index + 1)]


def test_who_gives_up_lets_the_next_in() -> None:
    producer = make(4)
    held = pages(producer, 1)
    waits = Waits(producer)
    waits.start("large", 4, timeout_s=2)
    waits.start("small", 1)
    waits.join()
    assert sorted(waits.order) == ["large gave up", "small"]
    held.abort()


def test_marks() -> None:
    """Up to the high mark as it comes; then nothing until no more than the low one is used."""
    producer = make(10, high=0.8, low=0.3)
    held = [pages(producer, 1) for _ in range(8)]
    closed = rf"; closed until at most {3 * PAGE} are used\)$"
    for _ in range(5):
        with pytest.raises(TransferTimeout, match=closed):
            pages(producer, 1)
        held.pop().abort()
    held = [*held, *(pages(producer, 1) for _ in range(5))]
    with pytest.raises(TransferTimeout, match=f"used {8 * PAGE}, .*{closed}"):
        pages(producer, 1)


def test_marks_wake_a_wait() -> None:
    producer = make(4, high=1, low=0.5)
    held = [pages(producer, 1) for _ in range(4)]
    waits = Waits(producer)
    waits.start("waits", 1)
    held.pop().abort()
    time.sleep(0.3)
    assert waits.order == []
    held.pop().abort()
    waits.join()
    assert waits.order == ["waits"]


def test_equal_marks_are_no_hysteresis() -> None:
    producer = make(4)
    held = [pages(producer, 1) for _ in range(4)]
    for _ in range(3):
        with pytest.raises(TransferTimeout, match=r"0 draining\)$"):
            pages(producer, 1)
        held.pop().abort()
        held.append(pages(producer, 1))


def test_empty_arena_takes_what_is_above_the_high_mark() -> None:
    producer = make(10, high=0.5, low=0.5)
    held = pages(producer, 1)
    with pytest.raises(TransferTimeout):
        pages(producer, 9)
    held.abort()
    pages(producer, 9).abort()


@pytest.mark.parametrize(("high", "low"), [(1.1, 1.0), (0.5, 0.6), (1.0, 0.0), (float("nan"), 1)])
def test_marks_that_cannot_be(high: float, low: float) -> None:
    with pytest.raises(ValueError, match=r"watermarks must be 0 < low <= high <= 1, got low"):
        make(4, high=high, low=low)
