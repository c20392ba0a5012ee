"""Times the row kernel of the draft losses on a GPU against a device copy of the same bytes.

    python tools/rows_bandwidth.py [--quick] [--json FILE]

Checked against the float64 definition before it is timed. Bytes of a row: both rows in, one out.
share_of_floor: rate of the kernel over that of the copy, both measured here, interleaved.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from emulated import LOSS_KINDS, RowResults
from loss_rows_cases import check, make_case
from specforge_ext import ops

BYTES_PER_TENSOR = 1 << 30
REPEATS = 30


def milliseconds(call: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def check_kind(kind: str, vocab: int) -> None:
    case = make_case(kind, 6, vocab, dtype=torch.bfloat16, gives_lse=True)
    logits = case.logits.cuda()
    teacher = None if case.teacher is None else case.teacher.cuda()
    out = ops.loss_rows_(
        logits,
        teacher,
        loss=ops.RowLoss(kind, beta=case.beta),
        row_to_teacher=case.row_to_teacher.cuda(),
        weight=case.weight.cuda(),
        **{name: tensor.cuda() for name, tensor in case.options.items()},
    )
    results = (out.loss, out.accepted, out.correct, out.top_prob, out.entropy)
    check(case, RowResults(*(x.cpu() for x in results)), logits.cpu())


def measure(kind: str, vocab: int, repeats: int) -> list[dict[str, str | float]]:
    """One row for the kernel and one for the copy."""
    check_kind(kind, vocab)
    rows = BYTES_PER_TENSOR // (2 * vocab)
    like = {"dtype": torch.bfloat16, "device": "cuda"}
    logits, teacher = torch.randn(rows, vocab, **like), torch.randn(rows, vocab, **like)
    index = torch.arange(rows, dtype=torch.int32, device="cuda")
    weight = torch.full((rows,), 1e-3, device="cuda")
    options: dict[str, Tensor] = {}
    if kind == "hard_ce":
        options["label"] = index % vocab
    else:
        options["teacher_lse"] = torch.full((rows,), 20.0, device="cuda")
    if kind == "lk_lambda":
        options["kl_weight"] = torch.full((rows,), 0.5, device="cuda")
    teacher_or_none = None if kind == "hard_ce" else teacher

    def kernel() -> None:
        ops.loss_rows_(
            logits, teacher_or_none, loss=kind, row_to_teacher=index, weight=weight, **options
        )

    calls = {"specforge_ext": kernel, "memcpy": lambda: logits.copy_(teacher)}
    tensors = {"specforge_ext": 2 if kind == "hard_ce" else 3, "memcpy": 2}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            times[name].append(milliseconds(call))
    median = {name: statistics.median(values[repeats // 5 :]) for name, values in times.items()}
    moved = rows * vocab * 2
    rate = {name: tensors[name] * moved / median[name] / 1e6 for name in calls}
    return [
        {
            "case": f"{kind}/{vocab}",
            "impl": name,
            "median_s": median[name] / 1e3,
            "gb_per_s": rate[name],
            "share_of_floor": rate[name] / rate["memcpy"],
        }
        for name in calls
    ]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer repeats and kinds")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("rows_bandwidth: torch sees no CUDA device", file=sys.stderr)
        return 2
    commit = subprocess.run(
        ["git", "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, timeout=10
    ).stdout.strip()
    machine = torch.cuda.get_device_name()
    print(f"{machine}, torch {torch.__version__}, commit {commit or 'unknown'}")
    kinds = ("soft_ce", "jsd") if options.quick else LOSS_KINDS
    rows = []
    for vocab in (32000, 151936):
        for kind in kinds:
            rows += measure(kind, vocab, 10 if options.quick else REPEATS)
    for row in rows:
        numbers = f"{row['median_s']:.6f} s {row['gb_per_s']:7.0f} GB/s"
        print(f"{row['case']:20} {row['impl']:14} {numbers} {row['share_of_floor']:.2f} of a copy")
    if options.json:
        text = {"bench": "rows", "machine": machine, "commit": commit, "rows": rows}
        options.json.write_text(json.dumps(text, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
