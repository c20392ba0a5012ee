"""The shm store within one process: bytes, lifetimes, errors."""

from __future__ import annotations

import gc
import os
import random
import threading
from collections import deque
from dataclasses import replace

import pytest
import torch

from specforge_ext.config import parse
from specforge_ext.records import DTYPES, FeatureLayout, FeatureSpec, Sample
from specforge_ext.store import STORES
from specforge_ext.store.base import (
    CorruptFeature,
    LayoutMismatch,
    StaleRef,
    StoreError,
    StoreFull,
    TransferTimeout,
)
from specforge_ext.store.shm import ShmConfig, ShmReader, ShmStore, ShmWriter
from store_cases import LAYOUT_HASH, TIMEOUT_S, make_prompt, make_sample, same_sample


def open_store(capacity_bytes: int = 1 << 20, max_slots: int = 8) -> tuple[ShmWriter, ShmReader]:
    writer = ShmStore.writer(ShmConfig(capacity_bytes=capacity_bytes, max_slots=max_slots))
    return writer, ShmStore.reader(writer.address())


def test_registered() -> None:
    assert STORES.get("shm") is ShmStore
    assert ShmStore.Config is ShmConfig


def test_config() -> None:
    with pytest.raises(ValueError, match=r"store.capacity_bytes: .*greater than 0, got 0"):
        parse(ShmConfig, {"capacity_bytes": 0}, where="store")
    assert ShmConfig().capacity_bytes == 256 << 20


# 0 and 1 tokens; widths of no, one, an odd number of values; beyond a page.
@pytest.mark.parametrize(("num_tokens", "width"), [(0, 5), (1, 1), (7, 0), (7, 33), (131, 129)])
def test_round_trip(num_tokens: int, width: int) -> None:
    writer, reader = open_store()
    sample = make_sample(3, num_tokens, width)
    ref = writer.put(sample, layout_hash=LAYOUT_HASH, timeout_s=TIMEOUT_S)
    assert {t.dtype for t in ref.tensors} == set(DTYPES)
    assert all(t.offset % 64 == 0 for t in ref.tensors)
    with reader.open(ref, layout_hash=LAYOUT_HASH, verify=True) as lease:
        assert same_sample(lease.sample, sample)
        assert all(f.data_ptr() % 64 == 0 for f in lease.sample.features.values())
        assert writer.health().slots_leased == 1
    reader.ack(ref)
    assert writer.health().used_bytes == 0


def test_tensors_that_are_not_contiguous_and_want_gradients() -> None:
    writer, reader = open_store()
    prompt = make_prompt(0, 6)
    feature = torch.randn(4, 6, requires_grad=True).t()
    ref = writer.put(Sample(prompt, {"h": feature}), layout_hash=LAYOUT_HASH, timeout_s=TIMEOUT_S)
    with reader.open(ref, layout_hash=LAYOUT_HASH, verify=True) as lease:
        assert torch.equal(lease.sample.features["h"], feature)


def test_views_are_not_copies() -> None:
    writer, reader = open_store()
    ref = writer.put(make_sample(1), layout_hash=LAYOUT_HASH, timeout_s=TIMEOUT_S)
    with (
        reader.open(ref, layout_hash=LAYOUT_HASH, verify=True) as first,
        reader.open(ref, layout_hash=LAYOUT_HASH, verify=True) as second,
    ):
        for name, feature in first.sample.features.items():
            assert feature.data_ptr() == second.sample.features[name].data_ptr()


def test_many_samples_through_a_small_arena() -> None:
    """Sizes from one page to half the arena, acknowledged out of order: it never clogs."""
    writer, reader = open_store(capacity_bytes=1 << 18, max_slots=6)
    rng = random.Random(5)
    pending: deque[tuple[int, int]] = deque()
    refs = {}
    for index in range(300):
        tokens = rng.choice([1, 20, 200, 900])
        refs[index] = None
        while refs[index] is None:
            try:
                sample = make_sample(index, tokens, 5)
                refs[index] = writer.put(sample, layout_hash=LAYOUT_HASH, timeout_s=0)
            except TransferTimeout:
                pending.rotate(rng.randrange(len(pending)))
                old, old_tokens = pending.popleft()
                with reader.open(refs[old], layout_hash=LAYOUT_HASH, verify=True) as lease:
                    assert same_sample(lease.sample, make_sample(old, old_tokens, 5))
                reader.ack(refs[old])
        pending.append((index, tokens))
    for old, _ in pending:
        reader.ack(refs[old])
    health = writer.health()
    assert (health.used_bytes, health.largest_free_bytes) == (0, health.capacity_bytes)
    assert max(ref.generation for ref in refs.values()) > 20


