"""From the engine to the batch: how often features are copied, and what faults leave behind."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import toy_engine
from specforge_ext.loader import StepData, Stream, StreamConfig, global_steps
from specforge_ext.methods import METHODS
from specforge_ext.runs.data import read_dataset
from specforge_ext.runs.link import ProducerLink
from specforge_ext.runs.producer import Producer
from specforge_ext.runs.recipe import build
from specforge_ext.runs.wire import listen
from specforge_ext.store import STORES

LENGTHS = [12, 20, 9, 30, 16, 25, 11, 14]


@contextmanager
def producing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, store: dict[str, Any], **engine: Any
) -> Iterator[tuple[Producer, ProducerLink, Stream]]:
    """A producer in a thread, and a rank's stream of it."""
    toy_engine.register(monkeypatch)
    texts = toy_engine.write_ids(tmp_path / "texts.jsonl", LENGTHS)
    plain = toy_engine.recipe_of(tmp_path / "out", texts, **engine)
    recipe = build({**plain, "store": {"capacity_bytes": 1 << 20, **store}})
    layout = METHODS.get("eagle3")(recipe.method[1]).layout(toy_engine.SPEC)
    path = str(tmp_path / "s")
    reads, writes = os.pipe()
    with listen(path) as listener:
        producer = Producer(recipe, listener, reads)
        thread = threading.Thread(target=producer.serve)
        thread.start()
        link = ProducerLink(path, timeout_s=5.0)
        try:
            address = link.hello(layout_hash=layout.hash, timeout_s=5.0).address
            files = link.prepare(timeout_s=30.0, progress=lambda *_: None)
            prompts = list(read_dataset(files).train)
            stream = Stream(
                steps=global_steps([len(p) for p in prompts], recipe.order, seed=0),
                prompts=prompts,
                layout=layout,
                link=link,
                reader=STORES.get(recipe.store[0]).reader(address),
                order=recipe.order,
                config=StreamConfig(timeout_s=20.0, max_skipped=1),
                rank=0,
                world_size=1,
            )
            yield producer, link, stream
        finally:
            os.close(writes)
            thread.join(timeout=10.0)
            link.close()
            assert not thread.is_alive()
    os.close(reads)


def copied_per_byte(data: StepData) -> dict[str, float]:
    return {stage: n / data.delivered_bytes for stage, n in data.copied.items()}


def feature_bytes(data: StepData) -> int:
    return sum(f.nbytes for batch in data.micro_batches for f in batch.features.values())


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [
        ("shm", {"engine": 1.0, "collate": 1.0}),
        ("shared_dir", {"engine": 1.0, "put": 1.0, "collate": 1.0}),
        ("mooncake_p2p", {"engine": 1.0, "transfer": 1.0, "collate": 1.0}),
        ("mooncake_store", {"engine": 1.0, "put": 1.0, "transfer": 1.0, "collate": 1.0}),
    ],
)
def test_what_each_store_copies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, wanted: dict[str, float]
) -> None:
    if (reason := STORES.get(kind).unavailable()) is not None:
        pytest.skip(reason)
    store = {"kind": kind}
    if kind == "shared_dir":
        store["directory"] = str(tmp_path / "store")
    with producing(tmp_path, monkeypatch, store) as (_, _, stream):
        steps = list(stream.iterate(0))
    assert len(steps) > 1
    for data in steps:
        assert data.delivered_bytes == feature_bytes(data) > 0
        assert copied_per_byte(data) == wanted


@pytest.mark.parametrize("kind", ["shm", "shared_dir"])
def test_an_encoding_is_put(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """A code a value and a scale a layer are written; what is delivered is decoded."""
    store = {"kind": kind, "encoding": "fp8_e4m3_row"}
    if kind == "shared_dir":
        store["directory"] = str(tmp_path / "store")
    with producing(tmp_path, monkeypatch, store) as (producer, _, stream):
        layout = producer._layout
        steps = list(stream.iterate(0))
    codes = sum(spec.width + 4 * len(spec.layer_ids) for spec in layout.features)
    put = codes / layout.bytes_per_token
    wanted = {"engine": 1.0, "put": put, "collate": 1.0}
    if kind == "shared_dir":
        wanted["encode"] = put
    for data in steps:
        assert copied_per_byte(data) == pytest.approx(wanted, rel=1e-12)


def test_what_is_skipped_was_copied_for_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with producing(tmp_path, monkeypatch, {}, broken=[5]) as (producer, _, stream):
        steps = list(stream.iterate(0))
        health = producer._writer.health()
        assert (health.used_bytes, health.slots_free) == (0, 1024)
    [data] = [data for data in steps if data.skipped]
    share = LENGTHS[5] / data.tokens
    assert copied_per_byte(data) == {"engine": 1.0 + share, "collate": 1.0}


@pytest.mark.parametrize("kind", ["shm", "shared_dir"])
def test_an_engine_that_raises_in_the_middle_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Of four samples two are published, and one is being written; the next request is served."""
    store = {"kind": kind}
    if kind == "shared_dir":
        store["directory"] = str(tmp_path / "store")
    with producing(tmp_path, monkeypatch, store, refused=[2]) as (producer, link, stream):
        ids = {int(p.input_ids[0]): p.sample_id for p in stream._prompts}
        link.request(0, [ids[i] for i in (0, 1, 2, 3)])
        with pytest.raises(RuntimeError, match=r"refused: step 0: prompt .*: wanted another first"):
            link.receive(timeout_s=10.0)
        assert producer._writer.health().used_bytes == 0
        link._open_steps.clear()
        link.request(1, [ids[i] for i in (3, 1, 0)])
        refs = link.receive(timeout_s=10.0).refs
        assert [ref.sample_id for ref in refs] == [ids[i] for i in (3, 1, 0)]


def test_a_request_larger_than_the_arena_is_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It could wait for its deadline, 120 s, only to end the same way."""
    store = {"capacity_bytes": 5 * 4096}
    with producing(tmp_path, monkeypatch, store) as (producer, link, stream):
        link.request(0, [p.sample_id for p in stream._prompts])
        with pytest.raises(
            RuntimeError,
            match=r"step 0: request \(8 samples\) of 32768 bytes does not fit a store of 20480",
        ):
            link.receive(timeout_s=10.0)
        assert producer._writer.health().used_bytes == 0


def test_the_next_batch_can_be_seen_but_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with producing(tmp_path, monkeypatch, {}) as (_, _, stream):
        steps = stream.iterate(0)
        first = next(steps)
        deadline = time.monotonic() + 10.0
        while (upcoming := first.upcoming()) is None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert first.upcoming() is upcoming
        second = next(steps)
        assert second.micro_batches[0] is upcoming
        *_, last = steps
        assert last.upcoming() is None
