"""Domino's two losses of the same rows, forward and backward: with and without correction.

    OMP_NUM_THREADS=1 python benchmarks/corrected_loss.py [--json FILE] [--quick]

One thread, float32, half of the loss each. `two-losses`: label_loss for the base logits, and for
the final ones draft_loss over concatenated [hidden, act] and [head, correction], which knows no
head of which a part is frozen. `torch`: all logits of both losses at once, by autograd. Results are
compared beforehand.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from common import BenchScript, Report, time_interleaved
from specforge_ext.ops import corrected_label_loss, draft_loss, label_loss

WIDTH, RANK = 1024, 256
CASES = {"1024 rows, 32000 words": (1024, 32000), "1024 rows, 8192 words": (1024, 8192)}
QUICK = "1024 rows, 8192 words"
SHARE = 0.5


@dataclass(frozen=True)
class Inputs:
    """hidden, act and correction are trained."""

    hidden: Tensor
    act: Tensor
    correction: Tensor
    head: Tensor
    label: Tensor
    weight: Tensor


def make_inputs(case: str) -> Inputs:
    rows, vocab = CASES[case]
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * shape[-1] ** -0.25

    return Inputs(
        normal(rows, WIDTH).requires_grad_(),
        normal(rows, RANK).requires_grad_(),
        normal(vocab, RANK).requires_grad_(),
        normal(vocab, WIDTH),
        torch.randint(vocab, (rows,), generator=generator, dtype=torch.int32),
        torch.ones(rows),
    )


def ours(x: Inputs) -> Tensor:
    return corrected_label_loss(
        x.hidden, x.head, x.act, x.correction, x.label, x.weight, base_share=SHARE
    ).loss_sum


def two_losses(x: Inputs) -> Tensor:
    base = (label_loss(x.hidden, x.head, x.label).loss * x.weight).sum()
    rows = torch.arange(len(x.label), dtype=torch.int32)
    final = draft_loss(
        torch.cat((x.hidden, x.act), 1),
        torch.cat((x.head, x.correction), 1),
        loss="hard_ce",
        row_to_teacher=rows,
        row_weight=x.weight,
        row_step=torch.zeros_like(rows),
        num_steps=1,
        label=x.label,
    ).loss_sum
    return SHARE * base + (1 - SHARE) * final


def in_torch(x: Inputs) -> Tensor:
    base = F.linear(x.hidden, x.head)
    final = base + F.linear(x.act, x.correction)
    base_N, final_N = (F.cross_entropy(z, x.label.long(), reduction="none") for z in (base, final))
    return (x.weight * (SHARE * base_N + (1 - SHARE) * final_N)).sum()


IMPLS: dict[str, Callable[[Inputs], Tensor]] = {
    "torch": in_torch,
    "two-losses": two_losses,
    "specforge_ext": ours,
}


def step(impl: str, inputs: Inputs) -> list[Tensor]:
    loss = IMPLS[impl](inputs)
    trained = (inputs.hidden, inputs.act, inputs.correction)
    return [loss.detach(), *torch.autograd.grad(loss, trained)]


def main() -> None:
    script = BenchScript(__doc__ or "")
    torch.set_num_threads(1)
    if script.peak:
        case, impl = script.peak
        inputs = make_inputs(case)
        script.answer_peak(lambda: step(impl, inputs), torch.device("cpu"))
        return
    report = Report("corrected_loss", "torch")
    for case in [QUICK] if script.quick else list(CASES):
        inputs = make_inputs(case)
        wanted = step("torch", inputs)
        for impl in IMPLS:
            for got, exact in zip(step(impl, inputs), wanted, strict=True):
                torch.testing.assert_close(got, exact, rtol=1e-3, atol=1e-4)
        calls = {impl: partial(step, impl, inputs) for impl in IMPLS}
        for impl, timing in time_interleaved(calls, rounds=3).items():
            report.add(case, impl, timing, script.peak_bytes(case, impl))
    if script.json:
        report.write(script.json)


if __name__ == "__main__":
    main()
