"""What a person sees while a draft trains: a live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

Line = Mapping[str, Any]


class Progress:
    """A sink for metrics lines. headline: the metric shown first, None shows every ratio.

    label: before each line; there is no live line then, since several drafts share the terminal.
    """

    def __init__(
        self,
        *,
        start_step: int,
        total_steps: int,
        headline: str | None,
        console: Console | None = None,
        label: str = "",
    ) -> None:
        self._console = console or Console()
        self._start_step = start_step
        self._start_s = time.perf_counter()
        self._total_steps = total_steps
        self._headline = headline
        self._live: Live | None = None
        self._label = f"{label}  " if label else ""
        if self._console.is_terminal and not label:
            self._live = Live(console=self._console, refresh_per_second=4, transient=False)
            self._live.start()

    def write(self, line: Line) -> None:
        elapsed_s = time.perf_counter() - self._start_s
        steps = line["step"] - self._start_step
        left_s = elapsed_s / max(steps, 1) * (self._total_steps - line["step"])
        text = describe(line, self._total_steps, left_s=left_s, headline=self._headline)
        if self._live is None:
            self._console.print(
                f"{self._label}{text}", highlight=False, soft_wrap=True, markup=False
            )
        else:
            self._live.update(Text.assemble(_bar(line["step"], self._total_steps), " ", text))

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()


def describe(line: Line, total_steps: int, *, left_s: float, headline: str | None) -> str:
    """One line: step, loss, metrics, tokens/s, share of time waiting for data, time left."""
    loss = "skipped" if line["loss"] is None else f"loss {line['loss']:.4f}"
    shown = [headline] if headline is not None else list(line["metrics"])
    parts = [
        f"step {line['step']}/{total_steps}",
        loss,
        *(f"{name} {_show(line['metrics'].get(name))}" for name in shown),
        f"{line['tokens_per_s']:.0f} tokens/s",
        f"wait for data {100 * line['data_wait_share']:.0f}%",
        f"ETA {duration(left_s)}",
    ]
    return "  ".join(parts)


def duration(seconds: float) -> str:
    """h:mm:ss"""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def _show(value: float | list[float | None] | None) -> str:
    if isinstance(value, list):
        return " ".join(_show(v) for v in value)
    return "-" if value is None else f"{value:.3f}"


def _bar(step: int, total_steps: int, width: int = 24) -> str:
    filled = width * step // total_steps
    return "█" * filled + "░" * (width - filled)