@pytest.mark.parametrize("order", ["release first", "acknowledge first", "dropped lease"])
def test_live_view_prevents_recycling(order: str) -> None:
    writer, reader = open_store(capacity_bytes=1 << 14, max_slots=1)
    sample = make_sample(1)
    ref = writer.put(sample, layout_hash=LAYOUT_HASH, timeout_s=TIMEOUT_S)
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
    gc.collect()
    assert writer.health().slots_draining == 1
    with pytest.raises(TransferTimeout, match=r"slots: 0 free, .* 0 leased, 1 draining"):
        writer.put(make_sample(2), layout_hash=LAYOUT_HASH, timeout_s=0.01)
    wanted = sample.features["float32"][2:3, ::2]
    assert torch.equal(view.view(torch.int32), wanted.view(torch.int32))
    del view
    writer.put(make_sample(2), layout_hash=LAYOUT_HASH, timeout_s=0)


def test_lease_of_a_sample_without_bytes_is_held() -> None:
    writer, reader = open_store()
    ref = writer.put(make_sample(1, 0), layout_hash=LAYOUT_HASH, timeout_s=TIMEOUT_S)
    lease = reader.open(ref, layout_hash=LAYOUT_HASH, verify=True)
    assert writer.health().slots_leased == 1
    lease.release()
    lease.release()
    assert writer.health().slots_ready == 1
    with pytest.raises(StoreError, match="lease of sample 'sample-1': wanted before its release"):
        lease.sample  # noqa: B018


def test_reader_that_closes_keeps_its_views() -> None:
    writer, reader = open_store()
    sample = make_sample(1)
    ref = writer.put(sample, layout_hash=LAYOUT_HASH, timeout_s=TIMEOUT_S)
    lease = reader.open(ref, layout_hash=LAYOUT_HASH, verify=True)
    reader.close()
    writer_health = writer.health()
    assert (writer_health.num_readers, writer_health.slots_leased) == (1, 1)
    writer.close()
    assert same_sample(lease.sample, sample)
    for call in (lambda: reader.ack(ref), lambda: reader.producer_alive):
        with pytest.raises(StoreError, match="shm reader: wanted an open arena, but it was closed"):
            call()
    with pytest.raises(StoreError, match="shm writer: wanted an open arena, but it was closed"):
        writer.health()


def test_stale() -> None:
    writer, reader = open_store(max_slots=1)
    ref = writer.put(make_sample(1), layout_hash=LAYOUT_HASH, timeout_s=TIMEOUT_S)
    reader.ack(ref)
    again = writer.put(make_sample(2), layout_hash=LAYOUT_HASH, timeout_s=TIMEOUT_S)
    assert (again.slot, again.generation) == (ref.slot, ref.generation + 1)
    with pytest.raises(StaleRef, match="slot 0 holds generation 2, wanted generation 1"):
        reader.open(ref, layout_hash=LAYOUT_HASH, verify=True)
    writer.abort(again)
    with pytest.raises(StaleRef, match="acknowledged already"):
        reader.ack(again)
    other = ShmStore.writer(ShmConfig(capacity_bytes=4096, max_slots=1))
    other_reader = ShmStore.reader(other.address())
    for call in (
        lambda: other_reader.open(ref, layout_hash=LAYOUT_HASH, verify=True),
        lambda: other_reader.ack(ref),
        lambda: other.abort(ref),
    ):
        with pytest.raises(StaleRef, match=r"wanted store 'shm:\w{16}', got 'shm:\w{16}'"):
            call()


def test_another_layout() -> None:
    writer, reader = open_store()
    ref = writer.put(make_sample(1), layout_hash=LAYOUT_HASH, timeout_s=TIMEOUT_S)
    with pytest.raises(LayoutMismatch, match=r"wanted layout 'f{16}', got '0123456789abcdef'"):
        reader.open(ref, layout_hash="f" * 16, verify=True)


def test_corrupt() -> None:
    """One bit anywhere in a tensor is seen; the lease does not outlive the error's handling."""
    writer, reader = open_store()
    sample = make_sample(1)
    ref = writer.put(sample, layout_hash=LAYOUT_HASH, timeout_s=TIMEOUT_S)
    fd = int(writer.address().split(":")[3])
    payload = 4096 + 4096  # one page of slots
    for tensor in ref.tensors:
        if tensor.nbytes == 0:
            continue
        at = payload + tensor.offset + tensor.nbytes - 1
        byte = os.pread(fd, 1, at)[0]
        os.pwrite(fd, bytes([byte ^ 64]), at)
        with pytest.raises(CorruptFeature, match=f"{tensor.name}: wanted crc32c .*, got") as caught:
            reader.open(ref, layout_hash=LAYOUT_HASH, verify=True)
        assert writer.health().slots_ready == 1, caught
        reader.open(ref, layout_hash=LAYOUT_HASH, verify=False).release()
        os.pwrite(fd, bytes([byte]), at)
    short = replace(ref, nbytes=ref.nbytes + 64)
    with pytest.raises(CorruptFeature, match=r"wanted \d+ bytes, the store holds \d+"):
        reader.open(short, layout_hash=LAYOUT_HASH, verify=False)


