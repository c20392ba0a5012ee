"""Properties of the EAGLE-3 training step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import eagle3_cases as cases
from specforge_ext.methods.eagle3 import Eagle3Method
from specforge_ext.methods.eagle3.model import Eagle3Draft
from specforge_ext.records import PackedBatch, StepLoss


def run(
    method: Eagle3Method, draft: Eagle3Draft, packed: PackedBatch
) -> tuple[StepLoss, dict[str, Tensor]]:
    draft.zero_grad(set_to_none=True)
    result = method.step(draft, packed, cases.AT)
    result.loss_sum.backward()
    return result, cases.gradients(draft)


def assert_near(got: dict[str, Tensor], expected: dict[str, Tensor], *, tolerance: float) -> None:
    """Largest difference of each tensor against its own largest value."""
    for name, value in expected.items():
        scale = float(value.abs().max()) or 1.0
        error = float((got[name].double() - value.double()).abs().max()) / scale
        assert error <= tolerance, (name, error)


@pytest.mark.parametrize("compaction", [True, False])
@pytest.mark.parametrize(
    ("lengths", "ttt_length", "vocab_size", "heads", "kv_heads"),
    [
        ((17, 5, 1, 23), 7, 23, 4, 2),  # samples shorter than the depth, of one token; groups
        ((29,), 7, None, 4, 4),  # one sample, full vocabulary, no groups
        ((2, 13, 3), 1, 23, 4, 1),  # one step: plain causal attention
        ((31, 12), 3, 7, 2, 1),  # few rows survive the draft's vocabulary
    ],
)
def test_step_is_the_dense_definition(
    lengths: Sequence[int],
    ttt_length: int,
    vocab_size: int | None,
    heads: int,
    kv_heads: int,
    compaction: bool,
) -> None:
    weights = cases.target(heads=heads, kv_heads=kv_heads)
    method, draft, _ = cases.build(
        weights=weights, vocab_size=vocab_size, ttt_length=ttt_length, compaction=compaction
    )
    packed = cases.batch(lengths, seed=3)
    parameters = cases.double_parameters(draft)
    dense = cases.dense_step(parameters, draft, weights, packed)
    dense.loss.backward()
    result, got = run(method, draft, packed)
    assert float(dense.rows[0]) > 0
    assert result.loss_sum.item() == pytest.approx(dense.loss.item(), rel=2e-6)
    wanted = {name: p.grad for name, p in parameters.items() if p.grad is not None}
    assert_near(got, wanted, tolerance=2e-5)
    for name, expected in (
        ("loss", dense.step_loss),
        ("correct", dense.correct),
        ("accepted", dense.accepted),
        ("rows", dense.rows),
        ("scored", dense.scored),
    ):
        torch.testing.assert_close(result.metrics[name], expected, rtol=3e-6, atol=1e-9)
    assert result.weight_sum.item() == dense.rows[0].item()


def test_packed_is_separate() -> None:
    method, draft, _ = cases.build()
    packed = cases.batch((19, 1, 8, 33))
    whole, got = run(method, draft, packed)
    parts = [run(method, draft, sample) for sample in cases.separate(packed)]
    loss = sum(part.loss_sum.item() for part, _ in parts)
    assert whole.loss_sum.item() == pytest.approx(loss, rel=1e-6)
    summed = {name: torch.stack([g[name] for _, g in parts]).sum(0) for name in got}
    assert_near(got, summed, tolerance=2e-6)
    assert whole.weight_sum.item() == sum(part.weight_sum.item() for part, _ in parts)
    for name, value in whole.metrics.items():
        expected = torch.stack([part.metrics[name] for part, _ in parts]).sum(0)
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-9)


def test_compaction_changes_nothing_but_work() -> None:
    packed = cases.batch((40, 3, 21), density=0.3)
    results = [run(*cases.build(compaction=on)[:2], packed) for on in (True, False)]
    (compact, got), (full, expected) = results
    assert compact.loss_sum.item() == pytest.approx(full.loss_sum.item(), rel=1e-6)
    assert_near(got, expected, tolerance=2e-6)
    for name, value in full.metrics.items():
        torch.testing.assert_close(compact.metrics[name], value, rtol=1e-6, atol=1e-9)


def test_what_cannot_matter_is_not_read() -> None:
    method, draft, _ = cases.build()
    packed = cases.batch((30, 11, 26), density=0.3)
    clean, expected = run(method, draft, packed)
    mask = packed.loss_mask.bool()
    aux, last = (packed.features[name].clone() for name in ("aux", "last"))
    last[~torch.cat((mask[:1] & False, mask[:-1]))] = float("nan")
    begin = 0
    for n in packed.lengths:
        scored = mask[begin : begin + n].nonzero()
        aux[begin + (int(scored[-1]) + 1 if len(scored) else 0) : begin + n] = float("nan")
        begin += n
    assert aux.isnan().any(1).sum() > 5
    poisoned, got = run(method, draft, cases.with_features(packed, aux=aux, last=last))
    assert poisoned.loss_sum.item() == clean.loss_sum.item()
    for name, value in expected.items():
        assert torch.equal(got[name], value), name


@pytest.mark.parametrize("u", [4, 9, 20])
def test_rows_see_only_their_past(u: int) -> None:
    """With one scored position u, step i's loss may see aux up to u - i, tokens to u + 1, last[u +
    1].
    """
    method, draft, _ = cases.build(vocab_size=None)
    packed = cases.batch((24,))
    mask = torch.zeros_like(packed.loss_mask)
    mask[u] = 1
    packed = replace(packed, loss_mask=mask)
    before = method.step(draft, packed, cases.AT).metrics["loss"]
    seen = {"aux": 0, "ids": 0, "last": 0}
    for s in range(24):
        aux, last, ids = (
            x.clone() for x in (packed.features["aux"], packed.features["last"], packed.input_ids)
        )
        aux[s] += 1
        last[s] -= 1
        ids[s] = (ids[s] + 7) % cases.VOCAB
        changed = (
            method.step(draft, cases.with_features(packed, aux=aux), cases.AT).metrics["loss"]
            != before
        )
        may = torch.arange(7) <= u - s
        assert not (changed & ~may).any(), s
        seen["aux"] += int(changed.sum())
        changed = (
            method.step(draft, replace(packed, input_ids=ids), cases.AT).metrics["loss"] != before
        )
        assert s <= u + 1 or not changed.any(), s
        seen["ids"] += int(changed.any())
        moved = cases.with_features(packed, last=last)
        changed = method.step(draft, moved, cases.AT).metrics["loss"] != before
        assert s == u + 1 or not changed.any(), s
        seen["last"] += int(changed.any())
    steps = min(u + 1, 7)
    assert seen["last"] == 1
    assert seen["ids"] == u + 1  # all but token 0, which no row reads
    assert seen["aux"] == sum(u - i + 1 for i in range(steps))


def test_masked_rows_have_zero_gradient() -> None:
    method, draft, _ = cases.build(compaction=False)
    packed = cases.batch((12, 9, 14))
    mask = packed.loss_mask.clone()
    mask[6:] = 0  # the rest of sample 0, and the others
    mask[2:6] = 1
    aux = packed.features["aux"].clone().requires_grad_()
    packed = replace(cases.with_features(packed, aux=aux), loss_mask=mask)
    method.step(draft, packed, cases.AT).loss_sum.backward()
    assert aux.grad is not None
    assert (aux.grad[:4].abs().sum(1) > 0).all()
    assert (aux.grad[6:] == 0).all()


@pytest.mark.parametrize("lengths", [(7, 5), (1,)])
def test_nothing_scored_is_zero_with_zero_gradients(lengths: Sequence[int]) -> None:
    """Every parameter still has a gradient, so that no rank of a sharded run is missing in a
    reduction.
    """
    method, draft, _ = cases.build()
    packed = cases.batch(lengths, density=0.0)
    result, got = run(method, draft, packed)
    assert result.loss_sum.item() == 0 and result.weight_sum.item() == 0
    assert all((g == 0).all() for g in got.values())


def test_last_position_never_counts() -> None:
    """Its teacher would be the next sample's first row."""
    method, draft, _ = cases.build(vocab_size=None)
    packed = cases.batch((6, 5))
    before = method.step(draft, packed, cases.AT)
    mask = packed.loss_mask.clone()
    mask[[5, 10]] = 1
    after = method.step(draft, replace(packed, loss_mask=mask), cases.AT)
    assert after.loss_sum.item() == before.loss_sum.item()
    assert torch.equal(after.metrics["scored"], before.metrics["scored"])


