"""A rank's stream over a real store, with a producer's faults injected; what it skips is logged."""

from __future__ import annotations

import dataclasses
import json
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from specforge_ext.config import parse
from specforge_ext.loader import (
    Delivery,
    GlobalStep,
    OrderConfig,
    Skipped,
    StepData,
    Stream,
    StreamConfig,
    TooManySkipped,
    global_steps,
)
from specforge_ext.loader.stream import is_verified
from specforge_ext.records import FeatureLayout, FeatureSpec, Prompt, Sample, SampleRef
from specforge_ext.runs.link import ProducerLink
from specforge_ext.runs.local import SkipLog
from specforge_ext.runs.wire import listen
from specforge_ext.store import STORES
from specforge_ext.store.base import CorruptFeature, ProducerLost, TransferTimeout, UnknownEncoding
from specforge_ext.store.ref import ref_to_json
from specforge_ext.trainer import World, open_world

LAYOUT = FeatureLayout((FeatureSpec("x", (1,), 2, "float32"),))
ORDER = OrderConfig(batch_tokens=24, micro_batch_tokens=12)
LENGTHS = [3, 7, 5, 11, 2, 8, 6, 4, 9, 12, 1, 10]
PROMPTS = [
    Prompt(f"p{i}", torch.arange(n, dtype=torch.int32) + 100 * i, torch.ones(n, dtype=torch.uint8))
    for i, n in enumerate(LENGTHS)
]
STEPS = global_steps(LENGTHS, ORDER, seed=3)


