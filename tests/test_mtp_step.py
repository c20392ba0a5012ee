"""The training step of multi-token prediction against its definition, and its properties."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import eagle3_cases
import mtp_cases as cases
from specforge_ext.methods.mtp import MtpMethod
from specforge_ext.methods.mtp.init import public_tensors
from specforge_ext.methods.mtp.model import MtpDraft
from specforge_ext.records import PackedBatch, StepLoss


def run(
    method: MtpMethod, draft: MtpDraft, packed: PackedBatch
) -> tuple[StepLoss, dict[str, Tensor]]:
    """The loss, and the gradients under the checkpoint's names."""
    draft.zero_grad(set_to_none=True)
    result = method.step(draft, packed, eagle3_cases.AT)
    result.loss_sum.backward()
    gradients = {}
    for name, parameter in draft.named_parameters():
        assert parameter.grad is not None, name
        gradients[name] = parameter.grad.clone()
    shadow = MtpDraft(draft.config, draft.shape, eagle3_cases.target())
    shadow.load_state_dict(gradients)
    return result, public_tensors(shadow)


def assert_near(got: Mapping[str, Tensor], expected: Mapping[str, Tensor], *, tol: float) -> None:
    """Largest difference of each tensor against its own largest value."""
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        scale = float(value.abs().max()) or 1.0
        error = float((got[name].double() - value.double()).abs().max()) / scale
        assert error <= tol, (name, error)


@pytest.mark.parametrize("compaction", [True, False])
@pytest.mark.parametrize(
    ("form", "kind", "rotary", "lengths", "steps", "more"),
    [
        ("deepseek", {}, 1.0, (17, 5, 1, 23), 4, {}),  # Qwen 3's layer
        ("deepseek", {"qk_norm": False}, 1.0, (2, 13, 3), 1, {"temperature": 0.7}),  # Llama's
        ("qwen3_next", {"gate": True}, 0.5, (19, 8), 3, {}),  # Qwen 3.5's dense layer
        ("qwen3_next", {}, 1.0, (14,), 2, {"loss": "labels"}),
        (
            "deepseek",
            {"qk_norm": False, "bias": True},
            1.0,
            (21, 1, 2),
            3,
            {"step_decay": 0.5, "zero_first_embedding": True},
        ),
        ("qwen3_next", {"gate": True, "bias": True}, 0.25, (16, 7), 3, {"loss": "labels"}),
    ],
)
def test_step_is_the_dense_definition(
    form: str, kind: dict[str, bool], rotary: float, lengths: Sequence[int], steps: int,
    more: dict[str, object], compaction: bool,
) -> None:  # fmt: skip
    tensors = cases.checkpoint(form, **kind)
    method, draft, weights = cases.build(
        tensors=tensors, rotary=rotary, num_steps=steps, compaction=compaction, **more
    )
    packed = cases.batch(lengths, seed=3)
    double = {name: x.double().requires_grad_() for name, x in tensors.items()}
    loss, sums = cases.dense_step(double, form, weights, packed, method.config)
    loss.backward()
    result, got = run(method, draft, packed)
    assert float(sums[3, 0]) > 0
    assert result.loss_sum.item() == pytest.approx(loss.item(), rel=2e-6)
    assert_near(got, {n: x.grad for n, x in double.items() if x.grad is not None}, tol=3e-5)
    labels = method.config.loss == "labels"
    for name, expected in zip(("loss", "correct", "accepted", "rows"), sums, strict=True):
        if name == "accepted" and labels:
            assert name not in result.metrics
        else:
            torch.testing.assert_close(result.metrics[name], expected, rtol=3e-6, atol=1e-9)
    assert result.weight_sum.item() == float(sums[3, 0])


@pytest.mark.parametrize("loss", ["reverse_kl", "jsd", "l1", "lk_alpha", "lk_lambda"])
def test_other_losses_fall_along_their_gradients(loss: str) -> None:
    """Their rows are those of ops.draft_loss, tested there; here: that they arrive."""
    method, draft, _ = cases.build(loss=loss)
    packed = cases.batch((20, 9), density=0.9)
    before, gradients = run(method, draft, packed)
    norm = float(torch.stack([g.square().sum() for g in gradients.values()]).sum())
    with torch.no_grad():
        for parameter in draft.parameters():
            assert parameter.grad is not None
            parameter.sub_(1e-3 / norm * before.loss_sum.item() * parameter.grad)
    after, _ = run(method, draft, packed)
    fall = 1 - after.loss_sum.item() / before.loss_sum.item()
    # LK-lambda's weight of the KL moves with the acceptance, which the gradient leaves out.
    assert fall == pytest.approx(1e-3, rel=0.9 if loss == "lk_lambda" else 0.1)


