"""Room that engines write to: every store that offers it, and a request's samples together."""

from __future__ import annotations

import pickle
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from specforge_ext.copies import counting
from specforge_ext.records import FeatureLayout, FeatureSpec, Prompt, Sample, SampleRef
from specforge_ext.store import STORES
from specforge_ext.store.base import (
    ReservingWriter,
    StaleRef,
    StoreError,
    StoreFull,
    TransferTimeout,
)
from specforge_ext.store.reserving import Reservations, reserving
from store_cases import TIMEOUT_S, make_prompt, same_sample

LAYOUT = FeatureLayout(
    (FeatureSpec("aux", (1, 2), 8, "bfloat16"), FeatureSpec("last", (4,), 4, "float32"))
)
PAGE = 4096
CAPACITY = 16 * PAGE
SLOTS = 6
PROMPTS = [make_prompt(index, tokens) for index, tokens in enumerate((5, 90, 1))]
"""A page of the arena each."""


def features(prompt: Prompt) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(len(prompt))
    return {
        "aux": torch.randn(len(prompt), 8, generator=generator).bfloat16(),
        "last": torch.randn(len(prompt), 4, generator=generator),
    }


@pytest.fixture(scope="module", params=["shm", "mooncake_p2p"])
def sides(request: pytest.FixtureRequest) -> Iterator[tuple[Any, Any]]:
    store = STORES.get(request.param)
    if (reason := store.unavailable()) is not None:
        pytest.skip(reason)
    writer = store.writer(store.Config(capacity_bytes=CAPACITY, max_slots=SLOTS))
    reader = store.reader(writer.address())
    yield writer, reader
    reader.close()
    writer.close()


@pytest.fixture
def writer(sides: tuple[Any, Any]) -> Iterator[Any]:
    """Every test leaves it empty."""
    assert sides[0].health().used_bytes == 0
    yield sides[0]
    assert sides[0].health().used_bytes == 0, sides[0].health()


def write(room: Reservations, prompt: Prompt) -> Sample:
    views = room.views(prompt)
    for name, feature in features(prompt).items():
        views[name].copy_(feature)
    return Sample(prompt, views)


def put(writer: Any, prompt: Prompt) -> SampleRef:
    sample = Sample(prompt, features(prompt))
    ref: SampleRef = writer.put(sample, layout_hash=LAYOUT.hash, timeout_s=TIMEOUT_S)
    return ref


def room_for(writer: Any, prompts: list[Prompt], timeout_s: float = TIMEOUT_S) -> Reservations:
    return Reservations(writer, prompts, LAYOUT, timeout_s=timeout_s)


def long(tokens: int, num: int) -> list[Prompt]:
    return [make_prompt(index, tokens) for index in range(num)]


def test_what_is_written_in_place_is_read(writer: Any, sides: tuple[Any, Any]) -> None:
    _, reader = sides
    with room_for(writer, PROMPTS) as room:
        refs = [room.publish(write(room, prompt)) for prompt in reversed(PROMPTS)]
    for ref, prompt in zip(refs, reversed(PROMPTS), strict=True):
        with reader.open(ref, layout_hash=LAYOUT.hash, verify=True) as lease:
            assert same_sample(lease.sample, Sample(prompt, features(prompt)))
        reader.ack(ref)
    assert writer.reap() >= 0


def test_in_place_nothing_is_copied_by_the_store(writer: Any, sides: tuple[Any, Any]) -> None:
    """Beyond what carries it; `put` copies every byte of the features once."""
    prompt = PROMPTS[1]
    nbytes = sum(f.nbytes for f in features(prompt).values())
    with counting() as copies, room_for(writer, [prompt]) as room:
        refs = [room.publish(write(room, prompt))]
    assert copies.total() == 0
    with counting() as copies:
        refs.append(put(writer, prompt))
    assert copies == {"put": nbytes}
    for ref in refs:
        with counting() as copies:
            sides[1].open(ref, layout_hash=LAYOUT.hash, verify=True).release()
        assert copies.total() == (0 if ref.store.startswith("shm") else nbytes)
        writer.abort(ref)


def test_room_is_taken_in_order_for_all_before_the_first_is_written(writer: Any) -> None:
    with room_for(writer, PROMPTS):
        assert writer.health().used_bytes == 3 * PAGE
        assert writer.health().slots_writing == 3


class Broken(Exception):
    """What an engine may raise: none of the store's errors."""


def test_an_engine_that_raises_in_the_middle(writer: Any, sides: tuple[Any, Any]) -> None:
    """What was published is taken back too: its ref is lost with the answer."""
    with pytest.raises(Broken), room_for(writer, PROMPTS) as room:
        ref = room.publish(write(room, PROMPTS[0]))
        room.views(PROMPTS[1])["aux"][0] = 1.0
        raise Broken
    with pytest.raises(StaleRef):
        sides[1].open(ref, layout_hash=LAYOUT.hash, verify=True)


