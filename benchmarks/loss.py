"""The loss of an EAGLE-3 step, forward and backward, from hidden states to their gradients.

    python benchmarks/loss.py [--json FILE] [--quick]

Every implementation gets the same rows (256 packed tokens, 96 with --quick; 7 TTT steps; 60 % of
the tokens scored, the other rows left out already) and gives the loss, its gradients in hidden and
head, and the sums per step of loss, accepted mass and correct rows. Loss and gradients are compared
with float64 before anything is timed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from common import BenchScript, Report, time_interleaved
from specforge_ext import ops
from specforge_ext.ops import reference

TOKENS, QUICK_TOKENS, WIDTH, STEPS, SCORED = 256, 96, 512, 7, 0.6
VOCAB, DRAFT_VOCAB = 32000, 16000
CHUNK_ROWS = 256
"""Rows per checkpoint of torch-chunked: 16 MB of float32 logits with the draft's vocabulary."""

CASES = {
    "float32/draft16000": (torch.float32, DRAFT_VOCAB),
    "bfloat16/draft16000": (torch.bfloat16, DRAFT_VOCAB),
    "float32/full32000": (torch.float32, VOCAB),
    "bfloat16/full32000": (torch.bfloat16, VOCAB),
}
QUICK_CASES = ("float32/draft16000",)
BASELINE = "torch-eager"


@dataclass(frozen=True)
class Rows:
    """N rows of all steps in order of their teacher, R teachers; vocabulary V of the draft."""

    hidden: Tensor  # [N, WIDTH]
    head: Tensor  # [V, WIDTH]
    teacher_hidden: Tensor  # [R, WIDTH]
    teacher_head: Tensor  # [V, WIDTH]
    teacher_lse: Tensor  # [R] float32, over VOCAB
    row_to_teacher: Tensor  # [N] int32
    row_weight: Tensor  # [N] float32
    row_step: Tensor  # [N] int32


@dataclass(frozen=True)
class Result:
    loss: Tensor
    hidden_grad: Tensor
    head_grad: Tensor


def make_rows(case: str, *, quick: bool) -> Rows:
    dtype, draft_vocab = CASES[case]
    tokens = QUICK_TOKENS if quick else TOKENS
    generator = torch.Generator().manual_seed(0)
    mask = (torch.rand(tokens, generator=generator) < SCORED).to(torch.uint8)
    mask[-1] = 0
    maps = ops.ttt_maps(mask, torch.tensor([0, tokens], dtype=torch.int32), STEPS)

    def randn(rows: int, scale: float) -> Tensor:
        return torch.randn(rows, WIDTH, generator=generator).mul_(scale).to(dtype)

    num_rows, num_teachers = maps.pair_step.numel(), maps.teacher_rows.numel()
    head, target_head = randn(draft_vocab, WIDTH**-0.5), randn(VOCAB, 3 * WIDTH**-0.5)
    teacher_hidden = randn(num_teachers, 1.0)
    lse, _ = ops.teacher_stats(teacher_hidden, target_head, workspace_bytes=8 << 20)
    return Rows(
        hidden=randn(num_rows, 1.0).requires_grad_(),
        head=head.requires_grad_(),
        teacher_hidden=teacher_hidden,
        teacher_head=target_head[:draft_vocab].clone(),
        teacher_lse=lse,
        row_to_teacher=maps.pair_teacher,
        row_weight=0.8 ** maps.pair_step.float(),
        row_step=maps.pair_step,
    )


def torch_loss(rows: Rows) -> tuple[Tensor, Tensor]:
    """(loss [], sums [4, STEPS] without gradient) as one writes it in torch."""
    return _torch_loss(
        rows.hidden,
        rows.head,
        rows.teacher_hidden,
        rows.teacher_head,
        rows.teacher_lse,
        rows.row_to_teacher,
        rows.row_weight,
        rows.row_step,
    )


def _torch_loss(
    hidden: Tensor,
    head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    teacher_lse: Tensor,
    row_to_teacher: Tensor,
    row_weight: Tensor,
    row_step: Tensor,
) -> tuple[Tensor, Tensor]:
    index = row_to_teacher.long()
    log_q = torch.log_softmax((hidden @ head.T).float(), dim=-1)
    with torch.no_grad():
        teacher = (teacher_hidden @ teacher_head.T).float()
        p = torch.softmax(teacher, dim=-1)[index]
    row_loss = -(p * log_q).sum(dim=-1)
    with torch.no_grad():
        in_full = torch.exp(teacher - teacher_lse[:, None])[index]
        accepted = torch.minimum(in_full, log_q.exp()).sum(dim=-1)
        correct = log_q.argmax(dim=-1) == teacher.argmax(dim=-1)[index]
        columns = torch.stack([row_loss, correct.float(), accepted, torch.ones_like(accepted)])
        sums = torch.zeros(4, STEPS).index_add_(1, row_step, columns)
    return (row_weight * row_loss).sum(), sums


