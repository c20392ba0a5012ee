"""Patching as such, on a made-up peer; and the autograd functions that every peer's patch uses."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from specforge_ext import integrations
from specforge_ext.integrations import _patch, patch, unpatch
from specforge_ext.integrations._rows import row_losses, soft_ce_and_accepted, teacher_entropy
from specforge_ext.ops import RowLoss

VOCAB = 67


def made_up_parity(
    originals: dict[str, Any], ours: dict[str, Any], device: torch.device
) -> list[_patch.Parity]:
    x = torch.tensor([2.0, 3.0], device=device)

    def run(function: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        leaf = x.clone().requires_grad_()
        value = function(leaf)
        value.backward()  # type: ignore[no-untyped-call]
        assert leaf.grad is not None
        return value, leaf.grad

    return [_patch.compare(name, run(originals[name]), run(ours[name])) for name in originals]


def targets(factor: float = 1.0) -> tuple[_patch.Target, ...]:
    def ours(original: Any) -> Any:
        return lambda x: factor * x.square().sum()

    return (
        _patch.Target("madeup.loss", "square", ours),
        _patch.Target("madeup.loss", "Trainer.static", ours),
    )


Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Makes the package `madeup` 1.0 importable and known to patch."""
    (tmp_path / "madeup").mkdir()
    (tmp_path / "madeup-1.0.dist-info").mkdir()
    (tmp_path / "madeup-1.0.dist-info" / "METADATA").write_text("Name: madeup\nVersion: 1.0\n")
    (tmp_path / "madeup" / "__init__.py").write_text("")
    (tmp_path / "madeup" / "loss.py").write_text(
        "def square(x):\n    return (x * x).sum()\n\n\n"
        "class Trainer:\n    @staticmethod\n    def static(x):\n        return (x * x).sum()\n"
    )
    (tmp_path / "madeup" / "model.py").write_text("from madeup.loss import square\n")
    (tmp_path / "madeup" / "late.py").write_text("from madeup.loss import square\n")
    monkeypatch.syspath_prepend(tmp_path)

    def install(**changes: Any) -> None:
        peer = {
            "name": "madeup",
            "versions": ("1.0",),
            "targets": targets(),
            "parity": made_up_parity,
        }
        monkeypatch.setitem(integrations._PEERS, "madeup", _patch.Peer(**(peer | changes)))

    yield install
    unpatch("madeup")
    for name in [n for n in sys.modules if n.split(".")[0] == "madeup"]:
        del sys.modules[name]


def test_everything_that_holds_the_original_is_patched_and_restored(install: Install) -> None:
    install()
    model = importlib.import_module("madeup.model")
    loss = importlib.import_module("madeup.loss")
    square, static = loss.square, vars(loss.Trainer)["static"]
    with patch("madeup") as done:
        assert repr(done) == (
            "Patch(madeup 1.0: madeup.loss.Trainer.static, madeup.loss.square, madeup.model.square)"
        )
        late = importlib.import_module("madeup.late")
        assert loss.square is model.square is late.square is not square
        assert loss.Trainer().static(torch.ones(2)) == 2  # still static
        assert patch("madeup") is done
    assert loss.square is model.square is late.square is square
    assert vars(loss.Trainer)["static"] is static
    unpatch("madeup")  # again: nothing happens
    assert patch("madeup") is not done


