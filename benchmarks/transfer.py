"""Samples from one process to another on one host: wall time, latency, CPU, page faults, memory.

    python benchmarks/transfer.py [--json FILE] [--chart FILE.png] [--quick]
        [--producers N] [--consumers M] [--sizes MIB ...] [--ways NAME ...]

Our stores, what users have today, and two floors: `memcpy`, the copy into touched memory of the
same process, which nothing that copies is expected to beat by much, and `message-only`. All take
turns within one set of processes, after each has delivered the right bytes once, compared byte for
byte. In a round of a way every producer, with a store of its own, delivers a sample to every
consumer: input_ids, loss_mask and EAGLE-3's two features.

A delivery starts when the producer holds the sample in its own memory (in place: in the store's).
Its latency, `view`, ends when the consumer holds the tensors; the whole ends when a byte of every
page was read and the sample let go of (acknowledged, freed, its file removed). What is inside the
clock of each way is in the JSON (`clock`). GB/s: bytes of all deliveries of a round, from the
first start to the last end. CPU seconds, page faults: of all processes, preparations before the
clock left out; Mooncake's master is counted. Peak memory: of all processes, above what they held
before the way was set up; it counts shared pages once for each process, and files not at all.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from common import Report, Timing, Value, commit, machine
from transfer_engines import ENGINES
from transfer_peers import PEERS
from transfer_processes import Fleet, Round
from transfer_ways import MEMCPY, WAYS, Shared, Way

ALL_WAYS = (*WAYS, *PEERS, *ENGINES)
FLEETS = ((64, 1, 2), (64, 2, 2))
"""Sizes, producers and consumers of the full run besides one of each."""
ROUNDS = {1: 101, 64: 31, 256: 9}
OTHER_ROUNDS = 31
FLEET_ROUNDS = 9
QUICK_ROUNDS = 7
BUDGET_S = 3.0
QUICK_BUDGET_S = 0.5
"""A way that has had more than its share of this by a round leaves it out, after the first three:
those that are slow would take most of the time."""
LEAST_ROUNDS = 3
QUIET = {"GLOG_minloglevel": "2", "MC_LOG_LEVEL": "ERROR", "NIXL_LOG_LEVEL": "ERROR"}
"""What makes Mooncake and NIXL say less."""


@dataclass(frozen=True)
class Plan:
    """What is run with one set of processes. budget_s: of a way, before it leaves rounds out."""

    mib: int
    producers: int
    consumers: int
    rounds: int
    budget_s: float

    @property
    def case(self) -> str:
        alone = self.producers == self.consumers == 1
        return f"{self.mib} MiB" + ("" if alone else f" {self.producers}x{self.consumers}")


def measure(report: Report, ways: Sequence[Way], plan: Plan) -> None:
    """Adds a row for each way."""
    shared = Shared()
    try:
        fleet = Fleet(plan.mib, ways, shared, producers=plan.producers, consumers=plan.consumers)
        try:
            for way in ways:
                fleet.open(way)
            done = take_turns(fleet, ways, plan)
            fleet.close()
        finally:
            fleet.kill()
    finally:
        shared.close()
    floor_s = statistics.median(r.wall_s for r in done[MEMCPY.name])
    for way in ways:
        report.add(
            plan.case,
            way.name,
            timing_of(done[way.name]),
            fleet.peak_bytes[way.name],
            **columns(way, done[way.name], plan.mib, floor_s),
            protocol=fleet.protocols[way.name],
            verified_bytes=fleet.verified_bytes[way.name],
            producers=plan.producers,
            consumers=plan.consumers,
        )


def take_turns(fleet: Fleet, ways: Sequence[Way], plan: Plan) -> dict[str, list[Round]]:
    """By way: its rounds. The first of each, while setting up, is not among them."""
    done: dict[str, list[Round]] = {way.name: [] for way in ways}
    spent_s = dict.fromkeys(done, 0.0)
    for index in range(plan.rounds):
        share_s = plan.budget_s * (index + 1) / plan.rounds
        for way in ways:
            if index >= LEAST_ROUNDS and spent_s[way.name] > share_s:
                continue
            start = time.perf_counter()
            done[way.name] += [fleet.round(way) for _ in range(way.turns)]
            spent_s[way.name] += time.perf_counter() - start
    return done


def timing_of(rounds: Sequence[Round]) -> Timing:
    wall = [r.wall_s for r in rounds]
    first, _, third = statistics.quantiles(wall, n=4, method="inclusive")
    cpu = tuple(r.cost.cpu_s for r in rounds)
    return Timing(statistics.median(wall), third - first, statistics.median(cpu), len(wall), cpu)


def columns(way: Way, rounds: Sequence[Round], mib: int, floor_s: float) -> dict[str, Value]:
    """What the report says besides `Timing`. Latencies in microseconds; faults of a delivery."""
    wall = [r.wall_s for r in rounds]
    deliveries = [d for r in rounds for d in r.deliveries]
    per_round = len(rounds[0].deliveries)
    gigabytes = per_round * (mib << 20) / 1e9
    views = sorted(d.view_s * 1e6 for d in deliveries)
    out: dict[str, Value] = {
        "gb_per_s": None,
        "best_gb_per_s": None,
        "share_of_floor": None,
        "cpu_s_per_gb": statistics.median(r.cost.cpu_s for r in rounds) / gigabytes,
        "view_p50_us": statistics.median(views),
        "view_p99_us": views[math.ceil(0.99 * len(views)) - 1],
        "minor_faults": statistics.median(r.cost.minor_faults for r in rounds) / per_round,
        "major_faults": statistics.median(r.cost.major_faults for r in rounds) / per_round,
    }
    if way.moves:
        median_s = statistics.median(wall)
        out |= {
            "gb_per_s": gigabytes / median_s,
            "best_gb_per_s": gigabytes / min(wall),
            "share_of_floor": floor_s / median_s,
        }
    return out


def line(row: dict[str, Value]) -> str:
    """A row in print."""

    def number(key: str, form: str) -> str:
        value = row[key]
        return format("-" if value is None else value, form if value is not None else ">6")

    return (
        f"{row['case']!s:<12} {row['impl']!s:<27} {number('gb_per_s', '6.2f')} GB/s "
        f"(best {number('best_gb_per_s', '6.2f')})  x{number('share_of_floor', '6.3f')} of memcpy  "
        f"{number('cpu_s_per_gb', '6.3f')} CPU s/GB  view p50 {number('view_p50_us', '8.0f')} "
        f"p99 {number('view_p99_us', '8.0f')} us  faults {number('minor_faults', '7.0f')}"
        f"+{number('major_faults', '.0f')}  peak {float(row['peak_bytes'] or 0) / 2**20:5.0f} MiB  "
        f"{row['protocol']}  {float(row['verified_bytes'] or 0) / 2**20:.0f} MiB compared"
    )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results here too")
    parser.add_argument("--chart", type=Path, metavar="FILE.png", help="and draw them (matplotlib)")
    parser.add_argument("--quick", action="store_true", help="64 MiB, few rounds, within 25 s")
    parser.add_argument("--producers", type=int, default=1, metavar="N")
    parser.add_argument("--consumers", type=int, default=1, metavar="M")
    parser.add_argument("--sizes", type=int, nargs="+", metavar="MIB")
    names = [way.name for way in ALL_WAYS]
    parser.add_argument("--ways", nargs="+", choices=names, metavar="NAME", help=", ".join(names))
    return parser.parse_args()


def plans(args: argparse.Namespace) -> list[Plan]:
    budget_s = QUICK_BUDGET_S if args.quick else BUDGET_S
    sizes = args.sizes or ([64] if args.quick else list(ROUNDS))
    fleet = (args.producers, args.consumers)
    out = []
    for mib in sizes:
        rounds = QUICK_ROUNDS if args.quick else ROUNDS.get(mib, OTHER_ROUNDS)
        out.append(Plan(mib, *fleet, rounds, budget_s))
    if not args.quick and args.sizes is None and fleet == (1, 1):
        out += [Plan(*more, FLEET_ROUNDS, budget_s) for more in FLEETS]
    return out


def main() -> None:
    args = arguments()
    torch.set_num_threads(1)
    for name in QUIET:
        os.environ.setdefault(name, QUIET[name])
    chosen = [w for w in ALL_WAYS if w is MEMCPY or args.ways is None or w.name in args.ways]
    absent = {way.name: reason for way in chosen if (reason := way.absent()) is not None}
    ways = [way for way in chosen if way.name not in absent]
    report = Report("transfer", baseline=MEMCPY.name, line=line)
    report.notes["clock"] = {way.name: way.clock for way in chosen}
    report.notes["absent"] = absent
    for name, reason in absent.items():
        print(f"absent: {name}: {reason}", flush=True)
    for plan in plans(args):
        measure(report, ways, plan)
    if args.json is not None:
        report.write(args.json)
    if args.chart is not None:
        from transfer_chart import draw  # matplotlib is an extra

        draw(report.rows, args.chart, f"{machine()}, commit {commit()}")


if __name__ == "__main__":
    main()
