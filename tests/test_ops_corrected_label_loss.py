"""corrected_label_loss against its definition and torch's cross entropy."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ops_helpers import assert_no_worse
from specforge_ext.ops import (
    CorrectedLabelLoss,
    _two_heads,
    corrected_label_loss,
    label_loss,
    reference,
)

Case = dict[str, Tensor]
TRAINED = ("hidden_NH", "act_NE", "correction_VE")


def case(rows: int, vocab: int, dtype: torch.dtype = torch.float32) -> Case:
    generator = torch.Generator().manual_seed(rows + vocab)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    return {
        "hidden_NH": normal(rows, 24),
        "head_VH": normal(vocab, 24),
        "act_NE": normal(rows, 9),
        "correction_VE": normal(vocab, 9),
        "label_N": torch.randint(vocab, (rows,), generator=generator, dtype=torch.int32),
        "weight_N": torch.rand(rows, generator=generator) * 2,
    }


def run(inputs: Case, **options: Any) -> tuple[CorrectedLabelLoss, list[Tensor]]:
    """The result and the gradients of 3 * loss_sum in the order of TRAINED."""
    leaves = {name: inputs[name].clone().requires_grad_() for name in TRAINED}
    result = corrected_label_loss(**{**inputs, **leaves}, **options)
    return result, list(torch.autograd.grad(3 * result.loss_sum, list(leaves.values())))


def in_torch(inputs: Case, dtype: torch.dtype, share: float) -> list[Tensor]:
    """loss_sum and the same gradients, by autograd, all in one dtype."""
    cast = {name: x if name == "label_N" else x.to(dtype) for name, x in inputs.items()}
    leaves = {name: cast[name].clone().requires_grad_() for name in TRAINED}
    loss, _, _ = reference.corrected_label_loss(**{**cast, **leaves}, base_share=share)
    return [loss.detach(), *torch.autograd.grad(3 * loss, list(leaves.values()))]


# No row, one, a prime, more than a chunk holds; a vocabulary of one word, off the vector width.
@pytest.mark.parametrize(("rows", "vocab"), [(0, 7), (1, 1), (13, 61), (50, 1000)])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_is_the_definition(rows: int, vocab: int, share: float, dtype: torch.dtype) -> None:
    inputs = case(rows, vocab, dtype)
    slack = 1e-6 if dtype == torch.float32 else 6e-3
    result, gradients = run(inputs, base_share=share, workspace_bytes=16 * vocab * 4)
    true, base = in_torch(inputs, torch.double, share), in_torch(inputs, dtype, share)
    for got, exact, other in zip([result.loss_sum, *gradients], true, base, strict=True):
        assert got.shape == exact.shape
        assert_no_worse(got.detach().to(other.dtype), exact, other, slack=slack)
    assert result.loss_sum.dtype == torch.float32 and not result.loss.requires_grad
    wide = {name: x if name == "label_N" else x.double() for name, x in inputs.items()}
    _, base_N, final_N = reference.corrected_label_loss(**wide, base_share=share)
    tolerance = 2e-6 if dtype == torch.float32 else 0.03
    torch.testing.assert_close(result.base_loss.double(), base_N, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(result.loss.double(), final_N, rtol=tolerance, atol=tolerance)


def test_definition_is_cross_entropy() -> None:
    inputs = {n: x if n == "label_N" else x.double() for n, x in case(11, 31).items()}
    logits = F.linear(inputs["hidden_NH"], inputs["head_VH"])
    corrected = logits + F.linear(inputs["act_NE"], inputs["correction_VE"])
    base, final = (
        F.cross_entropy(z, inputs["label_N"].long(), reduction="none") for z in (logits, corrected)
    )
    got, base_N, final_N = reference.corrected_label_loss(**inputs, base_share=0.25)
    torch.testing.assert_close(base_N, base)
    torch.testing.assert_close(final_N, final)
    torch.testing.assert_close(got, (inputs["weight_N"] * (0.75 * final + 0.25 * base)).sum())


def test_correct_is_the_first_choice() -> None:
    inputs = case(200, 5)
    result, _ = run(inputs, base_share=0.5)
    logits = F.linear(inputs["hidden_NH"], inputs["head_VH"])
    final = logits + F.linear(inputs["act_NE"], inputs["correction_VE"])
    assert torch.equal(result.base_correct, logits.argmax(1) == inputs["label_N"])
    assert torch.equal(result.correct, final.argmax(1) == inputs["label_N"])
    assert not torch.equal(result.correct, result.base_correct)
    tied = {**inputs, "hidden_NH": inputs["hidden_NH"] * 0, "act_NE": inputs["act_NE"] * 0}
    result, _ = run(tied, base_share=0.5)
    assert torch.equal(result.correct, inputs["label_N"] == 0)


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_a_correction_of_zero_is_label_loss(share: float) -> None:
    inputs = case(17, 40)
    inputs["act_NE"].zero_()
    result, (hidden_grad, _, correction_grad) = run(inputs, base_share=share)
    leaf = inputs["hidden_NH"].clone().requires_grad_()
    plain = label_loss(leaf, inputs["head_VH"], inputs["label_N"])
    (expected,) = torch.autograd.grad(3 * (plain.loss * inputs["weight_N"]).sum(), leaf)
    assert torch.equal(result.loss, plain.loss) and torch.equal(result.base_loss, plain.loss)
    torch.testing.assert_close(hidden_grad, expected, rtol=1e-5, atol=1e-6)
    assert not correction_grad.any()


def test_chunks_do_not_matter() -> None:
    inputs = case(37, 101)
    whole, expected = run(inputs, base_share=0.3)
    for rows in (1, 5):
        result, gradients = run(inputs, base_share=0.3, workspace_bytes=2 * 101 * 4 * rows)
        torch.testing.assert_close(result.loss_sum, whole.loss_sum, rtol=1e-6, atol=0)
        for got, wanted in zip(gradients, expected, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def test_logits_stay_within_the_workspace(monkeypatch: pytest.MonkeyPatch) -> None:
    """One buffer of logits, no larger than asked for, whatever the number of rows."""
    made: list[int] = []
    empty_buffer = _two_heads.empty_buffer

    def counted(*args: Any) -> Tensor:
        made.append(empty_buffer(*args).nbytes)
        return empty_buffer(*args)

    monkeypatch.setattr(_two_heads, "empty_buffer", counted)
    workspace = 2 * 97 * 4 * 50
    for rows in (10, 500, 2000):
        run(case(rows, 97), base_share=0.5, workspace_bytes=workspace)
    assert len(made) == 3 and max(made) <= workspace < 2 * max(made)


def test_the_head_is_frozen_and_others_only_where_wanted() -> None:
    inputs = case(5, 11)
    assert not corrected_label_loss(**inputs, base_share=0.5).loss_sum.requires_grad
    for wanted in TRAINED:
        leaf = inputs[wanted].clone().requires_grad_()
        head = inputs["head_VH"].clone().requires_grad_()
        given = {**inputs, "head_VH": head, wanted: leaf}
        loss = corrected_label_loss(**given, base_share=0.5).loss_sum
        loss.backward()
        _, gradients = run(inputs, base_share=0.5)
        assert leaf.grad is not None and head.grad is None
        torch.testing.assert_close(3 * leaf.grad, gradients[TRAINED.index(wanted)])


def test_autocast_takes_its_dtype() -> None:
    inputs = case(5, 11)
    with torch.autocast("cpu", torch.bfloat16):
        got = corrected_label_loss(**inputs, base_share=0.5).loss_sum
    floats = ("hidden_NH", "head_VH", "act_NE", "correction_VE")
    rounded = {n: x.bfloat16() if n in floats else x for n, x in inputs.items()}
    assert torch.equal(got, corrected_label_loss(**rounded, base_share=0.5).loss_sum)


def test_compiles_and_passes_opcheck() -> None:
    inputs = case(6, 13)
    leaves = [inputs[name].requires_grad_() for name in TRAINED]

    def function(hidden: Tensor, act: Tensor, correction: Tensor) -> Tensor:
        given = dict(zip(TRAINED, (hidden, act, correction), strict=True))
        return corrected_label_loss(**{**inputs, **given}, base_share=0.5).loss_sum

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)(*leaves)
    torch.testing.assert_close(compiled, function(*leaves))
    torch.library.opcheck(
        torch.ops.specforge_ext.two_head_loss.default,
        (
            *(*leaves, inputs["head_VH"]), *(None, None, inputs["label_N"]),
            *(None, inputs["weight_N"]), *("hard_ce", 1.0, 0.5, 0.0), 0.5,
            4 * 13 * 4, True, True, True,
        ),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head_VH": torch.zeros(9, 24).bfloat16()}, r"head must be \[9, 24\] float32, got"),
        ({"act_NE": torch.zeros(3, 9)}, r"act must be \[4, 9\] float32, got \[3, 9\]"),
        ({"correction_VE": torch.zeros(9, 8)}, r"correction must be \[9, 9\] .* got \[9, 8\]"),
        ({"label_N": torch.zeros(4)}, r"label must be \[4\] int32, got \[4\] float32"),
        ({"weight_N": torch.zeros(4).double()}, r"weight must be \[4\] float32, got"),
        ({"base_share": 1.1}, r"base_share must be 0 to 1, got 1.1"),
        (
            {"workspace_bytes": 71},
            r"corrected_label_loss: workspace_bytes must hold .* 72 bytes, got 71",
        ),
        ({"label_N": torch.full((4,), 9, dtype=torch.int32)}, r"label"),
    ],
)
def test_errors_name_what_is_wrong(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        corrected_label_loss(**{**case(4, 9), "base_share": 0.5, **change})


def test_second_derivatives_are_refused() -> None:
    inputs = case(4, 9)
    leaf = inputs["hidden_NH"].requires_grad_()
    loss = corrected_label_loss(**inputs, base_share=0.5).loss_sum
    with pytest.raises(RuntimeError, match="second derivatives are not available"):
        torch.autograd.grad(loss, leaf, create_graph=True)