class Link:
    """A producer in the trainer's own thread. Overridden pieces are its faults."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.asked: deque[tuple[int, tuple[str, ...]]] = deque()
        self.closed = False

    def request(self, step: int, sample_ids: Sequence[str]) -> None:
        self.asked.append((step, tuple(sample_ids)))

    def receive(self, *, timeout_s: float) -> Delivery:
        step, sample_ids = self.asked.popleft()
        return self.deliver(step, [p for p in PROMPTS if p.sample_id in sample_ids])

    def deliver(self, step: int, prompts: list[Prompt]) -> Delivery:
        return Delivery(step, tuple(self._store.put(p) for p in prompts), ())

    def close(self) -> None:
        self.closed = True


class Store:
    def __init__(self) -> None:
        kind = STORES.get("shm")
        self.writer = kind.writer(kind.Config(capacity_bytes=1 << 20, max_slots=16))
        self.reader = kind.reader(self.writer.address())

    def put(self, prompt: Prompt) -> SampleRef:
        values = {"x": prompt.input_ids[:, None].repeat(1, 2).float()}
        ref: SampleRef = self.writer.put(
            Sample(prompt, values), layout_hash=LAYOUT.hash, timeout_s=5.0
        )
        return ref


@pytest.fixture
def store() -> Iterator[Store]:
    store = Store()
    yield store
    store.reader.close()
    store.writer.close()


def stream_of(link: Any, store: Store, **config: Any) -> Stream:
    return Stream(
        steps=STEPS,
        prompts=PROMPTS,
        layout=LAYOUT,
        link=link,
        reader=store.reader,
        order=ORDER,
        config=StreamConfig(**config),
        rank=0,
        world_size=1,
    )


def ids_of(data: StepData) -> list[str]:
    return sorted(i for batch in data.micro_batches for i in batch.sample_ids)


def wanted_ids(step: GlobalStep) -> list[str]:
    return sorted(PROMPTS[i].sample_id for i in step.samples)


def threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name == "specforge-stream"]


@pytest.mark.parametrize("start", [0, 2])
def test_every_step_once_in_order(store: Store, start: int) -> None:
    link = Link(store)
    steps = list(stream_of(link, store).iterate(start))
    assert [data.step for data in steps] == [step.step for step in STEPS[start:]]
    for data, step in zip(steps, STEPS[start:], strict=True):
        assert ids_of(data) == wanted_ids(step)
        assert data.tokens == sum(LENGTHS[i] for i in step.samples)
        for batch in data.micro_batches:
            assert torch.equal(batch.features["x"][:, 0], batch.input_ids.float())
    assert link.closed and not threads()
    assert store.writer.health().slots_free == 16  # everything was acknowledged


def test_never_asks_further_ahead_than_allowed(store: Store) -> None:
    """The producer's memory is bounded by that, the trainer's by what it holds back."""
    link = Link(store)
    steps = stream_of(link, store, in_flight_steps=1, prefetch_steps=1).iterate(0)
    assert next(steps).step == 0
    deadline = time.monotonic() + 10
    # Step 0 is in use, step 1 waits, step 2 is packed and has no room, step 3 is asked for.
    while [step for step, _ in link.asked] != [3]:
        assert time.monotonic() < deadline, link.asked
        time.sleep(0.01)
    time.sleep(0.05)
    assert [step for step, _ in link.asked] == [3]
    steps.close()


class SkippingLink(Link):
    def deliver(self, step: int, prompts: list[Prompt]) -> Delivery:
        if step == 1:
            return Delivery(step, (), tuple(Skipped(p.sample_id, "not finite") for p in prompts))
        lost, *rest = prompts
        refs = tuple(self._store.put(p) for p in rest)
        return Delivery(step, refs, (Skipped(lost.sample_id, "too cold"),))


def test_skipped_samples_leave_a_gap_and_nothing_moves(store: Store) -> None:
    steps = list(stream_of(SkippingLink(store), store, max_skipped=12).iterate(0))
    assert steps[1].micro_batches == () and steps[1].tokens == 0
    for data, step in zip(steps, STEPS, strict=True):
        lost = [skipped.sample_id for skipped in data.skipped]
        assert sorted(ids_of(data) + lost) == wanted_ids(step)
        assert data.samples == len(step.samples) - len(lost)


def test_too_many_skipped(store: Store) -> None:
    steps = stream_of(SkippingLink(store), store, max_skipped=1).iterate(0)
    assert next(steps).skipped[0].reason == "too cold"
    lost = len(STEPS[1].samples) + 1
    with pytest.raises(
        TooManySkipped, match=rf"{lost} samples .* stream.max_skipped is 1; the last: p\d+: not"
    ):
        next(steps)


class LateFault(Link):
    """A fault at step 2: what was delivered before it stays good."""

    def deliver(self, step: int, prompts: list[Prompt]) -> Delivery:
        good = super().deliver(step, prompts)
        return good if step < 2 else self.spoil(good, prompts)

    def spoil(self, good: Delivery, prompts: list[Prompt]) -> Delivery:
        raise NotImplementedError


class WrongStep(LateFault):
    def spoil(self, good: Delivery, prompts: list[Prompt]) -> Delivery:
        return dataclasses.replace(good, step=3)


class Incomplete(LateFault):
    def spoil(self, good: Delivery, prompts: list[Prompt]) -> Delivery:
        return dataclasses.replace(good, refs=good.refs[1:])


class OtherTokens(LateFault):
    def spoil(self, good: Delivery, prompts: list[Prompt]) -> Delivery:
        other = dataclasses.replace(prompts[0], input_ids=prompts[0].input_ids + 1)
        return dataclasses.replace(good, refs=(self._store.put(other), *good.refs[1:]))


class Corrupt(LateFault):
    def spoil(self, good: Delivery, prompts: list[Prompt]) -> Delivery:
        first = good.refs[0]
        tensors = tuple(dataclasses.replace(t, checksum=7) for t in first.tensors)
        return dataclasses.replace(
            good, refs=(dataclasses.replace(first, tensors=tensors), *good.refs[1:])
        )


@pytest.mark.parametrize(
    ("link", "error", "message"),
    [
        (WrongStep, RuntimeError, "asked for step 2, got step 3"),
        (Incomplete, RuntimeError, r"step 2: wanted samples \['p.* or why not, got \["),
        (OtherTokens, ValueError, r"sample p\d+: the store holds other token ids than the data"),
        (Corrupt, CorruptFeature, r"sample 'p\d+': input_ids: wanted crc32c 00000007"),
    ],
)
def test_faults_surface_at_their_step(
    store: Store, link: type[Link], error: type[Exception], message: str
) -> None:
    steps = stream_of(link(store), store).iterate(0)
    assert [next(steps).step, next(steps).step] == [0, 1]
    with pytest.raises(error, match=message):
        next(steps)
    assert not threads()


@pytest.fixture
def peer(tmp_path: Path) -> Iterator[tuple[ProducerLink, socket.socket]]:
    """A connected link, and the socket of a producer that says nothing by itself."""
    path = str(tmp_path / "s")
    with listen(path) as listener:
        link = ProducerLink(path, timeout_s=5.0)
        with listener.accept()[0] as raw:
            yield link, raw
    link.close()


def say(raw: socket.socket, **message: Any) -> None:
    data = json.dumps(message).encode()
    raw.sendall(struct.pack("<I", len(data)) + data)


def test_deadline_names_the_step(store: Store, peer: tuple[ProducerLink, socket.socket]) -> None:
    steps = stream_of(peer[0], store, timeout_s=0.2).iterate(1)
    with pytest.raises(TransferTimeout, match=r"waited 0\.2 s for the features of step 1 from"):
        next(steps)


def test_what_the_producer_refuses(store: Store, peer: tuple[ProducerLink, socket.socket]) -> None:
    say(peer[1], op="error", text="step 0: no room")
    with pytest.raises(RuntimeError, match="the producer refused: step 0: no room"):
        next(stream_of(peer[0], store).iterate(0))


def test_unexpected_message(store: Store, peer: tuple[ProducerLink, socket.socket]) -> None:
    say(peer[1], op="hello")
    with pytest.raises(RuntimeError, match="the producer sent 'hello' instead of refs"):
        next(stream_of(peer[0], store).iterate(0))


def test_lost_producer(store: Store, peer: tuple[ProducerLink, socket.socket]) -> None:
    steps = stream_of(peer[0], store).iterate(0)
    threading.Timer(0.2, peer[1].shutdown, [socket.SHUT_RDWR]).start()
    with pytest.raises(ProducerLost, match="the producer closed the connection"):
        next(steps)


def test_leaving_early_does_not_wait_for_the_producer(
    store: Store, peer: tuple[ProducerLink, socket.socket]
) -> None:
    """As after SIGTERM: the thread waits for a step that nobody needs any more."""
    link, raw = peer
    step = STEPS[0]
    refs = [ref_to_json(store.put(PROMPTS[i])) for i in step.samples]
    say(raw, op="refs", step=0, refs=refs, skipped=[], copied={})
    steps = stream_of(link, store, timeout_s=60.0).iterate(0)
    assert next(steps).step == 0
    time.sleep(0.1)  # the thread waits for step 1
    assert threads()
    began = time.monotonic()
    steps.close()
    assert time.monotonic() - began < 2.0
    assert not threads()


def test_hello_of_another_layout(peer: tuple[ProducerLink, socket.socket]) -> None:
    say(peer[1], op="hello", store="shm:1", layout_hash="feed")
    with pytest.raises(ValueError, match="makes features of layout feed, this rank trains on cafe"):
        peer[0].hello(layout_hash="cafe", timeout_s=5.0)


def test_hello_of_an_encoding_to_come(peer: tuple[ProducerLink, socket.socket]) -> None:
    say(
        peer[1],
        op="hello",
        store="shm:1",
        capacity_bytes=1,
        layout_hash="cafe",
        encoding="int4_row",
    )
    with pytest.raises(
        UnknownEncoding, match="producer's store: wanted one of none, fp8_e4m3_row, got 'int4_row'"
    ):
        peer[0].hello(layout_hash="cafe", timeout_s=5.0)


class Steps:
    """A StepSource of steps that are known."""

    def __init__(self, steps: Sequence[StepData]) -> None:
        self._steps = steps
        self.total_steps = len(steps)

    def iterate(self, start_step: int) -> Iterator[StepData]:
        yield from self._steps[start_step:]


@pytest.fixture
def world() -> Iterator[World]:
    with open_world(device="cpu", timeout_s=30) as world:
        yield world


def test_skip_log_of_an_interrupted_run(world: World, tmp_path: Path) -> None:
    """Lines of steps that are done again are replaced, also one that was cut by a kill."""
    path = tmp_path / "out" / "skipped.jsonl"
    data = [
        StepData(step, (), 0.0, 0, 0, (Skipped(f"s{step}", "cold"),) if step != 1 else ())
        for step in range(4)
    ]
    first = SkipLog(Steps(data), path, world)
    run = first.iterate(0)
    assert [next(run).step for _ in range(3)] == [0, 1, 2]
    assert first.count() == 2  # before the step is trained, so that no checkpoint comes first
    run.close()
    with path.open("a") as file:
        file.write('{"step": 3, "sam')
    again = SkipLog(Steps(data), path, world)
    assert len(list(again.iterate(2))) == 2
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == [
        {"step": step, "sample_id": f"s{step}", "reason": "cold", "rank": 0} for step in (0, 2, 3)
    ]
    assert again.count() == 3
    # A run that has nothing to do does not iterate, and still knows.
    assert SkipLog(Steps(data), path, world).count() == 3


def test_verify_is_off_sample_or_full() -> None:
    """YAML reads off as false."""
    for given, wanted in ((False, "off"), (True, "full"), ("sample", "sample")):
        assert parse(StreamConfig, {"verify": given}).verify == wanted
    with pytest.raises(ValueError, match=r"verify: .*'off', 'sample' or 'full', got 'some'"):
        parse(StreamConfig, {"verify": "some"})
    refs = [SampleRef(f"s{i}", "shm:1", 0, i % 5 + 1, "x", 0, 0, ()) for i in range(3200)]
    assert not any(is_verified(ref, "off") for ref in refs)
    assert all(is_verified(ref, "full") for ref in refs)
    chosen = [ref for ref in refs if is_verified(ref, "sample")]
    assert 150 < len(chosen) < 250  # of 3200, one in 16
    others = [dataclasses.replace(ref, generation=ref.generation + 1) for ref in chosen]
    assert not all(is_verified(ref, "sample") for ref in others)


def test_what_is_not_verified_is_not_checked(store: Store) -> None:
    """A wrong checksum passes when it is off, and is found when it is not."""

    class Wrong(Link):
        def deliver(self, step: int, prompts: list[Prompt]) -> Delivery:
            refs = [self._store.put(p) for p in prompts]
            wrong = [
                dataclasses.replace(
                    ref, tensors=tuple(dataclasses.replace(t, checksum=1) for t in ref.tensors)
                )
                for ref in refs
            ]
            return Delivery(step, tuple(wrong), ())

    assert len(list(stream_of(Wrong(store), store, verify="off").iterate(0))) == len(STEPS)
    with pytest.raises(CorruptFeature):
        list(stream_of(Wrong(store), store, verify="full").iterate(0))
