"""Lines of metrics.jsonl, and the same numbers for TensorBoard and wandb."""

from __future__ import annotations

import json
import resource
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from specforge_ext.copies import Stage
from specforge_ext.trainer.config import TrainerConfig
from specforge_ext.trainer.step import StepReport
from specforge_ext.trainer.sums import report

Line = Mapping[str, Any]


class Clock:
    """Rates between logged steps. Time spent outside of steps (checkpoints) is part of them."""

    def __init__(self) -> None:
        self._start_s = time.perf_counter()
        self._tokens = 0
        self._wait_s = 0.0
        self._delivered_bytes = 0
        self._copied: Counter[Stage] = Counter()

    def count(self, step: StepReport) -> None:
        self._tokens += step.tokens
        self._wait_s += step.wait_s
        self._delivered_bytes += step.delivered_bytes
        self._copied.update(step.copied)

    def lap(self) -> dict[str, float | None]:
        """tokens_per_s (all ranks), data_wait_share (0..1) and `transfer_of` since the last lap."""
        now = time.perf_counter()
        elapsed = max(now - self._start_s, 1e-9)
        out: dict[str, float | None] = {
            "tokens_per_s": self._tokens / elapsed,
            "data_wait_share": min(self._wait_s / elapsed, 1.0),
            **transfer_of(self._delivered_bytes, self._copied),
        }
        self._start_s, self._tokens, self._wait_s = now, 0, 0.0
        self._delivered_bytes, self._copied = 0, Counter()
        return out


def transfer_of(delivered_bytes: int, copied: Mapping[Stage, int]) -> dict[str, float | None]:
    """What the delivered features (bytes, all ranks) cost in bytes copied, in total and by stage.

    Ratios are null where nothing was delivered. What was copied for a sample that is skipped
    counts, and so does what is copied again.
    """

    def per_byte(nbytes: int) -> float | None:
        return nbytes / delivered_bytes if delivered_bytes else None

    return {
        "transfer/bytes_delivered": delivered_bytes,
        "transfer/bytes_copied_per_byte": per_byte(sum(copied.values())),
        **{f"transfer/copied_per_byte/{stage}": per_byte(n) for stage, n in copied.items()},
    }


def metrics_line(step: StepReport, rates: Mapping[str, float | None]) -> dict[str, Any]:
    """What is written about a step: `step` counts from 1, so it is the number of steps done.

    loss: nats, global mean of this step, null where its weight was 0. tokens, samples: of this
    step, all ranks. rates: of a `Clock`. peak_rss_bytes: of rank 0. time: seconds since 1970. Then
    the method's own metrics.
    """
    return {
        "step": step.step + 1,
        "loss": step.loss,
        "lr": step.lr,
        "grad_norm": step.grad_norm,
        "weight": step.weight,
        "samples": step.samples,
        "tokens": step.tokens,
        **rates,
        "peak_rss_bytes": peak_rss_bytes(),
        "time": time.time(),
        "metrics": report(step.sums, step.ratios),
    }


def peak_rss_bytes() -> int:
    """Largest resident size of this process so far. Linux counts it in KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Sink(Protocol):
    """Somewhere that lines go."""

    def write(self, line: Line) -> None: ...

    def close(self) -> None: ...


class JsonLines:
    """metrics.jsonl. Lines after `resume_step` are of a run that was cut off: they are dropped."""

    def __init__(self, path: Path, *, resume_step: int) -> None:
        kept = [text for text, step in _complete_lines(path) if step <= resume_step]
        partial = path.with_name(f".{path.name}.partial")
        partial.write_text("".join(kept), encoding="utf-8")
        partial.replace(path)
        self._file = path.open("a", encoding="utf-8")

    def write(self, line: Line) -> None:
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _complete_lines(path: Path) -> list[tuple[str, int]]:
    """Lines with their steps; the last one may have been cut by a kill and is left out then."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        lines.pop()
    out = []
    for number, text in enumerate(lines, 1):
        try:
            out.append((text, int(json.loads(text)["step"])))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}:{number}: wanted a JSON object with a step, got {text[:80]!r}"
            ) from error
    return out


class TensorBoard:
    """Scalars under <folder>; points after `resume_step` of a run that was cut off are hidden."""

    def __init__(self, folder: Path, *, resume_step: int) -> None:
        # Imported here because it takes a second and is an option.
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=resume_step + 1)

    def write(self, line: Line) -> None:
        for name, value in scalars(line).items():
            self._writer.add_scalar(name, value, line["step"])

    def close(self) -> None:
        self._writer.close()


class Wandb:
    """A run of weights & biases. run_id: the same after a resume."""

    def __init__(
        self, folder: Path, *, project: str, run_id: str, settings: Mapping[str, Any]
    ) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ValueError(
                f"trainer.wandb_project: wanted the package wandb for {project!r}, got none; "
                "pip install wandb"
            ) from error
        self._run = wandb.init(
            project=project,
            dir=str(folder),
            id=run_id,
            config=dict(settings),
            resume="allow",
        )

    def write(self, line: Line) -> None:
        self._run.log(scalars(line), step=line["step"])

    def close(self) -> None:
        self._run.finish()


def scalars(line: Line) -> dict[str, float]:
    """The numbers of a line: entry k of a list metric `x` is `metrics/x/k`, nulls are left out."""
    out: dict[str, float] = {}
    flat = {name: value for name, value in line.items() if name not in ("step", "time", "metrics")}
    flat.update({f"metrics/{name}": value for name, value in line["metrics"].items()})
    for name, value in flat.items():
        entries = (
            {f"{name}/{k}": v for k, v in enumerate(value)}
            if isinstance(value, list)
            else {name: value}
        )
        out.update({key: float(v) for key, v in entries.items() if v is not None})
    return out


def open_sinks(
    config: TrainerConfig, output_dir: Path, *, resume_step: int, label: str = ""
) -> list[Sink]:
    """The sinks that the config asks for, in rank 0 only. label: of one draft among several."""
    sinks: list[Sink] = [JsonLines(output_dir / "metrics.jsonl", resume_step=resume_step)]
    if config.tensorboard:
        sinks.append(TensorBoard(output_dir / "tensorboard", resume_step=resume_step))
    if config.wandb_project is not None:
        settings = config.model_dump(mode="json")
        folder = output_dir.resolve()
        run_id = f"{folder.parent.name}-{folder.name}" if label else folder.name
        sinks.append(
            Wandb(output_dir, project=config.wandb_project, run_id=run_id, settings=settings)
        )
    return sinks
