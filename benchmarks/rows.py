"""The row losses alone: logits of students become their gradient, with loss and statistics.

    OMP_NUM_THREADS=1 python benchmarks/rows.py [--json FILE] [--quick]

One thread. Seven students share a teacher. `l2`: 7 rows, ten times in a row, so that they stay in
the cache; `memory`: 64 MB of them. `memcpy` copies the rows, the floor of everything that reads and
writes them once; `log-softmax` is torch's log_softmax and softmax of the same rows, without a loss;
`torch-eager` is the definition in torch. Every call but the first works on the gradient of the last
one: the values change no timing, and results are compared beforehand. `ns_per_element` is CPU time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from common import BenchScript, Report, time_interleaved
from specforge_ext import _C
from specforge_ext.ops import reference

VOCAB, SHARE, REPEATS = 32000, 7, 10
BASELINE = "memcpy"
KINDS = ("soft_ce", "hard_ce", "reverse_kl", "lk_alpha", "lk_lambda", "l1", "jsd")
RESULTS = ("loss", "accepted", "top_prob", "entropy")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Rows:
    logits: Tensor
    teacher: Tensor
    target: Tensor
    sides: dict[str, Tensor]


def make_rows(dtype: torch.dtype, place: str, kind: str) -> Rows:
    num_rows = SHARE if place == "l2" else (64 << 20) // (VOCAB * dtype.itemsize) // SHARE * SHARE
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(num_rows, VOCAB, generator=generator) * 3).to(dtype)
    teacher = (torch.randn(num_rows // SHARE, VOCAB, generator=generator) * 3).to(dtype)
    sides = {
        "row_to_teacher": torch.arange(num_rows, dtype=torch.int32) // SHARE,
        "weight": torch.ones(num_rows),
    }
    if kind == "hard_ce":
        sides["label"] = torch.zeros(num_rows // SHARE, dtype=torch.int32)
    if kind == "lk_lambda":
        sides["kl_weight"] = torch.full((num_rows,), 0.5)
    return Rows(logits, teacher, torch.empty_like(logits), sides)


def check(rows: Rows, kind: str) -> None:
    """Raises unless the first rows agree with the definition in float64."""
    few = {k: v[:1] if k == "label" else v[:SHARE] for k, v in rows.sides.items()}
    first = Rows(rows.logits[:SHARE], rows.teacher[:1], rows.target[:SHARE], few)
    exact = {k: v.double() if v.is_floating_point() else v for k, v in few.items()}
    teacher = None if kind == "hard_ce" else first.teacher.double()
    want = reference.loss_rows(first.logits.double(), teacher, loss=kind, **exact)
    logits = first.logits.clone()
    loss_rows(first, kind, logits)
    torch.testing.assert_close(logits.double(), want.gradient, rtol=1e-2, atol=1e-6)


def loss_rows(rows: Rows, kind: str, logits: Tensor) -> None:
    """The native kernel: the torch op around it costs as much again where rows are few."""
    results = {name: torch.empty(logits.shape[0]) for name in RESULTS}
    _C.loss_rows(
        logits,
        None if kind == "hard_ce" else rows.teacher,
        **rows.sides,
        **results,
        correct=torch.empty(logits.shape[0], dtype=torch.uint8),
        kind=kind,
        temperature=1.0,
        beta=0.5,
        hard_weight=0.0,
        writes_gradient=True,
    )


def implementations(rows: Rows, kind: str, place: str) -> dict[str, Callable[[], object]]:
    impls: dict[str, Callable[[], object]] = {
        "memcpy": lambda: rows.target.copy_(rows.logits),
        "specforge_ext": lambda: loss_rows(rows, kind, rows.target),
    }
    if kind == "soft_ce" and place == "l2":
        impls["log-softmax"] = lambda: (rows.logits.log_softmax(-1), rows.logits.softmax(-1))
        impls["torch-eager"] = lambda: reference.loss_rows(
            rows.logits.float(), rows.teacher.float(), loss=kind, **rows.sides
        )
    return impls


def bench_case(report: Report, dtype: str, place: str, kind: str, rounds: int) -> None:
    rows = make_rows(DTYPES[dtype], place, kind)
    check(rows, kind)
    repeats = REPEATS if place == "l2" else 1

    def repeated(call: Callable[[], object]) -> Callable[[], object]:
        return lambda: [call() for _ in range(repeats)]

    impls = implementations(rows, kind, place)
    timings = time_interleaved({k: repeated(v) for k, v in impls.items()}, rounds=rounds)
    for name, timing in timings.items():
        per_element = timing.cpu_s * 1e9 / rows.logits.numel() / repeats
        report.add(f"{kind}/{dtype}/{place}", name, timing, None, ns_per_element=per_element)
        print(f"{'':<34} {per_element:.3f} ns per element", flush=True)


def main() -> None:
    script = BenchScript(__doc__ or "")
    torch.set_num_threads(1)
    report = Report("rows", BASELINE)
    rounds = 3 if script.quick else 15
    for dtype in DTYPES:
        for place in ("l2", "memory"):
            for kind in KINDS[:1] if script.quick or place == "memory" else KINDS:
                bench_case(report, dtype, place, kind, rounds)
    if script.json:
        report.write(script.json)


if __name__ == "__main__":
    main()
