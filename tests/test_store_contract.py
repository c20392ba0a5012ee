"""What every store promises, asked of each of them."""

from __future__ import annotations

import pickle
import random
import re
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch

from specforge_ext.records import DTYPES, Sample, SampleRef
from specforge_ext.store import STORES, mooncake
from specforge_ext.store.base import (
    CorruptFeature,
    LayoutMismatch,
    ProducerLost,
    StaleRef,
    StoreError,
    StoreFull,
    TransferTimeout,
)
from specforge_ext.store.mooncake_master import Master
from specforge_ext.store.ref import ref_from_json, ref_to_json
from store_cases import LAYOUT_HASH, SLOWDOWN, TIMEOUT_S, make_prompt, make_sample, same_sample
from store_kinds import (
    CARRIERS,
    ON_GPU,
    VARIANTS,
    Opened,
    flip,
    kill,
    receive,
    settings_of,
    started,
)

HALF = 300
"""Tokens of a sample of more than a third and less than half of SMALL."""
SMALL = 1 << 19


@pytest.fixture(scope="module")
def master() -> Iterator[str | None]:
    """One for all tests: a store's epoch keeps it apart from others. None without Mooncake."""
    if mooncake.unavailable() is not None:
        yield None
        return
    master = Master()
    yield master.address
    master.close()


@pytest.fixture(scope="module")
def kept(master: str | None) -> Iterator[dict[object, list[Any]]]:
    kept: dict[object, list[Any]] = {}
    yield kept
    for group in reversed(kept.values()):  # readers came after their writers
        for it in group:
            it.close()