def test_padded_denominator() -> None:
    method, draft, _ = cases.build(denominator="all_positions_mean")
    result = method.step(draft, cases.batch((6, 15, 2)), cases.AT)
    assert result.weight_sum.item() == 45


def test_bfloat16_autocast_is_near() -> None:
    method, draft, _ = cases.build()
    packed = cases.batch((33, 18))
    exact, expected = run(method, draft, packed)
    draft.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        result = method.step(draft, packed, cases.AT)
    result.loss_sum.backward()
    assert result.loss_sum.dtype == torch.float32
    assert result.loss_sum.item() == pytest.approx(exact.loss_sum.item(), rel=0.01)
    assert_near(cases.gradients(draft), expected, tolerance=0.1)


def test_bfloat16_features_are_accepted() -> None:
    method, draft, _ = cases.build()
    packed = cases.batch((14,))
    rounded = {name: value.bfloat16() for name, value in packed.features.items()}
    again = {name: value.float() for name, value in rounded.items()}
    loss = method.step(draft, cases.with_features(packed, **rounded), cases.AT).loss_sum
    assert (
        loss.item()
        == method.step(draft, cases.with_features(packed, **again), cases.AT).loss_sum.item()
    )


def test_compiled_step_is_the_same() -> None:
    method, draft, _ = cases.build(ttt_length=2)
    packed = cases.batch((16, 9))
    expected, gradients = run(method, draft, packed)
    draft.zero_grad(set_to_none=True)
    draft.compile(backend="eager")
    result = method.step(draft, packed, cases.AT)
    result.loss_sum.backward()
    assert result.loss_sum.item() == pytest.approx(expected.loss_sum.item(), rel=1e-6)
    assert_near(cases.gradients(draft), gradients, tolerance=2e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("compaction", [True, False])
def test_cuda_step_is_the_cpu_step(compaction: bool) -> None:
    packed = cases.batch((41, 1, 30))
    method, draft, _ = cases.build(compaction=compaction)
    expected, gradients = run(method, draft, packed)
    cuda = torch.device("cuda")
    draft.to(cuda)
    result, got = run(method, draft, packed.to(cuda))
    assert result.loss_sum.item() == pytest.approx(expected.loss_sum.item(), rel=1e-5)
    assert_near({name: g.cpu() for name, g in got.items()}, gradients, tolerance=1e-4)
    with torch.autocast("cuda", torch.bfloat16):
        rounded = method.step(draft, packed.to(cuda), cases.AT).loss_sum
    assert rounded.item() == pytest.approx(expected.loss_sum.item(), rel=0.01)