def test_nothing_is_imported_before_patch(install: Install) -> None:
    install()
    assert "madeup" not in sys.modules
    patch("madeup")
    assert "madeup.loss" in sys.modules
    code = (
        "import sys, specforge_ext.integrations\n"
        "assert not {'specforge', 'speculators', 'trl', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_another_version_is_named_and_can_be_tried(install: Install) -> None:
    install(versions=("0.8", "0.9"))
    with pytest.raises(integrations.PeerVersion, match=r"madeup: wanted version 0\.8 or 0\.9, f"):
        patch("madeup")
    assert patch("madeup", allow_untested_version=True).version == "1.0"


def test_a_peer_without_what_is_replaced(install: Install) -> None:
    gone = _patch.Target("madeup.loss", "cube", lambda original: original)
    install(targets=(*targets(), gone))
    with pytest.raises(integrations.PeerVersion, match=r"madeup 1\.0 has no madeup\.loss\.cube"):
        patch("madeup")
    moved = _patch.Target("madeup.losses", "square", lambda original: original)
    install(targets=(moved,))
    with pytest.raises(integrations.PeerVersion, match=r"has no module madeup\.losses"):
        patch("madeup")


@pytest.mark.parametrize("factor", [1 + 1e-3, float("nan")])
def test_a_failed_self_test_patches_nothing(install: Install, factor: float) -> None:
    install(targets=targets(factor))
    loss = importlib.import_module("madeup.loss")
    square = loss.square
    with pytest.raises(integrations.ParityFailed, match=r"square must agree to 1e-05 in value"):
        patch("madeup")
    assert loss.square is square and _patch.active("madeup") is None


def test_a_missing_peer_and_a_missing_requirement(install: Install, tmp_path: Path) -> None:
    install(name="not-installed-anywhere")
    with pytest.raises(integrations.PeerMissing, match="not-installed-anywhere is not installed"):
        patch("madeup")
    install()
    (tmp_path / "madeup" / "__init__.py").write_text("import nowhere_to_be_found\n")
    with pytest.raises(integrations.PeerMissing, match="imports nowhere_to_be_found, which is not"):
        patch("madeup")


def test_unpatch_does_not_undo_what_others_patched_on_top(install: Install) -> None:
    install()
    patch("madeup")
    loss = importlib.import_module("madeup.loss")
    ours, loss.square = loss.square, abs
    with pytest.raises(integrations.PatchError, match=r"wanted our replacement in madeup\.loss\.s"):
        unpatch("madeup")
    assert loss.square is abs
    loss.square = ours


def test_names() -> None:
    with pytest.raises(ValueError, match="must be one of specforge, speculators, trl, got 'eagle'"):
        patch("eagle")
    with pytest.raises(ValueError, match="unpatch: name must be one of"):
        unpatch("eagle")
    with pytest.raises(integrations.PeerUnsupported, match="torchspec is not supported: the only"):
        patch("torchspec")


def test_errors_are_of_one_family() -> None:
    for error in ("PeerMissing", "PeerVersion", "PeerUnsupported", "ParityFailed"):
        assert issubclass(getattr(integrations, error), integrations.PatchError)
    assert issubclass(integrations.PatchError, RuntimeError)


# The functions.


def definition(loss: RowLoss, z: Tensor, t: Tensor) -> Tensor:
    """[...] of the losses that peers use, differentiable by torch's own autograd."""
    log_q = torch.log_softmax(z / loss.temperature, dim=-1)
    log_p = torch.log_softmax(t / loss.temperature, dim=-1)
    p, q = log_p.exp(), log_q.exp()
    if loss.kind == "soft_ce":
        return -(p * log_q).sum(-1)
    if loss.kind == "hard_ce":
        return -log_q.gather(-1, t.argmax(-1, keepdim=True)).squeeze(-1)
    if loss.kind == "reverse_kl":
        return (q * (log_q - log_p)).sum(-1)
    if loss.kind == "l1":
        return (q - p).abs().sum(-1)
    m = loss.beta * p + (1 - loss.beta) * q
    kl_p, kl_q = (p * (log_p - m.log())).sum(-1), (q * (log_q - m.log())).sum(-1)
    return loss.beta * kl_p + (1 - loss.beta) * kl_q


LOSSES = [RowLoss(kind) for kind in ("soft_ce", "hard_ce", "reverse_kl", "l1")]
LOSSES += [RowLoss("jsd", beta=0.3), RowLoss("soft_ce", temperature=2.0)]
SCORED = torch.tensor([[1, 0, 1, 1, 0], [0, 1, 1, 0, 1]], dtype=torch.bool)


def rows(seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 5, VOCAB, generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_masked", [False, True])
@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: f"{loss.kind}-{loss.temperature}")
def test_row_losses_against_the_definition(
    loss: RowLoss, is_masked: bool, dtype: torch.dtype
) -> None:
    logits, teacher = rows(1, dtype), rows(2, dtype)
    weight = torch.linspace(-1, 2, 10).view(2, 5)
    scored = SCORED if is_masked else None
    leaf = logits.clone().requires_grad_()
    values, _ = row_losses(leaf, teacher, loss=loss, scored=scored)
    (weight * values).sum().backward()
    exact = logits.double().requires_grad_()
    wanted = definition(loss, exact, teacher.double())
    wanted = wanted * SCORED if is_masked else wanted
    (weight.double() * wanted).sum().backward()
    assert leaf.grad is not None and exact.grad is not None
    torch.testing.assert_close(values.double(), wanted, rtol=2e-6, atol=2e-6)
    slack = 1e-6 if dtype == torch.float32 else 2**-8 * float(exact.grad.abs().max())
    torch.testing.assert_close(leaf.grad.double(), exact.grad, rtol=0, atol=slack)
    if is_masked:
        assert (leaf.grad[~SCORED] == 0).all() and (values[~SCORED] == 0).all()


@pytest.mark.parametrize("scored", [None, SCORED[:, :-1]], ids=["all", "masked"])
def test_rows_of_a_slice(scored: Tensor | None) -> None:
    """What trl hands over: not contiguous, and only a part of what the gradient is of."""
    leaf = rows(1).requires_grad_()
    again = rows(1)[:, :-1].contiguous().requires_grad_()
    teacher = rows(2)
    for student, of in ((leaf[:, :-1], teacher[:, :-1]), (again, teacher[:, :-1].contiguous())):
        row_losses(student, of, loss=RowLoss("jsd"), scored=scored)[0].sum().backward()
    assert leaf.grad is not None and again.grad is not None
    assert torch.equal(leaf.grad[:, :-1], again.grad) and (leaf.grad[:, -1] == 0).all()


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("scored", [None, SCORED], ids=["all", "masked"])
def test_row_losses_leave_their_inputs_alone(scored: Tensor | None, requires_grad: bool) -> None:
    logits, teacher = rows(1), rows(2)
    leaf, versions = logits.clone().requires_grad_(requires_grad), teacher._version
    before = leaf._version
    loss, _ = row_losses(leaf, teacher, loss=RowLoss("soft_ce"), scored=scored)
    entropy = teacher_entropy(teacher, scored=scored)
    if requires_grad:
        (loss - entropy).sum().backward()
    assert torch.equal(leaf, logits) and torch.equal(teacher, rows(2))
    # Autograd must not take them for changed: others may have saved them.
    assert leaf._version == before and teacher._version == versions


def test_rows_that_are_not_scored_are_not_read() -> None:
    logits, teacher = rows(1), rows(2)
    logits[~SCORED] = teacher[~SCORED] = float("nan")
    leaf = logits.requires_grad_()
    loss, accepted = row_losses(leaf, teacher, loss=RowLoss("soft_ce"), scored=SCORED)
    (loss - teacher_entropy(teacher, scored=SCORED)).sum().backward()
    assert leaf.grad is not None
    assert leaf.grad.isfinite().all() and loss.isfinite().all() and accepted.isfinite().all()


def test_no_row_scored() -> None:
    leaf = rows(1).requires_grad_()
    scored = torch.zeros(2, 5, dtype=torch.bool)
    loss, _ = row_losses(leaf, rows(2), loss=RowLoss("l1"), scored=scored)
    loss.sum().backward()
    assert leaf.grad is not None and (leaf.grad == 0).all() and (loss == 0).all()


def test_teacher_entropy() -> None:
    teacher = rows(2)
    p = torch.softmax(teacher.double() / 3, dim=-1)
    wanted = -(p * p.log()).sum(-1)
    torch.testing.assert_close(
        teacher_entropy(teacher, temperature=3.0).double(), wanted, rtol=2e-6, atol=0
    )


def specforge_rows(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """(student, teacher, teacher's lse): a quarter of the teacher's mass is outside the vocab."""
    teacher = rows(seed + 1)
    return rows(seed), teacher, torch.logsumexp(teacher, -1) - torch.tensor(0.75).log()


@pytest.mark.parametrize("kind", ["ce", "accepted", "both", "neither"])
def test_soft_ce_and_accepted_against_the_definition(kind: str) -> None:
    logits, teacher, lse = specforge_rows(1)
    go_ce, go_accepted = torch.rand(2, 5).add(0.1), -torch.rand(2, 5)
    uses_ce, uses_accepted = kind in ("ce", "both"), kind in ("accepted", "both")

    def total(ce: Tensor, accepted: Tensor, z: Tensor) -> Tensor:
        total = 0 * z.sum()
        if uses_ce:
            total = total + (go_ce * ce).sum()
        return total + (go_accepted * accepted).sum() if uses_accepted else total

    leaf = logits.clone().requires_grad_()
    ce, accepted = soft_ce_and_accepted(leaf * 1.0, teacher, lse, SCORED)
    total(ce, accepted, leaf).backward()
    exact = logits.double().requires_grad_()
    log_q = torch.log_softmax(exact, -1)
    wanted_ce = -(torch.softmax(teacher.double(), -1) * log_q).sum(-1) * SCORED
    of_teacher = (teacher.double() - lse[..., None]).exp()
    wanted = torch.minimum(of_teacher, log_q.exp()).sum(-1) * SCORED
    total(wanted_ce, wanted, exact).backward()
    torch.testing.assert_close(ce.double(), wanted_ce, rtol=2e-6, atol=0)
    torch.testing.assert_close(accepted.double(), wanted, rtol=2e-6, atol=0)
    assert leaf.grad is not None and exact.grad is not None
    torch.testing.assert_close(leaf.grad.double(), exact.grad, rtol=0, atol=1e-6)


def by_rows(logits: Tensor) -> Tensor:
    return row_losses(logits, rows(2), loss=RowLoss("soft_ce"), scored=SCORED)[0].sum()


def by_specforge_rows(logits: Tensor) -> Tensor:
    _, teacher, lse = specforge_rows(1)
    ce, accepted = soft_ce_and_accepted(logits, teacher, lse, SCORED)
    return ce.sum() - 3 * accepted.sum()


@pytest.mark.parametrize("function", [by_rows, by_specforge_rows])
def test_a_retained_graph_gives_the_same_gradient_again(
    function: Callable[[Tensor], Tensor],
) -> None:
    leaf = rows(1).requires_grad_()
    logits = leaf * 1.0
    loss = function(logits)
    gradients = [
        torch.autograd.grad(loss, leaf, retain_graph=retains)[0] for retains in (True, True, False)
    ]
    assert torch.equal(gradients[0], gradients[1]) and torch.equal(gradients[0], gradients[2])
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(loss, leaf)


def test_backward_takes_the_place_of_the_logits_where_nobody_reads_them() -> None:
    logits = rows(1).requires_grad_() * 1.0
    before = logits.detach().clone()
    loss = by_specforge_rows(logits)
    assert torch.equal(logits, before)  # readable until backward
    (gradient,) = torch.autograd.grad(loss, logits)
    assert gradient.data_ptr() == logits.data_ptr()


@pytest.mark.parametrize("function", [by_rows, by_specforge_rows])
def test_second_derivatives_are_refused(function: Callable[[Tensor], Tensor]) -> None:
    leaf = rows(1).requires_grad_()
    (gradient,) = torch.autograd.grad(function(leaf * 1.0).square(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_a_dtype_that_the_kernels_lack_is_named() -> None:
    with pytest.raises(ValueError, match=r"logits must be .* got .*f16"):
        row_losses(rows(1, torch.float16), rows(2), loss=RowLoss("soft_ce"))
