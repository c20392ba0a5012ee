"""One rank: checkpoints, resuming, metrics files, signals."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import trainer_toy as toy
from specforge_ext.trainer import rng, signals
from specforge_ext.trainer.checkpoint import Checkpointer, CheckpointError, Meta, read_meta
from specforge_ext.trainer.distributed import World, open_world
from specforge_ext.trainer.loop import Trainer, check_identity

STEPS = 8
EVERY_2 = {"every_steps": 2, "keep_last": 9}


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with open_world(device="cpu", timeout_s=30) as world:
        yield world


def make(world: World, folder: Path, *, steps: int = STEPS, faults: Any = None, **settings: Any):
    return Trainer(
        toy.config(**{"checkpoint": EVERY_2, **settings}),
        toy.ToyMethod(),
        toy.make_draft(dropout=0.3),
        toy.ToySource(steps, faults=faults or {}),
        output_dir=folder,
        world=world,
    )


def everything(trainer: Trainer) -> dict[str, Tensor]:
    """Parameters, buffers and moments, whole."""
    return {name: t.full_tensor() if hasattr(t, "full_tensor") else t
            for name, t in trainer._tensors().items()}  # fmt: skip


def assert_same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.fixture(scope="module")
def calm(world: World, tmp_path_factory: pytest.TempPathFactory) -> tuple[Trainer, Path]:
    """A run of 8 steps that nothing disturbs."""
    folder = tmp_path_factory.mktemp("calm")
    trainer = make(world, folder)
    trainer.fit()
    return trainer, folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def steps_in(folder: Path) -> list[int]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["step"] for line in lines]


@pytest.mark.parametrize("start", [2, 6])
def test_resume_gives_the_same_bits(
    world: World, tmp_path: Path, calm: tuple[Trainer, Path], start: int
) -> None:
    resume = str(calm[1] / "checkpoints" / f"step_{start:08d}")
    trainer = make(world, tmp_path, checkpoint={**EVERY_2, "resume": resume})
    result = trainer.fit()
    assert (result.resumed_step, result.steps) == (start, STEPS)
    assert result.samples_trained == STEPS * toy.SAMPLES_PER_STEP
    assert_same_bits(everything(trainer), everything(calm[0]))
    assert trainer._optimizer.updates == STEPS


@pytest.mark.parametrize("fault", ["term", "ctrl-c", "ctrl-c twice"])
def test_signal_saves_and_resume_goes_on(
    world: World, tmp_path: Path, calm: tuple[Trainer, Path], fault: str
) -> None:
    """A terminal's Ctrl-C reaches a rank twice, the second time from torchrun."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where tests run with `&`
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    result = make(world, tmp_path, faults={4: fault}).fit()
    assert (result.stopped_by_signal, result.steps) == (True, 5)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before
    assert names(tmp_path)[-1] == "step_00000005"
    trainer = make(world, tmp_path)
    result = trainer.fit()
    assert (result.stopped_by_signal, result.resumed_step, result.steps) == (False, 5, STEPS)
    assert_same_bits(everything(trainer), everything(calm[0]))
    assert steps_in(tmp_path) == list(range(1, STEPS + 1))


def test_ctrl_c_stays_ignored_in_the_background() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with signals.stop_on_signals() as stop:
            signal.raise_signal(signal.SIGINT)
            assert not stop()
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_later_ctrl_c_does_not_wait_for_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "SAME_CTRL_C_S", 0.0)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with pytest.raises(KeyboardInterrupt), signals.stop_on_signals() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop()
        signal.raise_signal(signal.SIGINT)


def test_finished_run_has_nothing_to_do(world: World, calm: tuple[Trainer, Path]) -> None:
    trainer = make(world, calm[1])
    result = trainer.fit()
    assert (result.resumed_step, result.steps, result.final_loss) == (STEPS, STEPS, None)
    assert result.checkpoint == calm[1] / "checkpoints" / f"step_{STEPS:08d}"
    assert_same_bits(everything(trainer), everything(calm[0]))


