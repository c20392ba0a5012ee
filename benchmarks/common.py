"""What every benchmark shares: the header, interleaved timing, peak memory, one shape of JSON.

A benchmark compares results first, then times the implementations in turns within one process, and
measures the peak memory of each in a process of its own: `BenchScript.peak_bytes` starts the script
again with `--peak CASE IMPL`, whose answer is one line of JSON.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
PEAK_TIMEOUT_S = 600.0

Value = str | int | float | None


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: median, spread (third minus first quartile) and process CPU time."""

    median_s: float
    spread_s: float
    cpu_s: float
    rounds: int
    cpu_each_s: tuple[float, ...] = ()

    def cpu_over(self, other: Timing) -> float:
        """Median over rounds of this CPU time over the other's in the same round."""
        pairs = zip(self.cpu_each_s, other.cpu_each_s, strict=True)
        return statistics.median(mine / theirs for mine, theirs in pairs)


def time_interleaved(
    impls: Mapping[str, Callable[[], object]], *, rounds: int, warmup: int = 1
) -> dict[str, Timing]:
    """Times every implementation once per round, in turns, so that a noisy minute hits all alike.

    CPU seconds are those of the whole process (all threads), median over rounds.
    """
    wall: dict[str, list[float]] = {name: [] for name in impls}
    cpu: dict[str, list[float]] = {name: [] for name in impls}
    for round_index in range(-warmup, rounds):
        for name, call in impls.items():
            gc.collect()
            _synchronize()
            wall_start, cpu_start = time.perf_counter(), time.process_time()
            call()
            _synchronize()
            if round_index >= 0:
                wall[name].append(time.perf_counter() - wall_start)
                cpu[name].append(time.process_time() - cpu_start)
    return {
        name: Timing(
            median_s=statistics.median(wall[name]),
            spread_s=_quartile_range(wall[name]),
            cpu_s=statistics.median(cpu[name]),
            rounds=rounds,
            cpu_each_s=tuple(cpu[name]),
        )
        for name in impls
    }


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _quartile_range(values: list[float]) -> float:
    if len(values) < 2:
        return 0.0
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return third - first


class PeakMeter:
    """Peak memory above what the process holds when the meter is made (make it after the imports).

    On the CPU: high-water mark of the resident set minus its size at the start. On a CUDA device:
    the peak of torch's allocator there.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        gc.collect()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        else:
            _forget_high_water_mark()
        self._baseline = 0 if device.type == "cuda" else _status_bytes("VmRSS")

    def bytes(self) -> int:
        if self._device.type == "cuda":
            _synchronize()
            return int(torch.cuda.max_memory_allocated(self._device))
        # Not getrusage: its maximum survives exec, and so holds what the parent held.
        return _status_bytes("VmHWM") - self._baseline


def _forget_high_water_mark() -> None:
    """VmHWM becomes VmRSS, after memory that was freed went back to the system."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def _status_bytes(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {key}: peak memory needs Linux")


def machine() -> str:
    """CPU, cores and threads in use, torch, and the GPU with its driver if there is one."""
    parts = [_cpu_name(), f"{os.cpu_count()} cores", f"{torch.get_num_threads()} threads"]
    parts += [f"torch {torch.__version__}", f"Python {platform.python_version()}"]
    if torch.cuda.is_available():
        parts += [torch.cuda.get_device_name(), f"driver {_driver()}"]
    return ", ".join(parts)


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]


def commit() -> str:
    """Short hash of HEAD, with "+changes" if the tree differs; "unknown" outside a checkout."""

    def git(*args: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, check=False)

    head = git("rev-parse", "--short", "HEAD")
    if head.returncode != 0:
        return "unknown"
    changed = git("status", "--porcelain", "--untracked-files=no").stdout.strip()
    return head.stdout.strip() + ("+changes" if changed else "")


