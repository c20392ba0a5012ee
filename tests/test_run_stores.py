"""The main job over each store: the same parameters, bit by bit, and nothing left behind."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import fake_cuda
from run_job import Job, finished, started
from specforge_ext.store import STORES
from specforge_ext.store.mooncake_master import Master

QUICK = ("evaluate.num_prompts=0", "order.epochs=2")


@pytest.fixture(scope="module")
def default(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """Without a word about stores."""
    return finished(tmp_path_factory.mktemp("default"), *QUICK)


@pytest.fixture
def beside(default: Job, tmp_path: Path) -> Iterator[Path]:
    """A folder for a run on the same data, which need not be written again."""
    shutil.copytree(default.output_dir / "data", tmp_path / "out" / "data")
    yield tmp_path


def copied_per_byte(job: Job) -> set[float]:
    """Of every logged step; each is from the engine `hf` to the trainer."""
    lines = job.metrics()
    assert len(lines) > 4 and all(line["transfer/bytes_delivered"] > 0 for line in lines)
    return {line["transfer/bytes_copied_per_byte"] for line in lines}


def test_the_default_is_shm(default: Job) -> None:
    assert "store: shm over memory" in default.output()
    assert "samples are written in place" in (default.output_dir / "producer.log").read_text()


def test_by_default_features_are_copied_twice(default: Job) -> None:
    """Into the arena, and out of it: exactly, in every step."""
    assert copied_per_byte(default) == {2.0}
    for line in default.metrics():
        stages = {name: v for name, v in line.items() if "copied_per_byte/" in name}
        assert stages == {
            "transfer/copied_per_byte/engine": 1.0,
            "transfer/copied_per_byte/collate": 1.0,
        }
    tokens = sum(line["tokens"] for line in default.metrics())
    delivered = sum(line["transfer/bytes_delivered"] for line in default.metrics())
    layout_bytes = delivered / tokens
    assert layout_bytes == int(layout_bytes) > 0


@pytest.mark.parametrize(
    ("kind", "protocol", "copies"),
    [("shared_dir", "file", 3.0), ("mooncake_store", "tcp", 4.0), ("mooncake_p2p", "tcp", 3.0)],
)
def test_same_parameters(
    default: Job, beside: Path, kind: str, protocol: str, copies: float
) -> None:
    """Written in place (shm, mooncake_p2p) or put: the same bits."""
    if (reason := STORES.get(kind).unavailable()) is not None:
        pytest.skip(reason)
    with started(beside, *QUICK, f"store.kind={kind}") as job:
        assert job.wait() == 0, job.output()
        left = job.left_behind(within_s=10.0)
    assert f"store: {kind} over {protocol}" in job.output()
    assert f"store: {kind} over {protocol}" in (job.output_dir / "producer.log").read_text()
    for key in ("steps", "samples_trained", "tokens_trained", "parameters_sha256"):
        assert job.summary()[key] == default.summary()[key], key
    assert copied_per_byte(job) == {copies}
    if kind == "shared_dir":  # in the temporary directory, for the next run, and empty
        assert left == [f"specforge-ext-{os.getuid()}"]
        assert list((job.temporary / left[0]).iterdir()) == []
    else:
        assert left == []


@pytest.mark.parametrize("kind", ["mooncake_p2p", "mooncake_store"])
def test_same_parameters_by_way_of_a_gpu(
    default: Job, beside: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Whose driver is made of memfds: every process of the run loads it as it starts."""
    if (reason := STORES.get(kind).unavailable()) is not None:
        pytest.skip(reason)
    if torch.cuda.is_available() or fake_cuda.real_driver():
        pytest.skip("a CUDA driver is here: test_gpu_transfer covers it")
    fake_cuda.library()
    (beside / "sitecustomize.py").write_text("import fake_cuda\n")
    path = [str(beside), str(Path(fake_cuda.__file__).parent), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path))
    monkeypatch.setenv(fake_cuda.WANTED, "1")
    job = finished(beside, *QUICK, f"store.kind={kind}", "store.direct=on")
    for key in ("steps", "samples_trained", "tokens_trained", "parameters_sha256"):
        assert job.summary()[key] == default.summary()[key], key
    assert copied_per_byte(job) == {4.0}  # put, not written in place
    assert "rung gpu_tcp: samples lie in the memory of cuda:0, Fake 0" in job.output()


FP8 = "store.encoding=fp8_e4m3_row"


@pytest.fixture(scope="module")
def encoded(default: Job, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """Through shm."""
    folder = tmp_path_factory.mktemp("encoded")
    shutil.copytree(default.output_dir / "data", folder / "out" / "data")
    return finished(folder, *QUICK, FP8)


def test_an_encoding_is_said_and_changes_the_bits(default: Job, encoded: Job) -> None:
    for log in (encoded.output(), (encoded.output_dir / "producer.log").read_text()):
        assert "store: shm over memory, encoding fp8_e4m3_row" in log
    assert encoded.summary()["parameters_sha256"] != default.summary()["parameters_sha256"]
    assert encoded.summary()["tokens_trained"] == default.summary()["tokens_trained"]


@pytest.mark.parametrize(
    ("kind", "verify"),
    [("shared_dir", "sample"), ("mooncake_store", "off"), ("mooncake_p2p", "full")],
)
def test_same_parameters_encoded(encoded: Job, beside: Path, kind: str, verify: str) -> None:
    if (reason := STORES.get(kind).unavailable()) is not None:
        pytest.skip(reason)
    job = finished(beside, *QUICK, FP8, f"store.kind={kind}", f"stream.verify={verify}")
    for key in ("steps", "samples_trained", "tokens_trained", "parameters_sha256"):
        assert job.summary()[key] == encoded.summary()[key], key


def test_another_encoding_is_another_run(encoded: Job) -> None:
    """Its checkpoint is not gone on from."""
    with started(encoded.output_dir.parent, *QUICK) as job:
        assert job.wait() != 0
    assert "encoding" in job.output().partition("is of another run: wanted")[2]


def test_killed_with_a_master_of_its_own(beside: Path) -> None:
    """Nothing stays, least of all the master; the same command goes on with a master that is
    given."""
    if (reason := STORES.get("mooncake_store").unavailable()) is not None:
        pytest.skip(reason)
    with started(beside, *QUICK, "store.kind=mooncake_store") as job:
        job.until_step(4)
        assert any("mooncake_master" in command for command, _ in job.processes().values())
        os.kill(job.rank(), signal.SIGKILL)
        assert job.wait() != 0
        assert job.left_behind(within_s=10.0) == []
    master = Master()
    try:
        more = ("store.kind=mooncake_store", f"store.master={master.address}")
        assert finished(beside, *QUICK, *more).summary()["steps"] > 4
    finally:
        master.close()
