"""store.direct without a GPU: what decides, what Mooncake brings into an arena whose driver is made
of memfds, and when it may be looked at. Mooncake and its TCP are the real ones."""

from __future__ import annotations

import ctypes
import gc
import json
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import fake_cuda
from specforge_ext.config import parse
from specforge_ext.records import FeatureLayout, FeatureSpec, SampleRef
from specforge_ext.store import STORES, direct_gpu, mooncake
from specforge_ext.store.base import StoreError
from specforge_ext.store.direct_facts import Facts
from specforge_ext.store.mooncake_p2p import MooncakeP2PConfig, MooncakeP2PStore
from specforge_ext.store.reserving import reserving
from specforge_ext.store.shm import ShmConfig
from store_cases import LAYOUT_HASH, TIMEOUT_S, make_prompt, make_sample, same_sample
from test_direct import EVERYTHING, GPU

needs_fake = pytest.mark.skipif(
    fake_cuda.real_driver(), reason="a CUDA driver is here: test_gpu_transfer covers it"
)
needs_mooncake = pytest.mark.skipif(
    mooncake.unavailable() is not None, reason=str(mooncake.unavailable())
)
CAPACITY = 1 << 20
ALONE = replace(EVERYTHING, gpus=(GPU,))


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[ctypes.CDLL]:
    """At the end nothing of it may be left over."""
    gc.collect()
    driver = fake_cuda.install(monkeypatch.setattr)
    before = driver.fake_cuda_live()
    yield driver
    gc.collect()
    assert driver.fake_cuda_live() == before


@pytest.fixture
def facts(monkeypatch: pytest.MonkeyPatch) -> Callable[[Facts], None]:
    def are(facts: Facts) -> None:
        monkeypatch.setattr(direct_gpu, "probe_gpu", lambda ordinal: facts)
        monkeypatch.setattr(direct_gpu.device_memory, "use_device", lambda ordinal: ordinal)
        monkeypatch.setattr(direct_gpu, "cuda", fake_cuda.TorchCuda())

    monkeypatch.delenv(mooncake.PEER_MEMORY, raising=False)
    return are


def opened(**settings: Any) -> tuple[Any, Any]:
    writer = MooncakeP2PStore.writer(
        MooncakeP2PConfig(capacity_bytes=CAPACITY, **{"direct": "on", **settings})
    )
    return writer, MooncakeP2PStore.reader(writer.address())


def put(writer: Any, index: int = 1, num_tokens: int = 50) -> SampleRef:
    sample = make_sample(index, num_tokens)
    ref: SampleRef = writer.put(sample, layout_hash=LAYOUT_HASH, timeout_s=TIMEOUT_S)
    return ref


def open_(reader: Any, ref: SampleRef) -> Any:
    return reader.open(ref, layout_hash=LAYOUT_HASH, verify=True)


def test_off_asks_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct_gpu, "probe_gpu", None)
    assert direct_gpu.gpu_for("off", "tcp", None, what="it") is None


def test_on_says_everything_that_is_missing(facts: Callable[[Facts], None]) -> None:
    facts(replace(ALONE, hcas=(), mooncake_cuda=False))
    with pytest.raises(
        StoreError,
        match=r"^it: store.direct: wanted on, but no gpu_rdma: no RDMA device in /sys/class/infini"
        r"band; this build of Mooncake has no CUDA and cannot register GPU memory$",
    ):
        direct_gpu.gpu_for("on", "rdma", None, what="it")
    with pytest.raises(StoreError, match=r"it: .* but no gpu_tcp: this build of Mooncake has no"):
        direct_gpu.gpu_for("on", "tcp", None, what="it")


def test_auto_says_why_it_stays_on_the_host(
    facts: Callable[[Facts], None], caplog: pytest.LogCaptureFixture
) -> None:
    facts(replace(ALONE, mooncake_cuda=False))
    with caplog.at_level(logging.INFO):
        assert direct_gpu.gpu_for("auto", "rdma", None, what="it") is None
    assert caplog.messages == [
        "it: samples lie on the host, no gpu_rdma: this build of Mooncake has no CUDA and cannot "
        "register GPU memory"
    ]


