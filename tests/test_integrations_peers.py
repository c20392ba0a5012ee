"""The installed peers, patched and not: one training step of their own models, on the CPU."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from peer_steps import Step, specforge_step, speculators_step, trl_step
from specforge_ext.integrations import Patch, _specforge, patch, unpatch

PEERS = ("specforge", "speculators", "trl")

pytestmark = [
    pytest.mark.peer,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(
        any(importlib.util.find_spec(name) is None for name in PEERS),
        reason="peers are not installed: run `make peers` (benchmarks/peers.txt)",
    ),
]


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    yield
    for name in PEERS:
        unpatch(name)


def on_cpu(name: str) -> Patch:
    return patch(name, device=torch.device("cpu"))


def assert_same(peer: str, step: Step, *, replaced: str) -> None:
    """Loss, metrics and gradients agree before, with and after the patch; ours has run."""
    module, _, attribute = replaced.rpartition(".")
    owner = importlib.import_module(module)
    values, gradients = step()
    calls: list[str] = []
    with on_cpu(peer):
        ours = getattr(owner, attribute)

        def counting(*args: Any, **options: Any) -> Any:
            calls.append(attribute)
            return ours(*args, **options)

        setattr(owner, attribute, counting)
        our_values, our_gradients = step()
        setattr(owner, attribute, ours)
    again, _ = step()
    assert calls and torch.equal(values, again)
    torch.testing.assert_close(our_values, values, rtol=1e-5, atol=1e-6)
    assert our_gradients.keys() == gradients.keys()
    for name, wanted in gradients.items():
        error = (our_gradients[name] - wanted).abs().max() / wanted.abs().max()
        assert error < 2e-6, (name, float(error))
    assert any(gradient.abs().max() > 0 for gradient in gradients.values())


@pytest.mark.parametrize("name", PEERS)
def test_the_self_test_has_room(name: str) -> None:
    with on_cpu(name) as done:
        assert len(done.parity) >= 6
        for case in done.parity:
            assert case.value_error < 2e-6 and case.gradient_error < 2e-6, case


@pytest.mark.parametrize("name", PEERS)
def test_unpatch_restores_the_very_objects(name: str) -> None:
    done = on_cpu(name)
    for item in done.replaced:
        assert vars(item.owner)[item.name] is item.ours
        assert item.label in repr(done)
    unpatch(name)
    for item in done.replaced:
        assert vars(item.owner)[item.name] is item.original


@pytest.mark.parametrize("compact_teacher", [False, True])
@pytest.mark.parametrize("lk_loss_type", [None, "alpha", "lambda"])
def test_specforge_step(
    lk_loss_type: str | None, compact_teacher: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = importlib.import_module("specforge.algorithms.eagle3.model")
    # Its Triton kernel does not run on a CPU; its own torch reference does.
    monkeypatch.setattr(model, "LogSoftmaxLoss", _specforge.TorchReference)
    step = specforge_step(lk_loss_type=lk_loss_type, compact_teacher=compact_teacher)
    assert_same(
        "specforge",
        step,
        replaced="specforge.algorithms.eagle3.model._compute_loss_and_acceptance_rate",
    )


def test_specforge_trains_on_a_cpu_with_the_patch_alone() -> None:
    with on_cpu("specforge"):
        values, gradients = specforge_step()()
    assert values.isfinite().all() and gradients


def test_specforge_callers_with_probabilities_get_the_original(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model: Any = importlib.import_module("specforge.algorithms.eagle3.model")
    monkeypatch.setattr(model, "LogSoftmaxLoss", _specforge.TorchReference)
    p = torch.softmax(torch.randn(1, 3, 11), -1)
    options = {
        "target_p": p,
        "target_p_on_draft": p,
        "position_mask": torch.ones(1, 3, 1),
        "lk_loss_type": None,
        "kl_scale": 1.0,
        "kl_decay": 1.0,
    }
    logits = torch.randn(1, 3, 11)

    def call() -> Tensor:
        with torch.compiler.set_stance("force_eager"):
            loss: Tensor = model._compute_loss_and_acceptance_rate(logits=logits, **options)[1]
        return loss

    wanted = call()
    with on_cpu("specforge"):
        assert torch.equal(call(), wanted)


LOSSES = ["kl_div", "rkl", "jsd", "ce", "tv", "nla", "lk_hybrid", '{"ce": 0.1, "tv": 0.9}']


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("draft", ["eagle3", "dflash"])
def test_speculators_step(draft: str, loss: str) -> None:
    assert_same(
        "speculators",
        speculators_step(draft=draft, loss=loss),
        replaced="speculators.losses.utils.loss_function",
    )


def test_speculators_fused_losses_run_on_a_cpu_with_the_patch() -> None:
    from speculators.losses import kl_div_loss, resolve_loss_config
    from speculators.losses.eager import kl_div_loss as eager

    logits, targets = torch.randn(2, 1, 5, 31)
    with on_cpu("speculators"):
        torch.testing.assert_close(kl_div_loss(logits, targets), eager(logits, targets))
        assert resolve_loss_config("kl_div", "fused")["kl_div"][0] is kl_div_loss


def test_speculators_own_losses_of_the_user_stay() -> None:
    from speculators import losses

    def squares(logits: Tensor, targets: Tensor) -> Tensor:
        return (logits - targets).square().mean(-1)

    mask = torch.tensor([[True, False, True]])
    logits, targets = torch.randn(2, 1, 3, 7)
    call = {"loss_mask": mask, "pos_idx": torch.zeros(1, 3), "loss_fn": squares}
    wanted = losses.loss_function(logits, targets, **call)
    with on_cpu("speculators"):
        assert torch.equal(losses.loss_function(logits, targets, **call), wanted)


def test_speculators_teacher_that_wants_a_gradient_gets_it() -> None:
    from speculators import losses
    from speculators.losses.eager import kl_div_loss

    targets = torch.randn(1, 3, 7, requires_grad=True)
    mask = torch.ones(1, 3, dtype=torch.bool)
    with on_cpu("speculators"):
        losses.loss_function(
            torch.randn(1, 3, 7), targets, mask, torch.zeros(1, 3), loss_fn=kl_div_loss
        ).backward()
    assert targets.grad is not None and targets.grad.abs().max() > 0


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_trl_step(beta: float, tmp_path: Path) -> None:
    step = trl_step(tmp_path, beta=beta)
    values, gradients = step()
    with on_cpu("trl"):
        our_values, our_gradients = step()
    torch.testing.assert_close(our_values, values, rtol=1e-5, atol=1e-6)
    assert our_gradients.keys() == gradients.keys()
    for name, wanted in gradients.items():
        assert (our_gradients[name] - wanted).abs().max() < 2e-6 * wanted.abs().max(), name


@pytest.mark.parametrize("reduction", ["batchmean", "sum", "mean", "none"])
@pytest.mark.parametrize("is_labelled", [False, True])
def test_trl_reductions(reduction: str, is_labelled: bool) -> None:
    from trl.experimental.gkd import GKDTrainer

    student, teacher = torch.randn(2, 2, 4, 13)
    labels = torch.tensor([[1, -100, 2, 3], [-100, -100, -100, 1]]) if is_labelled else None
    call = {"labels": labels, "reduction": reduction, "beta": 0.4, "temperature": 1.5}
    wanted = GKDTrainer.generalized_jsd_loss(student, teacher, **call)
    with on_cpu("trl"):
        got = GKDTrainer.generalized_jsd_loss(student, teacher, **call)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)


def test_trl_batch_without_a_label_is_zero_and_differentiable() -> None:
    from trl.experimental.gkd import GKDTrainer

    student = torch.randn(1, 4, 13, requires_grad=True)
    with on_cpu("trl"):
        loss = GKDTrainer.generalized_jsd_loss(
            student, torch.randn(1, 4, 13), labels=torch.full((1, 4), -100)
        )
        loss.backward()
    assert loss == 0 and student.grad is not None and (student.grad == 0).all()