@pytest.fixture(params=VARIANTS)
def opened(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    master: str | None,
    kept: dict[object, list[Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Opened]:
    settings = settings_of(request.param, monkeypatch)
    kind = request.param.removesuffix(ON_GPU)
    if kind == "shared_dir":
        settings["directory"] = tmp_path / "store"
    if kind == "mooncake_store":
        settings["master"] = master
    opened = Opened(kind, settings, kept)
    yield opened
    opened.close()


def put(writer: Any, sample: Sample, timeout_s: float = TIMEOUT_S) -> SampleRef:
    ref = writer.put(sample, layout_hash=LAYOUT_HASH, timeout_s=timeout_s)
    assert ref_from_json(ref_to_json(ref)) == ref
    return ref


def expect_equal(reader: Any, ref: SampleRef, sample: Sample) -> None:
    with reader.open(ref, layout_hash=LAYOUT_HASH, verify=True) as lease:
        assert same_sample(lease.sample, sample)


# No token, one token; no value and one value of width; odd sizes; beyond a page.
@pytest.mark.parametrize(("num_tokens", "width"), [(0, 5), (1, 1), (7, 0), (7, 33), (131, 129)])
def test_round_trip(opened: Opened, num_tokens: int, width: int) -> None:
    writer = opened.writer(SMALL)
    reader = opened.reader(writer)
    sample = make_sample(3, num_tokens, width)
    ref = put(writer, sample)
    assert ref.store.startswith(f"{opened.kind}:")
    assert {t.dtype for t in ref.tensors} == set(DTYPES)
    with reader.open(ref, layout_hash=LAYOUT_HASH, verify=True) as lease:
        assert same_sample(lease.sample, sample)
        assert all(f.data_ptr() % 64 == 0 for f in lease.sample.features.values())
    expect_equal(reader, ref, sample)
    reader.ack(ref)
    assert (writer.health().num_samples, writer.health().used_bytes) == (0, 0)


def test_says_what_it_is(opened: Opened) -> None:
    writer = opened.writer(SMALL)
    reader = opened.reader(writer)
    expected = writer.capabilities()
    if opened.kind == "mooncake_store":  # of which only the readers' pools may lie on a GPU
        expected = replace(expected, on_gpu="direct" in opened.settings)
    assert reader.capabilities() == expected
    assert writer.capabilities().kind == opened.kind
    assert writer.capabilities().protocol == CARRIERS[opened.kind]
    assert writer.capabilities().describe() == f"{opened.kind} over {CARRIERS[opened.kind]}"
    assert writer.capacity_bytes == writer.health().capacity_bytes == SMALL
    assert STORES.get(opened.kind).unavailable() is None
    assert reader.producer_alive


def test_stale_after_ack_and_when_the_place_is_used_again(opened: Opened) -> None:
    writer = opened.writer(SMALL)
    reader = opened.reader(writer)
    first = put(writer, make_sample(1, HALF))
    reader.ack(first)
    with pytest.raises(StaleRef, match=r"sample-1|slot 0"):
        reader.open(first, layout_hash=LAYOUT_HASH, verify=True)
    assert writer.health().num_samples == 0
    second = put(writer, make_sample(2, HALF))
    assert (second.slot, second.generation) == (first.slot, first.generation + 1)
    with pytest.raises(StaleRef, match=r"sample-1|slot 0"):
        reader.open(first, layout_hash=LAYOUT_HASH, verify=True)
    expect_equal(reader, second, make_sample(2, HALF))


def test_ref_of_another_store(opened: Opened) -> None:
    writer, other = opened.writer(SMALL), opened.writer(SMALL)
    reader = opened.reader(other)
    ref = put(writer, make_sample(1))
    for call in (
        lambda: reader.open(ref, layout_hash=LAYOUT_HASH, verify=True),
        lambda: reader.ack(ref),
        lambda: other.abort(ref),
    ):
        with pytest.raises(StaleRef, match=rf"wanted store '{opened.kind}:\w+', got"):
            call()


def test_abort_frees_the_room(opened: Opened) -> None:
    writer = opened.writer(SMALL)
    reader = opened.reader(writer)
    ref = put(writer, make_sample(1))
    writer.abort(ref)
    assert writer.health().num_samples == 0
    with pytest.raises(StaleRef):
        reader.open(ref, layout_hash=LAYOUT_HASH, verify=True)


def test_another_layout(opened: Opened) -> None:
    writer = opened.writer(SMALL)
    reader = opened.reader(writer)
    ref = put(writer, make_sample(1))
    with pytest.raises(LayoutMismatch, match=r"wanted layout 'f{16}', got '0123456789abcdef'"):
        reader.open(ref, layout_hash="f" * 16, verify=True)


def test_impossible_ref(opened: Opened) -> None:
    writer = opened.writer(SMALL)
    reader = opened.reader(writer)
    ref = put(writer, make_sample(1))
    with pytest.raises(ValueError, match=r"ref.slot: wanted an integer in 0\.\.4294967295, got -1"):
        reader.open(replace(ref, slot=-1), layout_hash=LAYOUT_HASH, verify=True)


def test_every_corrupt_byte_is_seen(opened: Opened) -> None:
    """One bit of each byte of a small sample, in turn."""
    writer = opened.writer(SMALL)
    reader = opened.reader(writer)
    sample = make_sample(1, 2, 3)
    ref = put(writer, sample)
    for tensor in ref.tensors:
        for at in range(tensor.offset, tensor.offset + tensor.nbytes):
            flip(writer, ref, at)
            with pytest.raises(CorruptFeature, match=f"{tensor.name}: wanted crc32c"):
                reader.open(ref, layout_hash=LAYOUT_HASH, verify=True)
            if at == tensor.offset:
                reader.open(ref, layout_hash=LAYOUT_HASH, verify=False).release()
            flip(writer, ref, at)
    expect_equal(reader, ref, sample)


def test_ref_of_another_size(opened: Opened) -> None:
    writer = opened.writer(SMALL)
    reader = opened.reader(writer)
    ref = put(writer, make_sample(1))
    longer = replace(ref, nbytes=ref.nbytes + 64)
    with pytest.raises(CorruptFeature, match=rf"wanted {longer.nbytes} bytes, .* {ref.nbytes}"):
        reader.open(longer, layout_hash=LAYOUT_HASH, verify=False)


def test_without_checksums(opened: Opened) -> None:
    writer = opened.writer(SMALL, checksum=False)
    reader = opened.reader(writer)
    ref = put(writer, make_sample(1))
    assert all(tensor.checksum is None for tensor in ref.tensors)
    with reader.open(ref, layout_hash=LAYOUT_HASH, verify=False) as lease:
        assert same_sample(lease.sample, make_sample(1))
    with pytest.raises(CorruptFeature, match="input_ids: wanted a checksum to verify"):
        reader.open(ref, layout_hash=LAYOUT_HASH, verify=True)


def test_too_large_is_refused_at_once(opened: Opened) -> None:
    writer = opened.writer(SMALL)
    began = time.monotonic()
    with pytest.raises(StoreFull, match=rf"sample of \d+ bytes .* {SMALL} bytes") as caught:
        put(writer, make_sample(1, 3 * HALF))
    assert time.monotonic() - began < 1.0 * SLOWDOWN
    assert caught.value.available == SMALL
    assert caught.value.needed > SMALL


def test_a_wait_for_room_ends_in_time_and_says_so(opened: Opened) -> None:
    writer = opened.writer(SMALL)
    opened.reader(writer)
    refs = [put(writer, make_sample(index, HALF)) for index in range(2)]
    with pytest.raises(TransferTimeout, match=r"waited \d+\.\d s for room for \d+ bytes") as caught:
        put(writer, make_sample(2, HALF), timeout_s=0.2)
    assert 0.2 <= caught.value.waited_s < 2.0 * SLOWDOWN
    assert writer.health().num_samples == len(refs)


def test_a_wait_for_room_ends_with_an_ack(opened: Opened) -> None:
    writer = opened.writer(SMALL)
    reader = opened.reader(writer)
    refs = [put(writer, make_sample(index, HALF)) for index in range(2)]
    came: list[SampleRef] = []
    thread = threading.Thread(target=lambda: came.append(put(writer, make_sample(2, HALF))))
    thread.start()
    time.sleep(0.1 * SLOWDOWN)
    assert not came
    reader.ack(refs[0])
    thread.join(TIMEOUT_S)
    assert len(came) == 1
    for index, ref in ((1, refs[1]), (2, came[0])):
        expect_equal(reader, ref, make_sample(index, HALF))


@pytest.mark.parametrize("order", ["release first", "acknowledge first", "dropped lease"])
def test_views_keep_their_bytes(opened: Opened, order: str) -> None:
    """Whatever is put afterwards. Where memory is the reader's own, room is free again at once."""
    writer = opened.writer(SMALL)
    reader = opened.reader(writer)
    sample = make_sample(1, HALF)
    ref = put(writer, sample)
    lease = reader.open(ref, layout_hash=LAYOUT_HASH, verify=True)
    view = lease.sample.features["float32"][2:3, ::2]
    if order == "release first":
        lease.release()
        reader.ack(ref)
    elif order == "acknowledge first":
        reader.ack(ref)
        lease.release()
    else:
        del lease
        reader.ack(ref)
    for index in range(2, 6):
        reader.ack(put(writer, make_sample(index, HALF)))
    wanted = sample.features["float32"][2:3, ::2]
    assert torch.equal(view.view(torch.int32), wanted.view(torch.int32))


def test_released_lease_has_no_sample(opened: Opened) -> None:
    writer = opened.writer(SMALL)
    lease = opened.reader(writer).open(
        put(writer, make_sample(1)), layout_hash=LAYOUT_HASH, verify=True
    )
    lease.release()
    lease.release()
    with pytest.raises(StoreError, match="lease of sample 'sample-1': wanted before its release"):
        lease.sample  # noqa: B018


def test_two_readers_and_many_samples(opened: Opened) -> None:
    """Sizes from nothing to a third of the store, acknowledged out of order by either reader."""
    writer = opened.writer(SMALL)
    readers = [opened.reader(writer), opened.reader(writer)]
    rng = random.Random(5)
    pending: deque[tuple[SampleRef, Sample]] = deque()
    for index in range(120):
        sample = make_sample(index, rng.choice([0, 1, 20, 150, HALF]))
        while True:
            try:
                pending.append((put(writer, sample, timeout_s=0), sample))
                break
            except TransferTimeout:
                pending.rotate(rng.randrange(len(pending)))
                finish(readers, *pending.popleft())
    for ref, sample in pending:
        finish(readers, ref, sample)
    assert (writer.health().num_samples, writer.health().used_bytes) == (0, 0)


def finish(readers: list[Any], ref: SampleRef, sample: Sample) -> None:
    for reader in readers:
        expect_equal(reader, ref, sample)
    readers[ref.generation % 2].ack(ref)


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ({"input_ids": torch.zeros(7, 1)}, r"wanted no name of the prompt's, got \['input_ids'\]"),
        ({"h": torch.zeros(7, 1, dtype=torch.float64)}, r"\['h'\]: wanted one of .* torch.float64"),
        ({"h": torch.zeros(6, 1)}, r"shape\[0\]: wanted num_tokens, 7, got 6"),
    ],
)
def test_features_that_cannot_travel(
    opened: Opened, features: dict[str, torch.Tensor], message: str
) -> None:
    writer = opened.writer(SMALL)
    with pytest.raises(ValueError, match=message):
        put(writer, Sample(make_prompt(1, 7), features))
    assert writer.health().num_samples == 0