def test_without_checksums() -> None:
    writer = ShmStore.writer(ShmConfig(capacity_bytes=1 << 16, max_slots=2, checksum=False))
    reader = ShmStore.reader(writer.address())
    sample = make_sample(1)
    ref = writer.put(sample, layout_hash=LAYOUT_HASH, timeout_s=TIMEOUT_S)
    assert all(tensor.checksum is None for tensor in ref.tensors)
    with reader.open(ref, layout_hash=LAYOUT_HASH, verify=False) as lease:
        assert same_sample(lease.sample, sample)
    with pytest.raises(CorruptFeature, match="input_ids: wanted a checksum to verify"):
        reader.open(ref, layout_hash=LAYOUT_HASH, verify=True)


def test_full_and_timeout() -> None:
    writer, _ = open_store(capacity_bytes=1 << 14, max_slots=2)
    with pytest.raises(StoreFull, match=r"sample of \d+ bytes does not fit a store of 16384"):
        writer.put(make_sample(1, 1000), layout_hash=LAYOUT_HASH, timeout_s=TIMEOUT_S)
    for index in range(2):
        writer.put(make_sample(index), layout_hash=LAYOUT_HASH, timeout_s=TIMEOUT_S)
    with pytest.raises(TransferTimeout, match=r"waited 0\.\d s for room for \d+ bytes .* 2 ready"):
        writer.put(make_sample(2), layout_hash=LAYOUT_HASH, timeout_s=0.05)
    health = writer.health()
    assert (health.capacity_bytes, health.slots_ready, health.slots_free) == (1 << 14, 2, 0)


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ({"input_ids": torch.zeros(7, 1)}, r"wanted no name of the prompt's, got \['input_ids'\]"),
        ({"h": torch.zeros(7, 1, dtype=torch.float64)}, r"\['h'\]: wanted one of .* torch.float64"),
        ({"h": torch.zeros(7, 1, device="meta")}, r"on the CPU, got torch.float32 on meta"),
        ({"h": torch.zeros(6, 1)}, r"shape\[0\]: wanted num_tokens, 7, got 6"),
        ({"h": torch.zeros(7)}, r"shape: wanted 2 dimensions, got \(7,\)"),
        ({"a b": torch.zeros(7, 1)}, r"name: wanted letters, digits"),
    ],
)
def test_features_that_cannot_travel(features: dict[str, torch.Tensor], message: str) -> None:
    writer, _ = open_store()
    with pytest.raises(ValueError, match=message):
        writer.put(
            Sample(make_prompt(1, 7), features), layout_hash=LAYOUT_HASH, timeout_s=TIMEOUT_S
        )
    assert writer.health().slots_free == 8


def test_features_written_in_place() -> None:
    writer, reader = open_store()
    layout = FeatureLayout(
        (FeatureSpec("aux", (1, 2), 8, "bfloat16"), FeatureSpec("last", (4,), 4, "float32"))
    )
    prompt = make_prompt(1, 5)
    wanted = {"aux": torch.randn(5, 8).bfloat16(), "last": torch.randn(5, 4)}
    reservation = writer.reserve(prompt, layout, timeout_s=TIMEOUT_S)
    for name, feature in reservation.features.items():
        feature.copy_(wanted[name])
    ref = reservation.publish()
    with reader.open(ref, layout_hash=layout.hash, verify=True) as lease:
        assert same_sample(lease.sample, Sample(prompt, wanted))
    with pytest.raises(ValueError, match="it was published or aborted"):
        reservation.abort()
    writer.reserve(prompt, layout, timeout_s=TIMEOUT_S).abort()
    assert writer.health().slots_ready == 1


def test_threads_of_one_process() -> None:
    """Two putting, two reading, room for few: everything arrives once and whole."""
    writer, reader = open_store(capacity_bytes=1 << 16, max_slots=3)
    refs: deque[tuple[int, object]] = deque()
    ready = threading.Semaphore(0)
    seen: list[int] = []
    errors: list[BaseException] = []

    def put(first: int) -> None:
        for index in range(first, first + 40):
            ref = writer.put(make_sample(index), layout_hash=LAYOUT_HASH, timeout_s=TIMEOUT_S)
            refs.append((index, ref))
            ready.release()

    def read() -> None:
        for _ in range(40):
            assert ready.acquire(timeout=TIMEOUT_S)
            index, ref = refs.popleft()
            with reader.open(ref, layout_hash=LAYOUT_HASH, verify=True) as lease:
                assert same_sample(lease.sample, make_sample(index))
            reader.ack(ref)
            seen.append(index)

    def guarded(work: object, *arguments: int) -> None:
        try:
            work(*arguments)
        except (AssertionError, StoreError, ValueError) as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(put, first)) for first in (0, 40)]
    threads += [threading.Thread(target=guarded, args=(read,)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not errors
    assert sorted(seen) == list(range(80))
    assert writer.health().used_bytes == 0
