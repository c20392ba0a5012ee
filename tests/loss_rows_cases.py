"""The losses of csrc/loss/loss_rows.h from their formulas, in float64; gradients by autograd.

Written for the CUDA tests apart from ops/reference, so that one can be checked by the other.
Legend: N rows, R teacher rows, V vocabulary (the draft's), U the teacher's columns, U >= V.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from emulated import LOSS_KINDS, RowResults

BF16_ROUNDING = 2.0**-8


@dataclass(frozen=True)
class Case:
    """One call of loss_rows; tensors are on the CPU."""

    kind: str
    logits: Tensor
    teacher: Tensor | None
    row_to_teacher: Tensor
    weight: Tensor
    temperature: float = 1.0
    beta: float = 0.5
    hard_weight: float = 0.0
    options: dict[str, Tensor] = field(default_factory=dict)  # teacher_lse and so on
    writes_gradient: bool = True


def make_case(
    kind: str,
    rows: int,
    vocab: int,
    *,
    dtype: torch.dtype = torch.float32,
    teacher_dtype: torch.dtype | None = None,
    rest: int = 0,
    gives_lse: bool = False,
    gives_argmax: bool = False,
    temperature: float = 1.0,
    beta: float = 0.3,
    hard_weight: float = 0.0,
    teachers: int = 3,
    seed: int = 0,
) -> Case:
    """Random logits; row 1 has weight 0 and NaN; weights of both signs. rest: U - V.

    gives_lse: the normaliser of the teacher's columns plus 0.7 nats; gives_argmax: column 0 of
    teacher 0, none the draft has of teacher 1.
    """
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * 3

    hard = kind == "hard_ce"
    row_to_teacher = torch.arange(rows, dtype=torch.int32) * 2 % teachers
    weight = torch.tensor([1.0, 0.0, -0.3, 2.5, 1e-3, 0.8]).repeat(rows // 6 + 1)[:rows]
    logits = randn(rows, vocab).to(dtype)
    logits[weight == 0] = torch.nan
    teacher = randn(teachers, vocab + rest).to(teacher_dtype or dtype)
    options = {}
    if gives_lse and not hard:
        exact = torch.logsumexp(teacher.double() / temperature, -1) + 0.7
        options["teacher_lse"] = exact.float()
        if gives_argmax:
            options["teacher_argmax"] = torch.tensor([0, vocab, 0][:teachers], dtype=torch.int32)
    if hard or hard_weight:
        last = torch.tensor([vocab - 1, 0, vocab // 2] * teachers, dtype=torch.int32)
        options["label"] = last[:teachers]
    if kind == "lk_lambda":
        options["kl_weight"] = torch.rand(rows, generator=generator)
    teacher_or_none = None if hard else teacher
    return Case(
        *(kind, logits, teacher_or_none, row_to_teacher, weight),
        **{"temperature": temperature, "beta": beta, "options": options},
        hard_weight=0.0 if hard else hard_weight,
    )


def lowest_argmax(x: Tensor) -> Tensor:
    return (x == x.amax(-1, keepdim=True)).to(torch.uint8).argmax(-1)


def soft_loss(case: Case, log_q: Tensor, t: Tensor, scored: Tensor) -> tuple[Tensor, Tensor]:
    """(K, a) of rows that have a teacher; t: its logits over temperature, all columns."""
    vocab = log_q.shape[1]
    log_p = torch.log_softmax(t[:, :vocab], -1)
    full = torch.logsumexp(t, -1)
    if "teacher_lse" in case.options:
        full = case.options["teacher_lse"].double()[case.row_to_teacher.long()[scored]]
    q, p, pt = log_q.exp(), log_p.exp(), (t[:, :vocab] - full[:, None]).exp()
    accepted = torch.minimum(pt, q).sum(-1)
    cross = -(p * log_q).sum(-1)
    if case.kind == "soft_ce":
        loss = cross
    elif case.kind == "reverse_kl":
        loss = (q * (log_q - log_p)).sum(-1)
    elif case.kind == "jsd":
        mix = torch.tensor([case.beta, 1 - case.beta], dtype=torch.float64).log()
        log_m = torch.logaddexp(log_p + mix[0], log_q + mix[1])
        from_p, from_q = (p * (log_p - log_m)).sum(-1), (q * (log_q - log_m)).sum(-1)
        loss = case.beta * from_p + (1 - case.beta) * from_q
    elif case.kind == "l1":
        loss = (q - p).abs().sum(-1)
    elif case.kind == "lk_alpha":
        zero = accepted == 0
        loss = torch.where(zero, 0.0, -torch.where(zero, 1.0, accepted).log())
    else:
        assert case.kind == "lk_lambda"
        share = case.options["kl_weight"].double()[scored]
        loss = share * cross + (1 - share) * (1 - accepted)
    return loss, accepted


def definition(case: Case) -> tuple[RowResults, Tensor]:
    """(results, gradient [N, V]), float64; rows of weight 0 are zeros."""
    scored = case.weight != 0
    index = case.row_to_teacher.long()[scored]
    z = case.logits[scored].double().requires_grad_()
    log_q = torch.log_softmax(z / case.temperature, -1)
    correct_of = lowest_argmax(z.detach())
    nll = torch.zeros(int(scored.sum()), dtype=torch.float64)
    if "label" in case.options:
        label = case.options["label"].long()[index]
        nll = -log_q.gather(1, label[:, None])[:, 0]
    if case.teacher is None:
        loss, accepted, choice = nll, (-nll).exp(), label
    else:
        t = case.teacher[index].double() / case.temperature
        if "teacher_lse" in case.options:
            t = t[:, : z.shape[1]]
        loss, accepted = soft_loss(case, log_q, t, scored)
        loss = loss + case.hard_weight * nll
        choice = lowest_argmax(t)
        if "teacher_argmax" in case.options:
            choice = case.options["teacher_argmax"].long()[index]
    weight = case.weight.double()[scored]
    (gradient,) = torch.autograd.grad((weight * loss).sum(), z)

    def spread(value: Tensor) -> Tensor:
        whole = torch.zeros(len(scored), *value.shape[1:], dtype=value.dtype)
        whole[scored] = value.detach()
        return whole

    q = log_q.exp()
    statistics = (q.amax(-1), -(q * log_q).sum(-1))
    correct = (correct_of == choice).to(torch.uint8)
    return RowResults(*map(spread, (loss, accepted, correct, *statistics))), spread(gradient)


def check(case: Case, got: RowResults, gradient: Tensor) -> None:
    """gradient: what the logits became."""
    wanted, exact = definition(case)
    for name, rtol in [("loss", 3e-6), ("accepted", 3e-6), ("top_prob", 3e-6), ("entropy", 3e-6)]:
        torch.testing.assert_close(
            getattr(got, name).double(),
            getattr(wanted, name),
            rtol=rtol,
            atol=4e-6,
            msg=lambda text, name=name: f"{name}: {text}",
        )
    assert torch.equal(got.correct, wanted.correct)
    if not case.writes_gradient:
        assert torch.equal(gradient.nan_to_num(99), case.logits.nan_to_num(99))
        return
    scale = float(case.weight.abs().max()) / case.temperature
    rounding = BF16_ROUNDING if case.logits.dtype == torch.bfloat16 else 4e-6
    # An element whose p and q agree to float32 may fall on either side: 1e-6 of slack.
    torch.testing.assert_close(gradient.double(), exact, rtol=rounding, atol=2e-6 * scale)
    assert (gradient[case.weight == 0] == 0).all()


def without_gradient(case: Case) -> Case:
    return replace(case, writes_gradient=False)


__all__ = ["LOSS_KINDS", "Case", "check", "definition", "make_case", "without_gradient"]