def test_closed_writer(opened: Opened) -> None:
    store = STORES.get(opened.kind)
    writer = store.writer(store.Config(capacity_bytes=SMALL, **opened.settings))
    writer.close()
    writer.close()
    with pytest.raises(StoreError, match=f"{opened.kind} writer: wanted an open .* was closed"):
        put(writer, make_sample(1))


def test_no_address(opened: Opened) -> None:
    with pytest.raises(ValueError, match=r"address must be \w+:.*, got 'nonsense'"):
        STORES.get(opened.kind).reader("nonsense")


def consume(pipe: Connection, kind: str, address: str) -> None:
    """Check every ref that comes against its sample made anew; acknowledge all but the last."""
    reader = STORES.get(kind).reader(address)
    while text := receive(pipe):
        ref = ref_from_json(text)
        index = int(ref.sample_id.removeprefix("sample-"))
        expect_equal(reader, ref, make_sample(index, ref.num_tokens))
        reader.ack(ref)
        pipe.send(index)
    held = reader.open(ref_from_json(receive(pipe)), layout_hash=LAYOUT_HASH, verify=True)
    pipe.send(held.sample.prompt.sample_id)
    time.sleep(600)


def test_reader_in_another_process(opened: Opened) -> None:
    """A stream through a small store; then the reader dies with a lease, which holds up nothing."""
    writer = opened.writer(SMALL)
    with started(consume, opened.kind, writer.address()) as (process, pipe):
        for index in range(40):
            sample = make_sample(index, 1 + 7 * index)
            pipe.send(ref_to_json(put(writer, sample, timeout_s=3 * TIMEOUT_S)))
        pipe.send("")
        assert [receive(pipe) for _ in range(40)] == list(range(40))
        held = put(writer, make_sample(99, HALF))
        pipe.send(ref_to_json(held))
        assert receive(pipe) == "sample-99"
        kill(process)
    writer.reap()
    reader = opened.reader(writer)
    expect_equal(reader, held, make_sample(99, HALF))
    reader.ack(held)
    assert (writer.health().num_samples, writer.health().used_bytes) == (0, 0)