def test_real_sigterm_exits_0(tmp_path: Path) -> None:
    """A process without torchrun, a signal from outside."""
    spec = {
        "name": "run",
        "output_dir": str(tmp_path),
        "total_steps": 100_000,
        "layout": toy.ONE_RANK,
        "config": {"checkpoint": {"every_steps": 100_000}},
    }
    process = worker(spec, tmp_path)
    metrics = tmp_path / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not (metrics.exists() and metrics.stat().st_size):
        assert time.monotonic() < deadline, "no step within 60 s"
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 0, output
    result = torch.load(tmp_path / "run.stopped.pt", weights_only=True)["result"]
    assert result["stopped_by_signal"]
    assert names(tmp_path) == [f"step_{result['steps']:08d}"]


def test_kill_before_the_rename_leaves_the_one_before(
    world: World, tmp_path: Path, calm: tuple[Trainer, Path]
) -> None:
    spec = {
        "name": "run",
        "output_dir": str(tmp_path),
        "total_steps": STEPS,
        "layout": toy.ONE_RANK,
        "dropout": 0.3,
        "config": {"checkpoint": EVERY_2},
        "kill_at_publish": 6,
    }
    process = worker(spec, tmp_path)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL, output
    assert names(tmp_path) == [".partial-step_00000006", "step_00000002", "step_00000004"]
    assert (tmp_path / "checkpoints" / ".partial-step_00000006" / "meta.json").exists()
    trainer = make(world, tmp_path)
    assert trainer.fit().resumed_step == 4
    assert_same_bits(everything(trainer), everything(calm[0]))
    assert names(tmp_path) == [f"step_{s:08d}" for s in (2, 4, 6, 8)]
    assert steps_in(tmp_path) == list(range(1, STEPS + 1))


def worker(spec: dict[str, Any], folder: Path) -> subprocess.Popen[str]:
    file = folder / "spec.json"
    file.write_text(json.dumps([spec]))
    script = Path(__file__).with_name("trainer_worker.py")
    return subprocess.Popen(
        [sys.executable, str(script), str(file)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_keep_last(world: World, tmp_path: Path) -> None:
    make(world, tmp_path, checkpoint={"every_steps": 2, "keep_last": 2}).fit()
    assert names(tmp_path) == ["step_00000006", "step_00000008"]


def test_keep_best(world: World, tmp_path: Path) -> None:
    tensors = {"x": torch.zeros(1)}
    saver = Checkpointer(tmp_path / "checkpoints", world, keep_last=1, keep_best=True)
    for step, metric in [(1, 0.2), (2, 0.9), (3, None), (4, 0.9), (5, 0.5)]:
        saver.save(tensors, Meta(step=step, world_size=1, metric=metric))
    # Of equals the newer one.
    assert names(tmp_path) == ["step_00000004", "step_00000005"]


def test_metric_is_pooled_since_the_last_checkpoint(world: World, tmp_path: Path) -> None:
    make(world, tmp_path, headline_metric="correct").fit()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    for step in (2, 6):
        two = lines[step - 2 : step]
        # The toy's weight is its number of scored tokens.
        weights = [line["weight"] for line in two]
        pooled = [
            sum(w * line["metrics"]["correct"][k] for w, line in zip(weights, two, strict=True))
            for k in range(toy.DEPTH)
        ]
        wanted = sum(pooled) / toy.DEPTH / sum(weights)
        meta = read_meta(tmp_path / "checkpoints" / f"step_{step:08d}")
        assert meta.metric == pytest.approx(wanted)


def test_resume_none_refuses_to_overwrite(world: World, calm: tuple[Trainer, Path]) -> None:
    trainer = make(world, calm[1], checkpoint={**EVERY_2, "resume": "none"})
    with pytest.raises(ValueError, match=r"wanted no checkpoint after step 0 in .*step_0+2"):
        trainer.fit()


def test_resume_of_no_checkpoint(world: World, tmp_path: Path) -> None:
    trainer = make(world, tmp_path, checkpoint={**EVERY_2, "resume": str(tmp_path / "nothing")})
    with pytest.raises(ValueError, match=r"nothing: wanted a checkpoint, got no meta.json"):
        trainer.fit()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": 0.5}, r"is of another run: wanted trainer\.lr = 0\.5, got 0\.01"),
        ({"steps": 9}, r"is of another run: wanted total_steps = 9, got 8"),
        ({"seed": 4}, r"is of another run: wanted trainer\.seed = 4, got 0"),
    ],
)
def test_resume_of_another_run(
    world: World, calm: tuple[Trainer, Path], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make(world, calm[1], **settings).fit()


def test_resume_from_before_a_setting_existed(
    world: World, tmp_path: Path, calm: tuple[Trainer, Path]
) -> None:
    """It stands for the default, here of a setting of the trainer."""
    shutil.copytree(calm[1], tmp_path / "run")
    meta = sorted((tmp_path / "run" / "checkpoints").iterdir())[-1] / "meta.json"
    data = json.loads(meta.read_text())
    assert data["identity"]["trainer"].pop("schedule") == "cosine"
    meta.write_text(json.dumps(data))
    assert make(world, tmp_path / "run").fit().resumed_step == STEPS
    with pytest.raises(ValueError, match=r"wanted trainer\.schedule = 'linear', got 'cosine'"):
        make(world, tmp_path / "run", schedule="linear").fit()


def test_identity_ignores_what_json_does() -> None:
    check_identity(Path("x"), {"a": [1, 2], "b": {"c": None}}, {"a": (1, 2), "b": {"c": None}})
    with pytest.raises(ValueError, match=r"x: is of another run: wanted b\.c = None, got 1"):
        check_identity(Path("x"), {"b": {"c": 1}}, {"b": {}})


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"x": torch.zeros(3)}, r"x: wanted \[3\], got \[2\]"),
        ({"x": torch.zeros(2), "y": torch.zeros(1)}, r"y: wanted \[1\], got nothing"),
        ({}, "x: wanted no such tensor, got one"),
    ],
)
def test_load_is_strict(
    world: World, tmp_path: Path, tensors: dict[str, Tensor], message: str
) -> None:
    saver = Checkpointer(tmp_path, world, keep_last=1, keep_best=False)
    path = saver.save({"x": torch.ones(2)}, Meta(step=1, world_size=1))
    with pytest.raises(ValueError, match=message):
        saver.load(path, tensors)


