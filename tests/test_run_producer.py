"""The producer: against several clients in a thread, and as the process that it is."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import toy_engine
from run_job import TINY
from specforge_ext.config import override
from specforge_ext.loader import Stream, StreamConfig, global_steps
from specforge_ext.methods import METHODS
from specforge_ext.records import FeatureLayout, Prompt, Sample
from specforge_ext.runs.data import Dataset, read_dataset
from specforge_ext.runs.link import ProducerLink, ProducerProcess
from specforge_ext.runs.producer import Producer, all_finite, remove_socket, unfit
from specforge_ext.runs.recipe import Recipe, build, load
from specforge_ext.runs.wire import listen
from specforge_ext.store import STORES
from specforge_ext.store.base import ProducerLost, TransferTimeout

LENGTHS = [12, 20, 9, 30, 16, 25, 11, 14]


def sample(**features: torch.Tensor) -> Sample:
    ids = torch.arange(3, dtype=torch.int32)
    return Sample(Prompt("p", ids, torch.ones(3, dtype=torch.uint8)), features)


def test_unfit_says_why() -> None:
    good = torch.ones(3, 2)
    assert unfit(sample(x=good, y=good.bfloat16())) is None
    assert unfit(sample(x=good, y=good[:2])) == "y has 2 rows for 3 tokens"
    for bad in (float("nan"), float("inf"), float("-inf")):
        broken = good.clone()
        broken[2, 1] = bad
        assert unfit(sample(x=good, y=broken)) == "y holds values that are not finite"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_value_that_is_not_finite_is_found(dtype: torch.dtype) -> None:
    """Wherever it stands; large values, whose sum overflows, are finite still."""
    good = torch.randn(61, 67).to(dtype)
    large = torch.full((61, 67), torch.finfo(dtype).max, dtype=dtype)
    assert all_finite(good) and all_finite(large) and all_finite(-large)
    assert all_finite(torch.empty(0, 4, dtype=dtype))
    generator = torch.Generator().manual_seed(0)
    for bad in (float("nan"), float("inf"), float("-inf")):
        for at in torch.randint(good.numel(), (20,), generator=generator).tolist():
            for source in (good, large):
                broken = source.clone()
                broken.view(-1)[at] = bad
                assert not all_finite(broken)
    opposite = good.clone()
    opposite[3, 4], opposite[50, 60] = float("inf"), float("-inf")
    assert not all_finite(opposite)


class Serving:
    """A Producer in a thread, with as many links as are asked for."""

    def __init__(self, recipe: Recipe, socket_path: str, layout: FeatureLayout) -> None:
        self.recipe = recipe
        self.socket_path = socket_path
        self.layout = layout
        self.links: list[ProducerLink] = []

    def link(self) -> ProducerLink:
        link = ProducerLink(self.socket_path, timeout_s=5.0)
        self.links.append(link)
        link.hello(layout_hash=self.layout.hash, timeout_s=5.0)
        return link

    def prepared(self, link: ProducerLink) -> Dataset:
        return read_dataset(link.prepare(timeout_s=30.0, progress=lambda *_: None))

    def stream(self, link: ProducerLink, data: Dataset, *, rank: int, **config: Any) -> Stream:
        address = link.hello(layout_hash=self.layout.hash, timeout_s=5.0).address
        return Stream(
            steps=global_steps(data.train.lengths, self.recipe.order, seed=0),
            prompts=data.train,
            layout=self.layout,
            link=link,
            reader=STORES.get("shm").reader(address),
            order=self.recipe.order,
            config=StreamConfig(timeout_s=20.0, **config),
            rank=rank,
            world_size=2,
        )


@contextmanager
def serving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **engine: Any) -> Iterator[Serving]:
    toy_engine.register(monkeypatch)
    texts = toy_engine.write_ids(tmp_path / "texts.jsonl", LENGTHS)
    recipe = build(toy_engine.recipe_of(tmp_path / "out", texts, **engine))
    layout = METHODS.get("eagle3")(recipe.method[1]).layout(toy_engine.SPEC)
    path = str(tmp_path / "s")
    reads, writes = os.pipe()
    with listen(path) as listener:
        producer = Producer(recipe, listener, reads)
        thread = threading.Thread(target=producer.serve)
        thread.start()
        serving = Serving(recipe, path, layout)
        try:
            yield serving
        finally:
            os.close(writes)  # as a parent that ended
            thread.join(timeout=10.0)
            for link in serving.links:
                link.close()
            assert not thread.is_alive(), "the producer did not end with its parent"
    os.close(reads)


def test_two_ranks_get_every_sample_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(tmp_path, monkeypatch) as producer:
        links = [producer.link(), producer.link()]
        data = [producer.prepared(link) for link in links]
        assert data[0].fingerprint == data[1].fingerprint
        streams = [producer.stream(links[r], data[r], rank=r).iterate(0) for r in (0, 1)]
        seen = []
        for steps in zip(*streams, strict=True):
            assert len({step.step for step in steps}) == 1
            for batch in (batch for step in steps for batch in step.micro_batches):
                seen += batch.sample_ids
                assert torch.equal(batch.features["last"][:, 0], batch.input_ids.float())
        assert sorted(seen) == sorted(p.sample_id for p in data[0].train)


def test_sample_that_cannot_be_produced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of text 5 the target computes nothing finite: it is skipped by name, and only it."""
    with serving(tmp_path, monkeypatch, broken=[5]) as producer:
        links = [producer.link(), producer.link()]
        data = [producer.prepared(link) for link in links]
        [lost] = [p.sample_id for p in data[0].train if p.input_ids[0] == 5]
        streams = [
            producer.stream(links[r], data[r], rank=r, max_skipped=1).iterate(0) for r in (0, 1)
        ]
        steps = [step for stream in streams for step in stream]
        skipped = [(s.sample_id, s.reason) for step in steps for s in step.skipped]
        assert skipped == [(lost, "aux holds values that are not finite")]
        assert sum(step.samples for step in steps) == len(LENGTHS) - 1