def test_what_is_not_published_is_given_back(writer: Any) -> None:
    with room_for(writer, PROMPTS) as room:
        room.abort(PROMPTS[1])
        assert writer.health().used_bytes == 2 * PAGE
        ref = room.publish(write(room, PROMPTS[0]))
    assert writer.health().used_bytes == PAGE
    writer.abort(ref)


def test_larger_than_the_store_is_refused_at_once(writer: Any) -> None:
    """Each would fit, in 3 pages (37 bytes a token); together they never do."""
    began = time.monotonic()
    with (
        pytest.raises(
            StoreFull,
            match=r"request \(6 samples\) of 73728 bytes does not fit a store of 65536 bytes",
        ) as caught,
        room_for(writer, long(300, 6)),
    ):
        pass
    assert time.monotonic() - began < 1.0
    again = pickle.loads(pickle.dumps(caught.value))
    assert (str(again), again.needed) == (str(caught.value), caught.value.needed)
    with room_for(writer, long(300, 5)):
        assert writer.health().used_bytes == 15 * PAGE


def test_more_samples_than_slots_are_refused_at_once(writer: Any) -> None:
    with (
        pytest.raises(StoreError, match=r"request of 7 samples does not fit a store of 6 slots"),
        room_for(writer, long(1, 7)),
    ):
        pass


def test_a_deadline_leaves_nothing_behind(writer: Any) -> None:
    """Readers hold 12 pages of 16: the first sample has room, the second has none."""
    held = [put(writer, prompt) for prompt in long(600, 2)]
    assert writer.health().used_bytes == 12 * PAGE
    with (
        pytest.raises(TransferTimeout, match=r"waited 0\.[1-3] s for room for \d+ bytes"),
        room_for(writer, long(400, 2), timeout_s=0.1),
    ):
        pass
    assert writer.health().used_bytes == 12 * PAGE
    threading.Timer(0.1, writer.abort, [held[0]]).start()
    with room_for(writer, long(400, 2)):  # waits
        assert writer.health().used_bytes == 14 * PAGE
    writer.abort(held[1])


def test_one_deadline_for_all(writer: Any) -> None:
    held = put(writer, PROMPTS[0])
    began = time.monotonic()
    with pytest.raises(TransferTimeout), room_for(writer, long(1, SLOTS), timeout_s=0.2):
        pass
    assert 0.2 <= time.monotonic() - began < 1.0
    writer.abort(held)


def test_features_that_were_not_written_in_place(writer: Any) -> None:
    prompt = PROMPTS[0]
    with (
        pytest.raises(ValueError, match=r"'sample-0': wanted .* got other tensors for \['last'\]"),
        room_for(writer, [prompt]) as room,
    ):
        views = room.views(prompt)
        room.publish(Sample(prompt, {**views, "last": views["last"].clone()}))
    with pytest.raises(ValueError, match="in place, got"), room_for(writer, [prompt]) as room:
        room.publish(Sample(prompt, {**room.views(prompt), "more": torch.zeros(5, 1)}))


def test_samples_that_are_not_reserved(writer: Any) -> None:
    with room_for(writer, PROMPTS[:1]) as room:
        for call in (room.views, room.abort):
            with pytest.raises(ValueError, match="'sample-1': wanted one that is reserved"):
                call(PROMPTS[1])
        room.abort(PROMPTS[0])
        with pytest.raises(ValueError, match="'sample-0': wanted one that is reserved"):
            room.abort(PROMPTS[0])
    with pytest.raises(ValueError, match="wanted each sample once, got 'sample-0' 2x"):
        room_for(writer, [PROMPTS[0], PROMPTS[1], PROMPTS[0]])


def test_empty_request(writer: Any) -> None:
    with room_for(writer, []):
        assert writer.health().used_bytes == 0


def test_the_high_mark_bounds_a_request() -> None:
    """It lets no second sample above it; the first one finds an empty arena."""
    store = STORES.get("shm")
    config = store.Config(capacity_bytes=CAPACITY, high_watermark=0.5, low_watermark=0.25)
    writer = store.writer(config)
    with pytest.raises(StoreFull, match=r"2 samples\) of 49152 bytes .* store of 32768 bytes"):
        writer.expect_room(long(600, 2), LAYOUT)
    with room_for(writer, long(1500, 1)):
        assert writer.health().used_bytes > CAPACITY // 2


def test_which_stores_reserve(tmp_path: Any) -> None:
    shm = STORES.get("shm")
    writer = shm.writer(shm.Config(capacity_bytes=CAPACITY))
    assert isinstance(writer, ReservingWriter) and reserving(writer) is writer

    class Encoding(type(writer)):  # type: ignore[misc]
        writes_in_place = False

    assert reserving(Encoding(shm.Config(capacity_bytes=CAPACITY))) is None
    files = STORES.get("shared_dir")
    other = files.writer(files.Config(directory=tmp_path))
    assert reserving(other) is None
    other.close()
