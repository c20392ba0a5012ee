"""label_loss against torch's cross entropy, per row."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ops_helpers import assert_no_worse
from specforge_ext.ops import LabelLoss, draft_loss, label_loss


def inputs(rows: int, vocab: int, dtype: torch.dtype, width: int = 24) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(rows + vocab)
    hidden = torch.randn(rows, width, generator=generator).to(dtype)
    head = torch.randn(vocab, width, generator=generator).to(dtype)
    label = torch.randint(vocab, (rows,), generator=generator, dtype=torch.int32)
    return hidden, head, label


def torch_loss(hidden: Tensor, head: Tensor, label: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, head), label.long(), reduction="none")


def gradient(loss: Tensor, hidden: Tensor, weight: Tensor) -> Tensor:
    return torch.autograd.grad((loss * weight.to(loss.dtype)).sum(), hidden)[0]


# No row, one, a prime, more than a chunk holds; a vocabulary of one word, off the vector width.
@pytest.mark.parametrize(("rows", "vocab"), [(0, 7), (1, 1), (13, 61), (50, 1000)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_is_cross_entropy(rows: int, vocab: int, dtype: torch.dtype) -> None:
    hidden, head, label = inputs(rows, vocab, dtype)
    weight = torch.randn(rows, generator=torch.Generator().manual_seed(1))
    slack = 1e-6 if dtype == torch.float32 else 4e-3
    results = []
    for cast, function in (
        (torch.double, torch_loss),
        (dtype, torch_loss),
        (dtype, lambda h, w, y: label_loss(h, w, y, workspace_bytes=16 * vocab * 4).loss),
    ):
        leaf = hidden.to(cast).requires_grad_()
        loss = function(leaf, head.to(cast), label)
        results.append((loss.detach(), gradient(loss, leaf, weight)))
    for true, base, got in zip(*results, strict=True):
        assert_no_worse(got.to(base.dtype), true, base, slack=slack)
    result = label_loss(hidden, head, label)
    assert result.loss.dtype == torch.float32 and result.correct.dtype == torch.bool
    logits = F.linear(hidden.double(), head.double())
    top = logits.topk(min(2, vocab), 1).values
    clear = (top[:, 0] - top[:, -1] > 0.1) | (vocab == 1)  # not a tie that rounding decides
    assert torch.equal(result.correct[clear], (logits.argmax(1) == label)[clear])


def test_is_draft_loss_row_by_row() -> None:
    hidden, head, label = inputs(9, 40, torch.float32)
    result = label_loss(hidden, head, label)
    rows = torch.arange(9, dtype=torch.int32)
    each = draft_loss(
        hidden, head, loss="hard_ce", row_to_teacher=rows, row_weight=torch.ones(9),
        row_step=rows, num_steps=9, label=label,
    )  # fmt: skip
    assert torch.equal(result.loss.double(), each.step_loss)
    assert torch.equal(result.correct.double(), each.step_correct)


def test_chunks_do_not_matter() -> None:
    hidden, head, label = inputs(37, 101, torch.float32)
    results = []
    for workspace in (None, 101 * 4, 101 * 4 * 5):
        leaf = hidden.clone().requires_grad_()
        loss = label_loss(leaf, head, label, workspace_bytes=workspace).loss
        results.append((loss.detach(), gradient(loss, leaf, torch.ones(37))))
    for loss, grad in results[1:]:
        torch.testing.assert_close(loss, results[0][0], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(grad, results[0][1], rtol=1e-5, atol=1e-6)


def test_the_head_is_frozen() -> None:
    hidden, head, label = inputs(5, 11, torch.float32)
    head.requires_grad_()
    assert not label_loss(hidden, head, label).loss.requires_grad
    leaf = hidden.requires_grad_()
    label_loss(leaf, head, label).loss.sum().backward()
    assert head.grad is None and leaf.grad is not None


def test_autocast_takes_its_dtype() -> None:
    hidden, head, label = inputs(5, 11, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        got = label_loss(hidden, head, label).loss
    assert torch.equal(got, label_loss(hidden.bfloat16(), head.bfloat16(), label).loss)


def test_compiles_and_passes_opcheck() -> None:
    hidden, head, label = inputs(6, 13, torch.float32)
    leaf = hidden.requires_grad_()

    def function(h: Tensor) -> LabelLoss:
        return label_loss(h, head, label)

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)(leaf).loss
    torch.testing.assert_close(compiled, function(leaf).loss)
    torch.library.opcheck(
        torch.ops.specforge_ext.label_loss.default, (leaf, head, label, 13 * 4, True)
    )


def test_errors_name_what_is_wrong() -> None:
    hidden, head, label = inputs(4, 9, torch.float32)
    with pytest.raises(ValueError, match=r"label_loss: head must be \[9, 24\] float32, got"):
        label_loss(hidden, head.bfloat16(), label)
    with pytest.raises(ValueError, match=r"label_loss: label must be \[4\] int32, got \[3\]"):
        label_loss(hidden, head, label[:3])
    with pytest.raises(ValueError, match=r"must hold a row of logits, 36 bytes, got 35"):
        label_loss(hidden, head, label, workspace_bytes=35)
    with pytest.raises(ValueError, match=r"label"):
        label_loss(hidden, head, label + 9)
    leaf = hidden.requires_grad_()
    (first,) = torch.autograd.grad(label_loss(leaf, head, label).loss.sum(), leaf)
    with pytest.raises(RuntimeError, match="second derivatives are not available"):
        torch.autograd.grad(label_loss(leaf, head, label).loss.sum(), leaf, create_graph=True)
    assert first.shape == leaf.shape
