"""The main job with real processes: undisturbed, killed, stopped, on two ranks.

Every job costs seconds, so that the tests share them. What is killed is killed at a random step.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from safetensors.torch import load_file

from run_job import TINY, Job, finished, started
from specforge_ext import _C
from specforge_ext.export import read_strict
from specforge_ext.methods import METHODS
from specforge_ext.runs.local import main

SEED = int(os.environ.get("SPECFORGE_EXT_TEST_SEED", random.randrange(1 << 32)))
NO_EVALUATION = "evaluate.num_prompts=0"
PER_STEP = ("step", "loss", "grad_norm", "lr", "samples", "tokens", "metrics")


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """One rank, undisturbed."""
    return finished(tmp_path_factory.mktemp("calm"))


@dataclass(frozen=True)
class Chains:
    """Two runs in several attempts each, side by side: much of an attempt is a single thread."""

    disturbed: Future[Disturbed]
    pair: Future[Pair]


@pytest.fixture(scope="module")
def chains(calm: Job, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chains]:
    def beside(name: str) -> Path:
        """A folder for a run on the same data, which need not be written again."""
        folder = tmp_path_factory.mktemp(name)
        shutil.copytree(calm.output_dir / "data", folder / "out" / "data")
        return folder

    with ThreadPoolExecutor(2) as pool:
        yield Chains(
            pool.submit(disturb_one_rank, beside("disturbed")),
            pool.submit(disturb_two_ranks, beside("pair")),
        )


@dataclass(frozen=True)
class Attempt:
    """What was seen of a job that was disturbed. seconds: from that to its end."""

    job: Job
    code: int
    seconds: float
    left: list[str]


def disturb(
    folder: Path, pick: Callable[[Job], int], number: int, *, step: int, ranks: int = 1
) -> Attempt:
    """Start the job, and signal one of its processes when it has done `step` steps."""
    with started(folder, NO_EVALUATION, ranks=ranks) as job:
        job.until_step(step)
        os.kill(pick(job), number)
        began = time.monotonic()
        code = job.wait()
        seconds = time.monotonic() - began
        return Attempt(job, code, seconds, job.left_behind(within_s=10.0))


@dataclass(frozen=True)
class Disturbed:
    """Attempts at one run, each going on where the last one was cut off; the last one ends it.

    resumed_at: step of the checkpoint that the second, third and last attempt found.
    """

    killed: Attempt
    orphaned: Attempt
    stopped: Attempt
    end: Job
    resumed_at: tuple[int, int, int]


def disturb_one_rank(folder: Path) -> Disturbed:
    rng = random.Random(SEED)
    killed = disturb(folder, Job.rank, signal.SIGKILL, step=rng.randint(1, 5))
    first = newest(killed.job)
    orphaned = disturb(folder, Job.producer, signal.SIGKILL, step=first + rng.randint(1, 4))
    second = newest(orphaned.job)
    stopped = disturb(folder, Job.rank, signal.SIGTERM, step=second + rng.randint(1, 4))
    third = newest(stopped.job)
    end = finished(folder, NO_EVALUATION)
    return Disturbed(killed, orphaned, stopped, end, (first, second, third))


@dataclass(frozen=True)
class Pair:
    """Two ranks: first one of them is killed, then the same command finishes."""

    killed: Attempt
    end: Job


def disturb_two_ranks(folder: Path) -> Pair:
    step = random.Random(SEED).randint(4, 9)
    killed = disturb(folder, lambda job: job.rank(1), signal.SIGKILL, step=step, ranks=2)
    return Pair(killed, finished(folder, NO_EVALUATION, ranks=2))


def newest(job: Job) -> int:
    return max(job.checkpoints(), default=0)


@pytest.fixture(scope="module")
def disturbed(chains: Chains) -> Disturbed:
    return chains.disturbed.result()


@pytest.fixture(scope="module")
def pair(chains: Chains) -> Pair:
    return chains.pair.result()


def test_summary_has_what_is_promised(calm: Job) -> None:
    summary = calm.summary()
    assert summary["commit"] == _C.__commit__
    assert summary["steps"] == len(calm.steps()) > 12
    assert summary["samples_trained"] == 4 * 48
    assert summary["samples_skipped"] == 0
    assert summary["tokens_trained"] == sum(line["tokens"] for line in calm.metrics())
    assert 0 < summary["train_wall_s"] < summary["wall_s"]
    assert 0 <= summary["data_wait_share"] < 1
    assert summary["peak_rss_bytes"] > 50 << 20
    assert summary["lossless"] is True
    assert summary["export_check"] is True
    assert len(bytes.fromhex(summary["parameters_sha256"])) == 32
    assert {(row["draft"], row["mode"]) for row in summary["acceptance"]} == {
        (draft, mode)
        for draft in ("trained", "untrained", "bigram")
        for mode in ("greedy", "sampling")
    }
    for row in summary["acceptance"]:
        assert row["temperature"] == (0.0 if row["mode"] == "greedy" else 0.8)
        assert row["depth"] == len(row["per_position"]) == 4
        low, high = row["ci95"]
        assert 1 <= low <= row["length"] <= high <= 5
        assert row["convention"].startswith("bonus_included")


def test_output_directory(calm: Job) -> None:
    assert calm.steps() == list(range(1, calm.summary()["steps"] + 1))
    assert (calm.output_dir / "skipped.jsonl").read_text() == ""
    steps = calm.summary()["steps"]
    kept = calm.checkpoints()
    assert kept[-2:] == [(steps - 1) // 3 * 3, steps]
    assert len(kept) <= 3  # the best one may be older
    assert not list((calm.output_dir / "checkpoints").glob(".partial*"))
    method = METHODS.get("eagle3")(METHODS.get("eagle3").Config(draft_vocab_size=1536))
    checkpoint = read_strict(Path(calm.summary()["export"]), method)
    assert checkpoint.config["draft_vocab_size"] == 1536


def test_nothing_is_left_behind(calm: Job) -> None:
    assert calm.left_behind(within_s=10.0) == []
    assert not list(Path("/dev/shm").glob("*specforge*"))


def test_same_command_again_has_nothing_to_do(calm: Job) -> None:
    before, checkpoints, steps = calm.summary(), calm.checkpoints(), calm.steps()
    again = finished(calm.output_dir.parent)
    assert "nothing to do: step" in again.output()
    assert "written by the target" not in again.output()  # the texts of the first run
    assert (again.checkpoints(), again.steps()) == (checkpoints, steps)
    summary = again.summary()
    for key in ("steps", "samples_trained", "tokens_trained", "parameters_sha256", "acceptance"):
        assert summary[key] == before[key]


def test_kill_of_the_trainer(disturbed: Disturbed) -> None:
    """The producer ends by itself, and takes its socket with it."""
    assert disturbed.killed.code != 0, SEED
    assert disturbed.killed.left == [], SEED


def test_kill_of_the_producer(disturbed: Disturbed) -> None:
    """The trainer does not wait for features that nobody makes: it says who died, and where to
    read why."""
    attempt = disturbed.orphaned
    output = attempt.job.output()
    assert attempt.code != 0, SEED
    assert "ProducerLost: " in output, SEED
    assert f"producer process ended with code -9; {attempt.job.output_dir}/producer.log" in output
    assert attempt.seconds < 30.0, SEED
    assert attempt.left == [], SEED


def test_sigterm_saves(disturbed: Disturbed) -> None:
    attempt = disturbed.stopped
    step = disturbed.resumed_at[-1]
    assert attempt.code == 0, (SEED, attempt.job.output())
    assert f"stopped by a signal at step {step}, saved; the same command goes on" in (
        attempt.job.output()
    )
    assert attempt.seconds < 30.0, SEED
    assert attempt.left == [], SEED


def test_same_command_goes_on_to_the_same_bits(calm: Job, disturbed: Disturbed) -> None:
    """After a kill of the trainer, one of the producer, and a SIGTERM."""
    for attempt, start in zip(
        (disturbed.orphaned.job, disturbed.stopped.job, disturbed.end),
        disturbed.resumed_at,
        strict=True,
    ):
        assert start == 0 or f"going on from {attempt.output_dir}/checkpoints/" in attempt.output()
    assert disturbed.resumed_at[-1] < calm.summary()["steps"], SEED
    mine, wanted = disturbed.end.summary(), calm.summary()
    for key in ("steps", "samples_trained", "tokens_trained", "parameters_sha256"):
        assert mine[key] == wanted[key], (key, SEED, disturbed.resumed_at)
    assert [{k: line[k] for k in PER_STEP} for line in disturbed.end.metrics()] == [
        {k: line[k] for k in PER_STEP} for line in calm.metrics()
    ], (SEED, disturbed.resumed_at)


def test_a_dead_rank_ends_the_others(pair: Pair) -> None:
    attempt = pair.killed
    assert attempt.code != 0, SEED
    assert attempt.seconds < 60.0, SEED
    assert attempt.left == [], SEED


def test_two_ranks_equal_one(calm: Job, pair: Pair) -> None:
    two = pair.end
    assert f"going on from {two.output_dir}/checkpoints/" in two.output(), SEED
    for key in ("steps", "samples_trained", "tokens_trained", "samples_skipped"):
        assert two.summary()[key] == calm.summary()[key]
    assert two.steps() == calm.steps()
    for job in (two, calm):  # also where ranks, kills and resumes are many
        assert {line["transfer/bytes_copied_per_byte"] for line in job.metrics()} == {2.0}
    mine, wanted = (
        load_file(Path(job.summary()["export"]) / "model.safetensors") for job in (two, calm)
    )
    assert mine.keys() == wanted.keys()
    worst = {
        name: float((mine[name].double() - wanted[name].double()).abs().max()) for name in mine
    }
    assert max(worst.values()) <= 1e-6, worst


def test_resume_with_another_method_is_refused(
    calm: Job, capfd: pytest.CaptureFixture[str]
) -> None:
    """In this process, which is one rank then."""
    assert main([*TINY, f"output_dir={calm.output_dir}", "method.ttt_length=3"]) == 1
    said = capfd.readouterr()
    assert "48 samples" in said.out
    assert "is of another run: wanted method.ttt_length = 3, got 4" in said.err
    assert "Traceback" not in said.err