def test_auto_is_for_processes_that_use_cuda(
    facts: Callable[[Facts], None],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    facts(ALONE)
    monkeypatch.setattr(direct_gpu.cuda, "is_initialized", lambda: False)
    with caplog.at_level(logging.INFO):
        assert direct_gpu.gpu_for("auto", "tcp", None, what="it") is None
    assert caplog.messages == ["it: samples lie on the host, for this process does not use CUDA"]
    assert direct_gpu.gpu_for("on", "tcp", None, what="it") == GPU


@pytest.mark.parametrize("mode", ["auto", "on"])
@pytest.mark.parametrize("protocol", ["tcp", "rdma"])
def test_the_rung_is_said(
    facts: Callable[[Facts], None], caplog: pytest.LogCaptureFixture, mode: Any, protocol: Any
) -> None:
    facts(ALONE)
    with caplog.at_level(logging.INFO):
        assert direct_gpu.gpu_for(mode, protocol, None, what="it") == GPU
    assert caplog.messages == [f"it: rung gpu_{protocol}: samples lie in the memory of cuda:0, GPU"]


@pytest.mark.parametrize(
    ("machine", "how"),
    [
        (ALONE, "1"),
        (replace(ALONE, peer_memory=None), "0"),
        (replace(ALONE, gpus=(replace(GPU, rdma=False),)), "0"),
    ],
)
def test_mooncake_is_told_how_to_register(
    facts: Callable[[Facts], None], monkeypatch: pytest.MonkeyPatch, machine: Facts, how: str
) -> None:
    """Left to itself it tries nvidia_peermem, loaded or not. What users set stays set."""
    facts(machine)
    for given, wanted in ((None, how), ("given", "given")):
        with monkeypatch.context() as context:
            context.delenv(mooncake.PEER_MEMORY, raising=False)
            if given is not None:
                context.setenv(mooncake.PEER_MEMORY, given)
            direct_gpu.gpu_for("on", "rdma", None, what="it")
            assert os.environ[mooncake.PEER_MEMORY] == wanted
            del os.environ[mooncake.PEER_MEMORY]


def test_a_gpu_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct_gpu, "probe", lambda: EVERYTHING)
    assert [gpu.index for gpu in direct_gpu.probe_gpu(1).gpus] == [1]
    with pytest.raises(StoreError, match=r"but no gpu_tcp: store.gpu: wanted 7, there are 2$"):
        direct_gpu.gpu_for("on", "tcp", 7, what="it")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here: test_gpu_transfer covers it")
@needs_mooncake
@pytest.mark.parametrize("protocol", ["tcp", "rdma"])
def test_this_machine_refuses(protocol: str) -> None:
    """Before anything is opened, with the reason."""
    config = MooncakeP2PConfig(capacity_bytes=CAPACITY, protocol=protocol, direct="on")
    wanted = rf"mooncake_p2p writer: store.direct: wanted on, but no gpu_{protocol}: .*torch "
    with pytest.raises(StoreError, match=wanted):
        MooncakeP2PStore.writer(config)


@pytest.mark.parametrize("content", [b"..libcudart.so.12..", b"..libcudart.so.13..", b"..", None])
def test_whether_mooncake_has_cuda(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes | None
) -> None:
    found = None
    if content is not None:
        (tmp_path / "engine.cpython-311-x86_64-linux-gnu.so").write_bytes(content)
        found = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(mooncake.importlib.util, "find_spec", lambda name: found)
    assert mooncake.built_with_cuda() is (content is not None and b"libcudart" in content)


def test_words_that_yaml_makes_booleans_of() -> None:
    for said, wanted in ((True, "on"), (False, "off"), ("auto", "auto")):
        assert parse(MooncakeP2PConfig, {"direct": said}, where="store").direct == wanted
        assert parse(ShmConfig, {"page_lock": said}, where="store").page_lock == wanted
    with pytest.raises(ValueError, match=r"store.direct: .* 'auto', 'on' or 'off', got 'gpu'"):
        parse(MooncakeP2PConfig, {"direct": "gpu"}, where="store")


@needs_fake
def test_what_arrived_is_waited_for_or_flushed(
    driver: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch
) -> None:
    unordered = replace(GPU, rdma_ordered=False)
    for gpu, protocol, calls, flushes in (
        (GPU, "tcp", ["synchronize"], 0),
        (unordered, "tcp", ["synchronize"], 0),
        (GPU, "rdma", [], 0),
        (unordered, "rdma", ["query"], 1),
    ):
        monkeypatch.setattr(direct_gpu, "cuda", cuda := fake_cuda.TorchCuda())
        before = driver.fake_cuda_flushes()
        direct_gpu.arrived(gpu, protocol)  # type: ignore[arg-type]
        assert cuda.calls == calls
        assert driver.fake_cuda_flushes() - before == flushes


@needs_fake
def test_a_flush_that_is_refused(driver: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct_gpu, "TO_OWNER", 7)
    with pytest.raises(StoreError, match="cuFlushGPUDirectRDMAWrites answered error 1 "):
        direct_gpu.arrived(replace(GPU, rdma_ordered=False), "rdma")


@needs_fake
@needs_mooncake
def test_samples_lie_on_the_gpu_at_both_ends(driver: ctypes.CDLL) -> None:
    live = driver.fake_cuda_live()
    writer, reader = opened()
    assert driver.fake_cuda_live() > live
    assert writer.capabilities().on_gpu and reader.capabilities().on_gpu
    lease = open_(reader, put(writer))
    assert same_sample(lease.sample, make_sample(1, 50))
    base, nbytes = reader._pool.region
    for view in lease.sample.features.values():
        assert not view.numel() or base <= view.data_ptr() < base + nbytes
    ids = lease.sample.prompt.input_ids
    assert not base <= ids.data_ptr() < base + nbytes  # a copy, for the host
    reader.close()
    writer.close()
    assert same_sample(lease.sample, make_sample(1, 50))