def chunked_loss(rows: Rows) -> tuple[Tensor, Tensor]:
    """The same, CHUNK_ROWS rows at a time, each recomputed in backward."""
    losses, sums = [], []
    for start in range(0, rows.hidden.shape[0], CHUNK_ROWS):
        part = slice(start, start + CHUNK_ROWS)
        index = rows.row_to_teacher[part]
        teachers = slice(int(index[0]), int(index[-1]) + 1)
        loss, chunk_sums = checkpoint(
            _torch_loss,
            rows.hidden[part],
            rows.head,
            rows.teacher_hidden[teachers],
            rows.teacher_head,
            rows.teacher_lse[teachers],
            index - teachers.start,
            rows.row_weight[part],
            rows.row_step[part],
            use_reentrant=False,
        )
        losses.append(loss)
        sums.append(chunk_sums)
    return torch.stack(losses).sum(), torch.stack(sums).sum(dim=0)


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


def compiled_loss() -> Callable[[Rows], tuple[Tensor, Tensor]]:
    compiled = torch.compile(_torch_loss, dynamic=False)

    def loss(rows: Rows) -> tuple[Tensor, Tensor]:
        result: tuple[Tensor, Tensor] = compiled(*vars(rows).values())
        return result

    return loss


def implementations() -> dict[str, Callable[[Rows], tuple[Tensor, Tensor]]]:
    return {
        "specforge_ext": native_loss,
        BASELINE: torch_loss,
        "torch-compile": compiled_loss(),
        "torch-chunked": chunked_loss,
    }


def run(loss: Callable[[Rows], tuple[Tensor, Tensor]], rows: Rows) -> Result:
    value, _ = loss(rows)
    return Result(value.detach(), *torch.autograd.grad(value, (rows.hidden, rows.head)))


def truth(rows: Rows) -> Result:
    """The definition in float64 (of float64 copies of the same values)."""
    hidden, head = (x.detach().double().requires_grad_() for x in (rows.hidden, rows.head))
    out = reference.draft_loss(
        hidden,
        head,
        rows.teacher_hidden.double(),
        rows.teacher_head.double(),
        rows.teacher_lse.double(),
        row_to_teacher=rows.row_to_teacher,
        row_weight=rows.row_weight.double(),
        row_step=rows.row_step,
        num_steps=STEPS,
    )
    return Result(out.loss_sum.detach(), *torch.autograd.grad(out.loss_sum, (hidden, head)))


def relative_errors(got: Result, want: Result) -> dict[str, float]:
    """Of loss and gradients: largest difference over largest magnitude."""

    def error(a: Tensor, b: Tensor) -> float:
        return float((a.double() - b).abs().max() / b.abs().max())

    return {
        "loss_error": error(got.loss, want.loss),
        "hidden_grad_error": error(got.hidden_grad, want.hidden_grad),
        "head_grad_error": error(got.head_grad, want.head_grad),
    }


def check(
    case: str, rows: Rows, impls: Mapping[str, Callable[[], Result]]
) -> dict[str, dict[str, float]]:
    """Errors against float64 of every implementation. Raises if one computes something else."""
    tolerance = 1e-4 if rows.hidden.dtype == torch.float32 else 3e-2
    want = truth(rows)
    errors = {name: relative_errors(call(), want) for name, call in impls.items()}
    for name, values in errors.items():
        if max(values.values()) > tolerance:
            raise RuntimeError(f"{case}: {name} is off by {values}, wanted at most {tolerance}")
    return errors


def bench_case(script: BenchScript, report: Report, case: str) -> None:
    rows = make_rows(case, quick=script.quick)
    impls = {name: (lambda loss=loss: run(loss, rows)) for name, loss in implementations().items()}
    errors = check(case, rows, impls)
    timings = time_interleaved(impls, rounds=3 if script.quick else 5)
    for name in (BASELINE, *(name for name in impls if name != BASELINE)):
        peak = script.peak_bytes(case, name)
        report.add(case, name, timings[name], peak, rows=rows.hidden.shape[0], **errors[name])


def main() -> None:
    script = BenchScript(__doc__ or "")
    if script.peak:
        case, impl = script.peak
        loss = implementations()[impl]
        script.answer_peak(
            lambda: run(loss, make_rows(case, quick=script.quick)), torch.device("cpu")
        )
        return
    report = Report("loss", BASELINE)
    for case in QUICK_CASES if script.quick else CASES:
        bench_case(script, report, case)
    if script.json:
        report.write(script.json)


if __name__ == "__main__":
    main()
