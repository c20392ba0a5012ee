"""What a run writes about itself: metrics.jsonl, TensorBoard, wandb, the progress display."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import trainer_toy as toy
from specforge_ext.copies import Stage
from specforge_ext.loader import StepData
from specforge_ext.trainer.distributed import World, open_world
from specforge_ext.trainer.loop import Trainer
from specforge_ext.trainer.metrics import JsonLines, scalars
from specforge_ext.trainer.progress import Progress


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with open_world(device="cpu", timeout_s=30) as world:
        yield world


def fit(world: World, folder: Path, **settings: Any) -> None:
    source = toy.ToySource(2)
    Trainer(
        toy.config(**settings), toy.ToyMethod(), toy.make_draft(), source,
        output_dir=folder, world=world,
    ).fit()  # fmt: skip


def test_metrics_drop_what_was_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    lines = JsonLines(path, resume_step=2)
    lines.write({"step": 3, "new": True})
    lines.close()
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 3, "new": true}\n'


def test_metrics_that_are_none(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nhello\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl:2: wanted a JSON object with a step, got"):
        JsonLines(path, resume_step=2)


def test_a_line_says_what_the_step_did(world: World, tmp_path: Path) -> None:
    fit(world, tmp_path, warmup_ratio=1)
    line = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    batch = toy.make_batch(0, range(toy.SAMPLES_PER_STEP))
    assert line["tokens"] == batch.num_tokens
    assert line["samples"] == toy.SAMPLES_PER_STEP
    assert line["weight"] == int(batch.loss_mask.sum())
    assert line["lr"] == pytest.approx(0.005)
    assert line["tokens_per_s"] > 0 and 0 < line["data_wait_share"] <= 1
    assert 1e8 < line["peak_rss_bytes"] < 1e11
    assert abs(line["time"] - time.time()) < 600
    assert len(line["metrics"]["correct"]) == toy.DEPTH
    assert set(line["metrics"]) == {"correct"}


class Counted(toy.ToySource):
    """Says what its steps cost: step s delivers 100 * (s + 1) bytes."""

    def iterate(self, start_step: int) -> Iterator[StepData]:
        for data in super().iterate(start_step):
            n = 100 * (data.step + 1)
            put: dict[Stage, int] = {"put": n} if data.step == 1 else {}
            yield replace(data, delivered_bytes=n, copied={"engine": n, "collate": 2 * n, **put})


def test_copies_since_the_line_before(world: World, tmp_path: Path) -> None:
    Trainer(
        toy.config(log_every_steps=2), toy.ToyMethod(), toy.make_draft(), Counted(5),
        output_dir=tmp_path, world=world,
    ).fit()  # fmt: skip
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    name = "transfer/copied_per_byte"
    assert [line["transfer/bytes_delivered"] for line in lines] == [300, 700, 500]
    assert [line["transfer/bytes_copied_per_byte"] for line in lines] == [3 + 200 / 300, 3.0, 3.0]
    assert [line[f"{name}/collate"] for line in lines] == [2.0, 2.0, 2.0]
    assert [line.get(f"{name}/put") for line in lines] == [200 / 300, None, None]
    assert scalars(lines[0])[f"{name}/engine"] == 1.0


def test_a_source_that_counts_nothing(world: World, tmp_path: Path) -> None:
    fit(world, tmp_path)
    line = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    assert line["transfer/bytes_delivered"] == 0
    assert line["transfer/bytes_copied_per_byte"] is None


def test_tensorboard(world: World, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    fit(world, tmp_path, tensorboard=True)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [e.step for e in events.Scalars("loss")] == [1, 2]
    assert "metrics/correct/2" in events.Tags()["scalars"]


def test_scalars_leave_nulls_out() -> None:
    line = {"step": 3, "time": 1.0, "loss": None, "lr": 1, "metrics": {"a": [0.5, None], "b": 2}}
    assert scalars(line) == {"lr": 1.0, "metrics/a/0": 0.5, "metrics/b": 2.0}


def test_wandb_that_is_not_there(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"wandb_project: wanted the package wandb for 'p', got"):
        fit(world, tmp_path, wandb_project="p")


LINE = {
    "step": 5,
    "loss": 1.25,
    "tokens_per_s": 1234.4,
    "data_wait_share": 0.255,
    "metrics": {"accepted": [0.5, None], "other": 1.0},
}


def test_progress_without_a_terminal() -> None:
    out = StringIO()
    progress = Progress(
        start_step=0, total_steps=10, headline="accepted", console=Console(file=out, width=60)
    )
    progress.write(LINE)
    progress.write({**LINE, "loss": None})
    progress.close()
    first, second = out.getvalue().splitlines()
    assert first == (
        "step 5/10  loss 1.2500  accepted 0.500 -  1234 tokens/s  wait for data 26%  ETA 0:00:00"
    )
    assert second.startswith("step 5/10  skipped  accepted")


def test_progress_on_a_terminal() -> None:
    out = StringIO()
    console = Console(file=out, force_terminal=True, width=140)
    progress = Progress(start_step=0, total_steps=10, headline=None, console=console)
    progress.write(LINE)
    progress.close()
    assert "█" * 12 + "░" * 12 + " step 5/10" in out.getvalue()
    assert "other 1.000" in out.getvalue()