def produce(pipe: Connection, kind: str, settings: dict[str, Any]) -> None:
    store = STORES.get(kind)
    writer = store.writer(store.Config(capacity_bytes=SMALL, **settings))
    pipe.send(writer.address())
    for index in range(2):
        pipe.send(ref_to_json(put(writer, make_sample(index, 50))))
    time.sleep(600)


def test_killed_producer(opened: Opened) -> None:
    """What it put stays readable, or reading says that it is gone; an open lease is unharmed."""
    with started(produce, opened.kind, opened.settings) as (process, pipe):
        address = receive(pipe)
        refs = [ref_from_json(receive(pipe)) for _ in range(2)]
        reader = opened.attach(address)
        held = reader.open(refs[0], layout_hash=LAYOUT_HASH, verify=True)
        assert reader.producer_alive
        kill(process)
    assert same_sample(held.sample, make_sample(0, 50))
    assert not reader.producer_alive
    if reader.capabilities().outlives_producer:
        for index, ref in enumerate(refs):
            expect_equal(reader, ref, make_sample(index, 50))
            reader.ack(ref)
            with pytest.raises(StaleRef):
                reader.open(ref, layout_hash=LAYOUT_HASH, verify=True)
    else:
        began = time.monotonic()
        with pytest.raises(ProducerLost, match=r"sample 'sample-1'"):
            reader.open(refs[1], layout_hash=LAYOUT_HASH, verify=True)
        assert time.monotonic() - began < 20.0 * SLOWDOWN
    with pytest.raises(ProducerLost, match="has ended"):
        STORES.get(opened.kind).reader(address)


@pytest.mark.parametrize(
    "error",
    [
        StoreFull(12, 10),
        TransferTimeout("room", 1.5),
        *(kind("text") for kind in (StaleRef, CorruptFeature, ProducerLost, LayoutMismatch)),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_travel(error: StoreError) -> None:
    """Between processes, as pickles."""
    back = pickle.loads(pickle.dumps(error))
    assert type(back) is type(error)
    assert str(back) == str(error)
    assert vars(back) == vars(error)


def test_what_errors_say() -> None:
    assert re.fullmatch(
        "sample of 12 bytes does not fit a store of 10 bytes", str(StoreFull(12, 10))
    )
    assert str(TransferTimeout("room", 1.5)) == "waited 1.5 s for room"
