"""Starts a tiny run of the demo recipe as a user would, and does things to its processes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

DEADLINE_S = 240.0
"""For whatever a test waits for; a whole run takes 10 s on a quiet machine."""

MARKER = "SPECFORGE_EXT_TEST_JOB"

TINY = (
    "run.num_threads=1",
    "data.train.num_prompts=48",
    "data.train.prefix_tokens=16",
    "data.heldout.num_prompts=6",
    "data.heldout.prefix_tokens=16",
    "data.generate.max_new_tokens=24",
    "order.batch_tokens=320",
    "order.epochs=4",
    "method.ttt_length=4",
    "trainer.lr=1e-3",
    "trainer.betas=[0.9, 0.999]",
    "trainer.log_every_steps=1",
    "trainer.tensorboard=false",
    "trainer.checkpoint.every_steps=3",
    # Where a gradient is almost 0, a smaller eps turns its last bits into a visible update.
    "trainer.eps=1e-6",
    "evaluate.num_prompts=6",
    "evaluate.max_new_tokens=16",
    "export.dtype=float32",
)


class Job:
    """`torchrun -m specforge_ext.train` of TINY with more assignments; output_dir is folder/out."""

    def __init__(self, folder: Path, *more: str, ranks: int = 1) -> None:
        self.output_dir = folder / "out"
        self.temporary = folder / "tmp"
        self.temporary.mkdir(parents=True, exist_ok=True)
        self._id = uuid.uuid4().hex
        self._log = folder / f"{self._id}.log"
        launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        arguments = [*TINY, *more, f"output_dir={self.output_dir}"]
        # OpenMP's pool of one thread each: the processes of all tests share the cores.
        more_environment = {MARKER: self._id, "TMPDIR": str(self.temporary), "OMP_NUM_THREADS": "1"}
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", *launcher, "-m", "specforge_ext.train", *arguments],
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **more_environment},
            )

    def output(self) -> str:
        return self._log.read_text(errors="replace")

    def wait(self) -> int:
        """torchrun's exit code; 0 only if every rank exited with 0."""
        return self._process.wait(timeout=DEADLINE_S)

    def until(self, done: Callable[[], bool], what: str) -> None:
        """Wait for something while the job runs."""
        deadline = time.monotonic() + DEADLINE_S
        while not done():
            ended = self._process.poll()
            assert ended is None, f"ended with {ended} before {what}:\n{self.output()}"
            assert time.monotonic() < deadline, f"no {what}:\n{self.output()}"
            time.sleep(0.01)

    def until_step(self, step: int) -> None:
        """This job has done step `step` (counted from 1), and perhaps a few more."""
        self.until(lambda: self._step_shown() >= step, f"step {step}")

    def _step_shown(self) -> int:
        """Not from metrics.jsonl, which may hold steps of a run that was cut off."""
        return max(map(int, re.findall(r"^step (\d+)/", self.output(), re.MULTILINE)), default=0)

    def steps(self) -> list[int]:
        return [line["step"] for line in self.metrics()]

    def metrics(self) -> list[dict[str, Any]]:
        path = self.output_dir / "metrics.jsonl"
        text = path.read_text() if path.exists() else ""
        return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]

    def summary(self) -> dict[str, Any]:
        return dict(json.loads((self.output_dir / "summary.json").read_text()))

    def checkpoints(self) -> list[int]:
        """Steps of the complete ones."""
        return sorted(int(p.name[5:]) for p in (self.output_dir / "checkpoints").glob("step_*"))

    def processes(self) -> dict[int, tuple[str, dict[str, str]]]:
        """Command line and environment of every living process that the job started."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                environment = _environment(folder / "environ")
                command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:  # it ended, or is another user's
                continue
            if environment.get(MARKER) == self._id:
                found[int(folder.name)] = (command, environment)
        return found

    def rank(self, rank: int = 0) -> int:
        """Its process id."""
        return self._one(
            lambda command, environment: (
                "-m specforge_ext.train" in command
                and "torch.distributed.run" not in command
                and environment.get("RANK") == str(rank)
            )
        )

    def producer(self) -> int:
        """Its process id."""
        return self._one(lambda command, _: "specforge_ext.runs.producer" in command)

    def _one(self, wanted: Callable[[str, dict[str, str]], bool]) -> int:
        processes = self.processes()
        [pid] = [pid for pid, (command, env) in processes.items() if wanted(command, env)]
        return pid

    def left_behind(self, *, within_s: float) -> list[str]:
        """What still lives `within_s` after torchrun's end, and temporary files of ours."""
        deadline = time.monotonic() + within_s
        while self.processes() and time.monotonic() < deadline:
            time.sleep(0.05)
        processes = [command for command, _ in self.processes().values()]
        return processes + [p.name for p in self.temporary.glob("specforge*")]

    def stop(self) -> None:
        """Whatever a failed test left."""
        for pid in self.processes():
            os.kill(pid, signal.SIGKILL)
        self._process.wait(timeout=DEADLINE_S)


@contextmanager
def started(folder: Path, *more: str, ranks: int = 1) -> Iterator[Job]:
    job = Job(folder, *more, ranks=ranks)
    try:
        yield job
    finally:
        job.stop()


def finished(folder: Path, *more: str, ranks: int = 1) -> Job:
    """A run that nobody disturbed on its way to the end."""
    with started(folder, *more, ranks=ranks) as job:
        assert job.wait() == 0, job.output()
        return job


def _environment(path: Path) -> dict[str, str]:
    entries = path.read_bytes().decode(errors="replace").split("\0")
    return {name: value for name, _, value in (entry.partition("=") for entry in entries)}