@dataclass
class Report:
    """Rows of results, printed as they come; `write` stores them as JSON.

    line: how a row is printed, if not as all benchmarks do. notes: more keys of the JSON.
    """

    bench: str
    baseline: str
    rows: list[dict[str, Value]] = field(default_factory=list)
    line: Callable[[dict[str, Value]], str] | None = None
    notes: dict[str, Mapping[str, str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        print(f"# {self.bench} | {machine()} | commit {commit()}", flush=True)

    def add(
        self, case: str, impl: str, timing: Timing, peak_bytes: int | None, **extra: Value
    ) -> None:
        """One row per (case, impl); the printed ratio is to the baseline's row of the case."""
        row: dict[str, Value] = {
            "case": case,
            "impl": impl,
            "median_s": timing.median_s,
            "spread_s": timing.spread_s,
            "cpu_s": timing.cpu_s,
            "peak_bytes": peak_bytes,
            "rounds": timing.rounds,
            **extra,
        }
        self.rows.append(row)
        print((self.line or self._line)(row), flush=True)

    def _line(self, row: dict[str, Value]) -> str:
        peak = row["peak_bytes"]
        text = (
            f"{row['case']!s:<34} {row['impl']!s:<22} {row['median_s']:9.4f} s "
            f"+-{row['spread_s']:.4f}  cpu {row['cpu_s']:8.4f} s  "
            f"peak {'-' if peak is None else f'{int(peak) / 2**20:.0f} MiB':>9}"
        )
        base = [r for r in self.rows if r["case"] == row["case"] and r["impl"] == self.baseline]
        if base and base[0] is not row:
            text += f"  cpu x{_ratio(base[0]['cpu_s'], row['cpu_s']):.2f} of {self.baseline}"
        if row.get("share_of_floor"):
            text += f"  floor/it {_ratio(row['share_of_floor'], 1.0):.0%}"
        return text

    def write(self, path: Path) -> None:
        content = {
            "bench": self.bench,
            "machine": machine(),
            "commit": commit(),
            "baseline": self.baseline,
            **self.notes,
            "rows": self.rows,
        }
        path.write_text(json.dumps(content, indent=1) + "\n")


def _ratio(value: Value, to: Value) -> float:
    return float(value or 0.0) / max(float(to or 0.0), 1e-12)


class BenchScript:
    """Command line of a benchmark: --json, --quick, and hidden: --case CASE, --peak CASE IMPL."""

    def __init__(self, description: str) -> None:
        parser = argparse.ArgumentParser(description=description)
        parser.add_argument("--json", type=Path, metavar="FILE", help="write the results here too")
        parser.add_argument("--quick", action="store_true", help="fewer cases, within 40 s")
        parser.add_argument("--case", help=argparse.SUPPRESS)
        parser.add_argument("--peak", nargs=2, metavar=("CASE", "IMPL"), help=argparse.SUPPRESS)
        args = parser.parse_args()
        self.json: Path | None = args.json
        self.quick: bool = args.quick
        self.case: str | None = args.case
        self.peak: tuple[str, str] | None = tuple(args.peak) if args.peak else None

    def answer_peak(self, call: Callable[[], object], device: torch.device) -> None:
        """In the child: runs `call` (inputs included) and prints its peak."""
        meter = PeakMeter(device)
        call()
        print(json.dumps({"peak_bytes": meter.bytes()}))

    def peak_bytes(self, case: str, impl: str) -> int:
        """In the parent: the peak of one implementation, from a fresh process."""
        command = [sys.executable, str(Path(sys.argv[0]).resolve()), "--peak", case, impl]
        if self.quick:
            command.append("--quick")
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=PEAK_TIMEOUT_S, check=False
        )
        if done.returncode != 0:
            raise RuntimeError(
                f"measuring the peak memory of {impl} on {case} failed:\n{done.stderr}"
            )
        return int(json.loads(done.stdout.splitlines()[-1])["peak_bytes"])
