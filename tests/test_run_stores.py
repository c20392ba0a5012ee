"""The main job over each store: the same parameters, bit by bit, and nothing left behind."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

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


def test_the_default_is_shm(default: Job) -> None:
    assert "store: shm over memory" in default.output()


@pytest.mark.parametrize(
    ("kind", "protocol"),
    [("shared_dir", "file"), ("mooncake_store", "tcp"), ("mooncake_p2p", "tcp")],
)
def test_same_parameters(default: Job, beside: Path, kind: str, protocol: str) -> None:
    if (reason := STORES.get(kind).unavailable()) is not None:
        pytest.skip(reason)
    with started(beside, *QUICK, f"store.kind={kind}") as job:
        assert job.wait() == 0, job.output()
        left = job.left_behind(within_s=10.0)
    assert f"store: {kind} over {protocol}" in job.output()
    assert f"store: {kind} over {protocol}" in (job.output_dir / "producer.log").read_text()
    for key in ("steps", "samples_trained", "tokens_trained", "parameters_sha256"):
        assert job.summary()[key] == default.summary()[key], key
    if kind == "shared_dir":  # in the temporary directory, for the next run, and empty
        assert left == [f"specforge-ext-{os.getuid()}"]
        assert list((job.temporary / left[0]).iterdir()) == []
    else:
        assert left == []


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