def test_packed_is_separate() -> None:
    method, draft, _ = cases.build()
    packed = cases.batch((19, 1, 8, 33))
    whole, got = run(method, draft, packed)
    parts = [run(method, draft, sample) for sample in eagle3_cases.separate(packed)]
    loss = sum(part.loss_sum.item() for part, _ in parts)
    assert whole.loss_sum.item() == pytest.approx(loss, rel=1e-6)
    summed = {name: torch.stack([g[name] for _, g in parts]).sum(0) for name in got}
    assert_near(got, summed, tol=2e-6)
    assert whole.weight_sum.item() == sum(part.weight_sum.item() for part, _ in parts)


@pytest.mark.parametrize("loss", ["soft_ce", "labels"])
def test_compaction_changes_nothing_but_work(loss: str) -> None:
    packed = cases.batch((40, 3, 21), density=0.3)
    results = [
        run(*cases.build("qwen3_next", compaction=on, loss=loss)[:2], packed)
        for on in (True, False)
    ]
    (compact, got), (full, expected) = results
    assert compact.loss_sum.item() == pytest.approx(full.loss_sum.item(), rel=1e-6)
    assert_near(got, expected, tol=2e-6)
    for name, value in full.metrics.items():
        torch.testing.assert_close(compact.metrics[name], value, rtol=1e-6, atol=1e-9)


def test_what_cannot_matter_is_not_read() -> None:
    """The target's row u is an input up to the last scored row of its sample, or a teacher after
    one that is scored.
    """
    method, draft, _ = cases.build()
    packed = cases.batch((30, 11, 26), density=0.2)
    clean, expected = run(method, draft, packed)
    last, begin = packed.features["last"].clone(), 0
    for n in packed.lengths:
        scored = packed.loss_mask[begin : begin + n].nonzero()
        last[begin + (int(scored[-1]) + 2 if len(scored) else 0) : begin + n] = float("nan")
        begin += n
    assert last.isnan().any(1).sum() > 5
    poisoned, got = run(method, draft, replace(packed, features={"last": last}))
    assert poisoned.loss_sum.item() == clean.loss_sum.item()
    for name, value in expected.items():
        assert torch.equal(got[name], value), name


def test_the_shared_head_and_embedding_are_frozen_and_not_copied() -> None:
    _, draft, weights = cases.build()
    names = {name for name, _ in draft.named_parameters()}
    assert not {n for n in names if ("embed" in n and "norm" not in n) or "head" in n}
    assert draft.target_head.data_ptr() == weights.lm_head.data_ptr()
    assert draft.embed_tokens.data_ptr() == weights.embed_tokens.data_ptr()
    assert not draft.target_head.requires_grad


@pytest.mark.parametrize("zero", [True, False])
def test_zeroed_first_embedding(zero: bool) -> None:
    """Whether the token that row 0 reads is seen by rows of step 0."""
    method, draft, _ = cases.build(zero_first_embedding=zero, num_steps=1)
    packed = cases.batch((12,), density=1.0)
    ids = packed.input_ids.clone()
    ids[1] = (ids[1] + 1) % eagle3_cases.VOCAB
    before, _ = run(method, draft, packed)
    after, _ = run(method, draft, replace(packed, input_ids=ids))
    assert (before.loss_sum.item() == after.loss_sum.item()) is zero


def test_weight_of_a_step_is_its_decay() -> None:
    packed = cases.batch((25,), density=0.8)
    method, draft, _ = cases.build(num_steps=3, step_decay=0.5)
    result, _ = run(method, draft, packed)
    steps = result.metrics["loss"]
    assert result.loss_sum.item() == pytest.approx(
        float(steps @ torch.tensor([1, 0.5, 0.25]).double())
    )
