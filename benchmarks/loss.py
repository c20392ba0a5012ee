"""The loss of an EAGLE-3 step, forward and backward, from hidden states to their gradients.

    python benchmarks/loss.py [--json FILE] [--quick]

256 packed tokens (96 with --quick), 7 TTT steps, 60 % of the tokens scored, width 512. Every
implementation gives the loss, its gradients in hidden and head, and the sums per step of loss,
accepted mass and correct rows; loss and gradients are compared with float64 before anything is
timed. Peers compute all rows and multiply by a mask, as people run them; `-compacted` and
`torch-chunked` are given the rows that count, as we are. `gemm-floor` is our matrix products alone,
same shapes, into memory that exists. Peak memory is that of a second call, above its inputs.

Cases: draft16000 / full32000: words of the draft, of the target's 32000. hard_ce: labels instead of
a teacher, all weights 1. no-native-bf16: 16 tokens, on a CPU made to look like one with AVX2 only
(DNNL_MAX_CPU_ISA, ATEN_CPU_CAPABILITY and our set_isa), where torch emulates bf16 products.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import loss_peers as peers
from common import BenchScript, Report, time_interleaved
from loss_peers import STEPS, Loss, Rows
from specforge_ext import _C, ops
from specforge_ext.ops import reference
from specforge_ext.ops._chunks import cut, default_workspace_bytes
from specforge_ext.ops._matmul import logits_dtype

TOKENS, QUICK_TOKENS, VOCAB = 256, 96, 32000
OURS, FLOOR, BASELINE = "specforge_ext", "gemm-floor", "torch-eager"


@dataclass(frozen=True)
class Case:
    dtype: torch.dtype
    draft_vocab: int
    tokens: int = TOKENS
    hard: bool = False
    only_avx2: bool = False


CASES = {
    "float32/draft16000": Case(torch.float32, 16000),
    "bfloat16/draft16000": Case(torch.bfloat16, 16000),
    "float32/full32000": Case(torch.float32, VOCAB),
    "bfloat16/full32000": Case(torch.bfloat16, VOCAB),
    "float32/hard_ce": Case(torch.float32, VOCAB, hard=True),
    "bfloat16/no-native-bf16": Case(torch.bfloat16, VOCAB, tokens=16, only_avx2=True),
}
QUICK_CASES = ("float32/draft16000",)
ONLY_AVX2 = {"DNNL_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
CASE_TIMEOUT_S = 1800.0


@dataclass(frozen=True)
class Result:
    loss: Tensor
    hidden_grad: Tensor
    head_grad: Tensor


def native_loss(rows: Rows) -> tuple[Tensor, Tensor]:
    out = ops.draft_loss(
        rows.hidden,
        rows.head,
        rows.teacher_hidden,
        rows.teacher_head,
        rows.teacher_lse,
        row_to_teacher=rows.row_to_teacher,
        row_weight=rows.row_weight,
        row_step=rows.row_step,
        num_steps=STEPS,
    )
    sums = (out.step_loss, out.step_correct, out.step_accepted, out.step_rows)
    return out.loss_sum, torch.stack(sums)


def native_hard_loss(rows: Rows) -> tuple[Tensor, Tensor]:
    out = ops.draft_loss(
        rows.hidden,
        rows.head,
        loss="hard_ce",
        row_to_teacher=rows.row_to_teacher,
        row_weight=rows.row_weight,
        row_step=rows.row_step,
        num_steps=STEPS,
        label=rows.label,
    )
    sums = (out.step_loss, out.step_correct, out.step_accepted, out.step_rows)
    return out.loss_sum, torch.stack(sums)


def gemm_floor(rows: Rows, *, hard: bool) -> Callable[[], None]:
    """The matrix products of `specforge_ext` on this case, and nothing else."""
    hidden, head = rows.hidden.detach(), rows.head.detach()
    dtype, vocab = logits_dtype(hidden), head.shape[0]
    hidden, head = hidden.to(dtype), head.to(dtype)
    teacher_hidden, teacher_head = rows.teacher_hidden.to(dtype), rows.teacher_head.to(dtype)
    chunks = cut(
        rows.row_to_teacher,
        row_bytes=vocab * dtype.itemsize,
        teacher_bytes=0 if hard else vocab * dtype.itemsize,
        workspace_bytes=default_workspace_bytes(hidden.device, vocab=vocab),
    )
    logits = torch.full((max(c.num_rows for c in chunks), vocab), 1e-3, dtype=dtype)
    teacher = torch.zeros(max(c.num_teachers for c in chunks), vocab, dtype=dtype)
    hidden_grad, head_grad = torch.zeros_like(hidden), torch.zeros_like(head)

    def run() -> None:
        for chunk in chunks:
            chunk_logits, chunk_hidden = logits[: chunk.num_rows], hidden[chunk.rows]
            torch.mm(chunk_hidden, head.t(), out=chunk_logits)
            if not hard:
                out = teacher[: chunk.num_teachers]
                torch.mm(teacher_hidden[chunk.teachers], teacher_head.t(), out=out)
            torch.mm(chunk_logits, head, out=hidden_grad[chunk.rows])
            if chunk is chunks[0] or dtype != torch.float32:
                torch.mm(chunk_logits.t(), chunk_hidden, out=head_grad)
            else:
                head_grad.addmm_(chunk_logits.t(), chunk_hidden)

    return run


def implementations(case: Case) -> dict[str, Loss]:
    if case.hard:
        return {
            OURS: native_hard_loss,
            "torch-eager-compacted": peers.hard_eager(),
            "torch-linear-cross-entropy": peers.linear_cross_entropy(),
        }
    if case.only_avx2:
        return {
            OURS: native_loss,
            BASELINE: peers.eager(),
            "torch-eager-compacted": peers.eager_compacted(),
        }
    return {
        OURS: native_loss,
        BASELINE: peers.eager(),
        "torch-compile": peers.compiled(),
        "specforge": peers.specforge(),
        "torch-eager-compacted": peers.eager_compacted(),
        "torch-compile-compacted": peers.compiled_compacted(),
        "torch-chunked": peers.chunked(),
    }


def make_rows(case: Case, *, quick: bool) -> Rows:
    return peers.make_rows(
        tokens=min(case.tokens, QUICK_TOKENS) if quick else case.tokens,
        dtype=case.dtype,
        draft_vocab=case.draft_vocab,
        vocab=VOCAB,
        decay=1.0 if case.hard else peers.DECAY,
    )


def run(loss: Loss, rows: Rows) -> Result:
    """Gradients in what the implementation was given: `all_hidden`, or `hidden`."""
    value, _ = loss(rows)
    grads = torch.autograd.grad(value, (rows.hidden, rows.all_hidden, rows.head), allow_unused=True)
    hidden = grads[0] if grads[0] is not None else grads[1]
    return Result(value.detach(), hidden, grads[2])


def truth(rows: Rows, *, hard: bool) -> Result:
    """The definition in float64 (of float64 copies of the same values)."""
    hidden, head = (x.detach().double().requires_grad_() for x in (rows.hidden, rows.head))
    if hard:
        label = rows.label[rows.row_to_teacher.long()].long()
        loss = torch.nn.functional.cross_entropy(hidden @ head.T, label, reduction="sum")
    else:
        loss = reference.draft_loss(
            hidden,
            head,
            rows.teacher_hidden.double(),
            rows.teacher_head.double(),
            rows.teacher_lse.double(),
            row_to_teacher=rows.row_to_teacher,
            row_weight=rows.row_weight.double(),
            row_step=rows.row_step,
            num_steps=STEPS,
        ).loss_sum
    return Result(loss.detach(), *torch.autograd.grad(loss, (hidden, head)))


def relative_errors(got: Result, want: Result, rows: Rows) -> dict[str, float]:
    """Of loss and gradients: largest difference over largest magnitude."""

    def error(a: Tensor, b: Tensor) -> float:
        return float((a.detach().double() - b).abs().max() / b.abs().max())

    hidden_grad = got.hidden_grad
    if hidden_grad.dim() == 3:  # of all rows: those that do not count must have none
        hidden_grad = hidden_grad.flatten(0, 1)
        others = hidden_grad.clone()
        others[rows.place] = 0
        if others.any():
            raise RuntimeError("rows that are masked have a gradient")
        hidden_grad = hidden_grad[rows.place]
    return {
        "loss_error": error(got.loss, want.loss),
        "hidden_grad_error": error(hidden_grad, want.hidden_grad),
        "head_grad_error": error(got.head_grad, want.head_grad),
    }


def check(
    name: str, rows: Rows, impls: Mapping[str, Callable[[], Result]], *, hard: bool
) -> dict[str, dict[str, float]]:
    """Errors against float64 of every implementation. Raises if one computes something else."""
    tolerance = 1e-4 if rows.hidden.dtype == torch.float32 else 3e-2
    want = truth(rows, hard=hard)
    errors = {impl: relative_errors(call(), want, rows) for impl, call in impls.items()}
    for impl, values in errors.items():
        if max(values.values()) > tolerance:
            raise RuntimeError(f"{name}: {impl} is off by {values}, wanted at most {tolerance}")
    return errors


def bench_case(script: BenchScript, report: Report, name: str) -> None:
    case = CASES[name]
    rows = make_rows(case, quick=script.quick)
    impls = {
        impl: (lambda loss=loss: run(loss, rows)) for impl, loss in implementations(case).items()
    }
    errors = check(name, rows, impls, hard=case.hard)
    floor = gemm_floor(rows, hard=case.hard)
    timings = time_interleaved(
        {FLOOR: floor, **impls}, rounds=3 if script.quick or case.only_avx2 else 7
    )
    order = (BASELINE, *(impl for impl in impls if impl != BASELINE))
    for impl in (*(impl for impl in order if impl in impls), FLOOR):
        report.add(
            name,
            impl,
            timings[impl],
            None if impl == FLOOR else script.peak_bytes(name, impl),
            rows=rows.hidden.shape[0],
            share_of_floor=timings[FLOOR].cpu_over(timings[impl]),
            cpu_over_ours=timings[impl].cpu_over(timings[OURS]),
            **errors.get(impl, {}),
        )
    summarize(report, name)


def summarize(report: Report, name: str) -> None:
    rows = {str(row["impl"]): row for row in report.rows if row["case"] == name}
    ours = rows.pop(OURS)
    times = [f"{impl} x{float(row['cpu_over_ours'] or 0):.2f}" for impl, row in rows.items()]
    peaks = [
        f"{impl} x{int(row['peak_bytes']) / int(ours['peak_bytes'] or 1):.1f}"
        for impl, row in rows.items()
        if row["peak_bytes"]
    ]
    print(f"{name}: their CPU time over ours, round by round: {', '.join(times)}")
    print(f"{name}: their extra memory over ours: {', '.join(peaks)}", flush=True)


def bench_in_child(script: BenchScript, report: Report, name: str) -> None:
    """A case that needs another CPU: its environment counts only from the start of a process."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows.json"
        command = [sys.executable, __file__, "--case", name, "--json", str(out)]
        env = {**os.environ, **ONLY_AVX2}
        subprocess.run(command, env=env, timeout=CASE_TIMEOUT_S, check=True)
        report.rows += json.loads(out.read_text())["rows"]


def measure_peak(script: BenchScript, name: str, impl: str) -> None:
    """Of a call that is not the first, so that what libraries and compilers keep does not count."""
    case = CASES[name]
    rows, loss = make_rows(case, quick=script.quick), implementations(case)[impl]
    run(loss, rows)
    script.answer_peak(lambda: run(loss, rows), torch.device("cpu"))


def main() -> None:
    script = BenchScript(__doc__ or "")
    only = script.peak[0] if script.peak else script.case
    if only and CASES[only].only_avx2:
        _C.set_isa("avx2")
    if script.peak:
        measure_peak(script, *script.peak)
        return
    report = Report("loss", BASELINE)
    for name in [only] if only else QUICK_CASES if script.quick else CASES:
        if CASES[name].only_avx2 and not script.case:
            bench_in_child(script, report, name)
        else:
            bench_case(script, report, name)
        if script.json:  # after every case: the whole run takes long
            report.write(script.json)


if __name__ == "__main__":
    main()