def test_unreadable_checkpoint(world: World, tmp_path: Path) -> None:
    saver = Checkpointer(tmp_path, world, keep_last=1, keep_best=False)
    path = saver.save({"x": torch.ones(2)}, Meta(step=1, world_size=1))
    for file in path.glob("*.distcp"):
        file.unlink()
    with pytest.raises(CheckpointError, match=r"reading .*step_00000001: rank 0: .*No such file"):
        saver.load(path, {"x": torch.zeros(2)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 9}, "wanted a checkpoint of format 1, got 9"),
        ({"colour": 1}, "wanted keys .*got 'colour'"),
    ],
)
def test_foreign_meta(world: World, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    saver = Checkpointer(tmp_path, world, keep_last=1, keep_best=False)
    path = saver.save({"x": torch.ones(2)}, Meta(step=1, world_size=1))
    file = path / "meta.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(ValueError, match=message):
        read_meta(path)


def test_saving_twice_leaves_the_first(world: World, tmp_path: Path) -> None:
    saver = Checkpointer(tmp_path, world, keep_last=1, keep_best=False)
    path = saver.save({"x": torch.ones(2)}, Meta(step=1, world_size=1))
    assert saver.save({"x": torch.zeros(2)}, Meta(step=1, world_size=1)) == path
    read = {"x": torch.zeros(2)}
    saver.load(path, read)
    assert read["x"].tolist() == [1, 1]


def test_random_states() -> None:
    import random

    import numpy

    def draw() -> list[float]:
        return [float(torch.rand(())), float(numpy.random.rand()), random.gauss(0, 1)]

    rng.seed_everything(3, rank=0)
    draw()  # leaves half a pair of normal numbers in `random`
    state = rng.capture()
    drawn = draw()
    assert draw() != drawn
    rng.restore(state)
    assert draw() == drawn
    rng.seed_everything(3, rank=1)
    draw()
    assert draw() != drawn


def test_rank_that_never_comes(tmp_path: Path) -> None:
    """Rank 0 of 2, alone: an error within the deadline that says what it waited for."""
    code = (
        "from specforge_ext.trainer.distributed import open_world\n"
        "with open_world(device='cpu', timeout_s=1): pass"
    )
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **place, **meeting},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert f"CollectiveError: rank 0: no meeting of 2 ranks at 127.0.0.1:{port}" in done.stderr
