"""The chart of `transfer.py`: GB/s by way and size. Needs matplotlib: the extra `bench`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import StrMethodFormatter

from common import Value

Rows = Sequence[dict[str, Value]]
COLOURS = ("#9ecae1", "#3182bd", "#08306b")
PEER_COLOURS = ("#d9d9d9", "#969696", "#525252")
OURS = "specforge_ext"


def draw(rows: Rows, path: Path, note: str) -> None:
    """One bar for each way and size of the cases with one producer and one consumer."""
    matplotlib.use("Agg")
    rates = {
        (str(row["impl"]), str(row["case"])): float(row["gb_per_s"])
        for row in rows
        if row["gb_per_s"] is not None and "x" not in str(row["case"])
    }
    sizes = list(dict.fromkeys(case for _, case in rates))
    names = sorted({name for name, _ in rates}, key=lambda name: _largest(rates, name, sizes))
    figure = Figure(figsize=(9, 1.2 + 0.16 * len(names) * (len(sizes) + 1)), layout="constrained")
    axes = figure.add_subplot()
    height = 0.8 / len(sizes)
    for index, size in enumerate(sizes):
        for at, name in enumerate(names):
            if (name, size) not in rates:
                continue
            shades = COLOURS if name.startswith(OURS) else PEER_COLOURS
            y = at + 0.4 - (index + 0.5) * height
            axes.barh(y, rates[name, size], height, color=shades[index % len(shades)])
            axes.text(rates[name, size] * 1.03, y, f"{rates[name, size]:.2g}", va="center", size=7)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(-0.6, len(names) - 0.4)
    axes.set_xscale("log")
    axes.set_xlim(min(rates.values()) * 0.7, max(rates.values()) * 1.6)
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.set_xlabel(f"GB/s, median (log scale)\n{note}", size=8)
    axes.set_title(
        f"A sample from one process to another: until read and let go of\n"
        f"from above: {', '.join(sizes)}; ours in blue",
        size=10,
    )
    axes.grid(axis="x", which="both", alpha=0.25)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(path, dpi=130)


def _largest(rates: dict[tuple[str, str], float], name: str, sizes: Sequence[str]) -> float:
    """Of the size that comes closest to 64 MiB among the benchmark's: its middle one."""
    middle = sizes[len(sizes) // 2]
    return rates.get((name, middle), max(rates.get((name, size), 0.0) for size in sizes))
