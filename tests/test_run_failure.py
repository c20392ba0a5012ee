"""A run that cannot go on says why in one sentence, before it has cost anything where it can."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from run_job import TINY
from specforge_ext.runs import failure, local
from specforge_ext.runs.link import ProducerProcess, ProducerRefused
from specforge_ext.runs.local import main
from specforge_ext.runs.producer import _open_store
from specforge_ext.runs.recipe import load
from specforge_ext.store import STORES
from specforge_ext.store.base import ProducerLost, StoreError

DEADLINE_S = 120.0


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What main says in its single line; nothing was started."""
    assert main(arguments) == 1
    said = capsys.readouterr()
    assert said.out == ""
    [line] = said.err.splitlines()
    return line


def test_missing_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every file that is not there, before a model is loaded and before a folder is made."""
    there = tmp_path / "there.jsonl"
    there.write_text("")
    out = tmp_path / "out"
    line = refused(
        [
            f"data.train={{kind: jsonl, paths: [{there}, {tmp_path}/gone.jsonl]}}",
            f"data.heldout={{kind: jsonl, paths: [{tmp_path}]}}",
            f"output_dir={out}",
        ],
        capsys,
    )
    assert line == (
        f"specforge_ext: data.train.paths: wanted a JSONL file, found none at "
        f"'{tmp_path}/gone.jsonl'; data.heldout.paths: wanted a JSONL file, found none at "
        f"'{tmp_path}'"
    )
    assert not out.exists()


def test_output_dir_that_cannot_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    for place, reason in ((tmp_path / "file", "File exists"), ("/proc/none", "No such file")):
        line = refused([f"output_dir={place}"], capsys)
        wanted = f"output_dir: wanted a folder to write to, got '{place}': {reason}"
        assert line.startswith(f"specforge_ext: {wanted}")
    assert (tmp_path / "file").read_text() == ""


def test_two_runs_into_one_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (tmp_path / ".lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        line = refused([f"output_dir={tmp_path}"], capsys)
    assert f"output_dir: wanted a folder that no other run writes to, got '{tmp_path}'" in line
    assert f"(traceback: {tmp_path}/traceback-0.txt)" in line


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    said = capsys.readouterr().out
    assert "[RECIPE] [key.sub=value ...]" in said and "demo-dflash" in said


def raising(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(_recipe: object) -> None:
        raise error

    monkeypatch.setattr(local, "run", run)


def test_traceback_is_kept_and_torchrun_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    raising(ProducerRefused("no room"), monkeypatch)
    told = tmp_path / "error.json"
    for key, value in {"TORCHELASTIC_ERROR_FILE": told, "RANK": 3, "WORLD_SIZE": 4}.items():
        monkeypatch.setenv(key, str(value))
    line = refused([f"output_dir={tmp_path}"], capsys)
    kept = tmp_path / "traceback-3.txt"
    text = f"rank 3: no room (traceback: {kept})"
    assert line == f"specforge_ext: {text}"
    assert kept.read_text().startswith("Traceback") and "in run" in kept.read_text()
    found = ProcessFailure(local_rank=3, pid=1, exitcode=1, error_file=str(told))
    assert found.message["message"] == text  # type: ignore[index] # a dict, whatever torch says
    assert abs(found.timestamp - time.time()) < 60


def test_our_own_faults_keep_their_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raising(TypeError("a bug"), monkeypatch)
    with pytest.raises(TypeError, match="a bug"):
        main([f"output_dir={tmp_path}"])


def test_an_export_that_differs_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    good, bad = {"export_check": True}, {"export_check": False}
    for summary, code in (
        (good, 0), (bad, 1), (None, 0), ({"drafts": {"a": good, "b": bad}}, 1),
    ):  # fmt: skip
        monkeypatch.setattr(local, "run", lambda _, out=summary: out)
        assert main([]) == code


def test_sentences() -> None:
    assert failure.sentence(ValueError("a.b: wanted 1, got 2")) == "a.b: wanted 1, got 2"
    assert failure.sentence(ProducerLost("gone")) == "ProducerLost: gone"
    with pytest.raises(OSError, match="No such file") as found:
        Path("/none/at/all").read_text()
    assert failure.sentence(found.value) == "/none/at/all: No such file or directory"


def test_last_words_of_a_producer(tmp_path: Path) -> None:
    """Of this one, not of one that logged to the same file before."""
    log = tmp_path / "producer.log"
    log.write_text("cannot go on: an old reason\n")
    recipe = load(None, ["engine.model=./nowhere", f"output_dir={tmp_path}"])
    producer = ProducerProcess(recipe.source, num_threads=1, log_path=log)
    try:
        link = producer.connect(timeout_s=DEADLINE_S)
        with pytest.raises(ProducerLost, match="the producer"):
            link.hello(layout_hash="", timeout_s=DEADLINE_S)
        link.close()
        assert producer.obituary() == (
            f"producer process ended with code 1, log in {log}; cannot go on: "
            "model: wanted a directory with config.json, got './nowhere'"
        )
    finally:
        producer.close()
    assert "Traceback" in log.read_text()


def test_store_that_does_not_fit_the_machine() -> None:
    config = STORES.get("shm").Config(capacity_bytes=1 << 46)
    with pytest.raises(StoreError, match=r"store\.kind shm: arena: allocate .* are available"):
        _open_store("shm", config)


def test_ctrl_c_while_it_starts(tmp_path: Path) -> None:
    """No traceback, nothing left in memory or in temporary folders."""
    out, temporary = tmp_path / "out", tmp_path / "tmp"
    temporary.mkdir()
    process = subprocess.Popen(
        [sys.executable, "-m", "specforge_ext.train", *TINY, f"output_dir={out}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(temporary)},
        # Ignored, and inherited so, where tests run with `&`.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    log = out / "producer.log"
    deadline = time.monotonic() + DEADLINE_S
    while not log.exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 130
    assert said == "specforge_ext: interrupted; the same command goes on\n"
    assert list(temporary.iterdir()) == []