def test_prompt_that_the_target_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(tmp_path, monkeypatch, refused=[3]) as producer:
        link = producer.link()
        data = producer.prepared(link)
        [bad] = [p.sample_id for p in data.train if p.input_ids[0] == 3]
        link.request(0, [bad])
        with pytest.raises(RuntimeError, match=rf"refused: step 0: prompt {bad}: wanted another"):
            link.receive(timeout_s=10.0)
        link.request(1, ["nobody"])
        with pytest.raises(RuntimeError, match="step 1: no prompt with sample_id 'nobody'"):
            link.receive(timeout_s=10.0)


def test_data_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(tmp_path, monkeypatch) as producer:
        (tmp_path / "texts.jsonl").write_text("{}\n")
        link = producer.link()
        with pytest.raises(RuntimeError, match=r"refused: .*texts\.jsonl:1: wanted one of"):
            producer.prepared(link)


def test_a_client_that_leaves_does_not_disturb_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At once, with an answer on its way, and with requests that wait."""
    with serving(tmp_path, monkeypatch) as producer:
        ProducerLink(producer.socket_path, timeout_s=5.0).close()
        gone, stays = producer.link(), producer.link()
        data = producer.prepared(stays)
        steps = global_steps(data.train.lengths, producer.recipe.order, seed=0)
        for step in steps:
            gone.request(step.step, [data.train[i].sample_id for i in step.samples])
        gone.close()
        stays.request(0, [data.train[0].sample_id])
        assert stays.receive(timeout_s=10.0).refs[0].sample_id == data.train[0].sample_id


@pytest.fixture
def process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ProducerProcess]:
    """A producer of the demo with far more to write than a test waits for."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    more = ("data.train.num_prompts=4096", "data.generate.chunk=4096", f"output_dir={tmp_path}/out")
    recipe = load(None, [*TINY, *more])
    process = ProducerProcess(recipe.source, num_threads=1, log_path=tmp_path / "producer.log")
    yield process
    process.close()


def ends_within(pid: int, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
            return True
        time.sleep(0.05)
    return False


def test_process_ends_with_its_parent_in_the_middle_of_work(process: ProducerProcess) -> None:
    """Nothing else ends it: a signal to all processes of a job leaves it at work, so that the
    trainer has data until it has saved."""
    link = process.connect(timeout_s=60.0)
    with pytest.raises(ValueError, match="this rank trains on x"):
        link.hello(layout_hash="x", timeout_s=60.0)
    for number in (signal.SIGTERM, signal.SIGINT):
        os.kill(process.pid, number)
    link._connection.send({"op": "prepare"})
    with pytest.raises(TransferTimeout, match="the data set to be prepared"):
        link.prepare(timeout_s=1.5, progress=lambda *_: None)
    log = process.log_path.read_text()
    assert "signal 15: this process ends when the trainer does" in log
    assert "signal 2: this process" in log
    directory = Path(process.socket_path).parent
    assert directory.is_dir()
    stdin = process._process.stdin
    assert stdin is not None
    stdin.close()  # what the kernel does when the parent is killed
    assert ends_within(process.pid, 15.0)
    assert not directory.exists()
    with pytest.raises(ProducerLost, match="the producer"):
        link.prepare(timeout_s=5.0, progress=lambda *_: None)
    assert "ended with code 1; " in process.obituary()
    assert process.obituary().rstrip().endswith("ended in the middle of work")


def test_process_that_cannot_start(tmp_path: Path) -> None:
    recipe = override(load(None, list(TINY)).source, ["name=", f"output_dir={tmp_path}"])
    process = ProducerProcess(recipe, num_threads=1, log_path=tmp_path / "producer.log")
    try:
        with pytest.raises(ProducerLost, match="the producer ended before it listened"):
            process.connect(timeout_s=60.0)
        assert "ended with code 1" in process.obituary()
        assert "name: wanted the name of the recipe, got None" in process.obituary()
    finally:
        process.close()
    assert not Path(process.socket_path).parent.exists()


def test_a_socket_that_is_gone_already(tmp_path: Path) -> None:
    remove_socket(tmp_path / "directory" / "s")
    shared = tmp_path / "shared"
    shared.mkdir()
    (shared / "theirs").write_text(json.dumps({}))
    remove_socket(shared / "s")
    assert (shared / "theirs").exists()