@needs_fake
@needs_mooncake
def test_room_comes_back_when_the_last_view_goes(driver: ctypes.CDLL) -> None:
    writer, reader = opened(pool_bytes=1 << 18, read_timeout_s=0.5)
    ref = put(writer, num_tokens=200)
    view = open_(reader, ref).sample.features["float32"][3:4]
    with pytest.raises(StoreError, match=r"waited 0\.5 s for room for \d+ bytes"):
        open_(reader, ref)
    del view
    open_(reader, ref).release()
    reader.close()
    writer.close()


@needs_fake
@needs_mooncake
def test_nothing_is_leased_before_it_has_arrived(
    driver: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Transfer, arrival, then the second look at the slot, then the lease."""
    writer, reader = opened()
    ref = put(writer)
    events: list[str] = []

    def recorded(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def record(*args: Any, **named: Any) -> Any:
            result = call(*args, **named)
            events.append(name)
            return result

        return record

    with monkeypatch.context() as context:
        for where, name in (
            (reader, "_transfer"),
            (reader, "_locate"),
            (reader._pool, "lease"),
            (direct_gpu, "arrived"),
        ):
            context.setattr(where, name, recorded(name, getattr(where, name)))
        open_(reader, ref).release()
    looked = ["_transfer", "_locate"]
    assert events == [*looked, "_transfer", "arrived", *looked, "lease"]
    reader.close()
    writer.close()


def with_changed(address: str, **changes: object) -> str:
    head, epoch, text = address.split(":", 2)
    return f"{head}:{epoch}:{json.dumps({**json.loads(text), **changes})}"


@needs_fake
@needs_mooncake
@pytest.mark.parametrize("kind", ["mooncake_p2p", "mooncake_store"])
def test_other_bytes_are_not_believed(driver: ctypes.CDLL, kind: str) -> None:
    """As of a Mooncake that takes a GPU's address for the host's, and reports success."""
    store = STORES.get(kind)
    writer = store.writer(store.Config(capacity_bytes=CAPACITY, direct="on"))
    key = {"mooncake_p2p": "probe_bytes", "mooncake_store": "alive_bytes"}[kind]
    text = json.loads(writer.address().split(":", 2)[2])[key]
    other = f"{int(text, 16) ^ 1:0{len(text)}x}"
    with pytest.raises(
        StoreError,
        match=rf"^{kind}:\w+: store.direct: Mooncake reported success over tcp, but brought other",
    ):
        store.reader(with_changed(writer.address(), **{key: other}))
    store.reader(writer.address()).close()
    writer.close()


@needs_fake
@needs_mooncake
def test_a_closed_reader_has_no_pool(driver: ctypes.CDLL) -> None:
    writer, reader = opened()
    ref = put(writer)
    reader.close()
    reader.close()
    for call in (lambda: open_(reader, ref), lambda: reader.ack(ref)):
        with pytest.raises(StoreError, match="mooncake_p2p reader: wanted an open pool, but it"):
            call()
    assert reader._word_pool is None
    writer.close()


@needs_fake
@needs_mooncake
def test_memory_that_cannot_be_registered(
    driver: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(mooncake.PEER_MEMORY, "0")
    wanted = rf"register 4096 bytes of cuda:1: error -202, {mooncake.PEER_MEMORY}=0$"
    with pytest.raises(StoreError, match=wanted):
        mooncake.Pool(4096, lambda address, nbytes: -202, device=1)


@needs_fake
@needs_mooncake
def test_features_are_put_not_written_in_place(driver: ctypes.CDLL) -> None:
    writer, reader = opened()
    assert reserving(writer) is None
    layout = FeatureLayout((FeatureSpec("hidden", (0,), 8, "float32"),))
    for call in (
        lambda: writer.reserve(make_prompt(1, 3), layout, timeout_s=0.0),
        lambda: writer.expect_room([make_prompt(1, 3)], layout),
    ):
        with pytest.raises(ValueError, match=r"store.direct: wanted an arena on the host .* put"):
            call()
    reader.close()
    writer.close()


@needs_fake
@needs_mooncake
@pytest.mark.parametrize("without", ["reader", "writer"])
def test_either_side_may_be_without_a_gpu(
    driver: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch, without: str
) -> None:
    """auto: each side decides for itself, and the other's samples are read all the same."""
    nothing = replace(ALONE, gpus=(), no_gpu="no CUDA driver: gone")
    config = MooncakeP2PConfig(capacity_bytes=CAPACITY, direct="auto")
    with monkeypatch.context() as context:
        if without == "writer":
            context.setattr(direct_gpu, "probe_gpu", lambda ordinal: nothing)
        writer = MooncakeP2PStore.writer(config)
    with monkeypatch.context() as context:
        if without == "reader":
            context.setattr(direct_gpu, "probe_gpu", lambda ordinal: nothing)
        reader = MooncakeP2PStore.reader(writer.address())
    assert (writer.capabilities().on_gpu, reader.capabilities().on_gpu) == (
        without != "writer",
        without != "reader",
    )
    ref = put(writer)
    with open_(reader, ref) as lease:
        assert same_sample(lease.sample, make_sample(1, 50))
    reader.ack(ref)
    assert writer.health().num_samples == 0
    reader.close()
    writer.close()
