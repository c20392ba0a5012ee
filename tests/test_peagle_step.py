"""The P-EAGLE training step against its dense float64 definition, and its properties."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

import eagle3_cases as cases
import peagle_cases as peagle
from specforge_ext.methods.peagle import PEagleMethod
from specforge_ext.methods.peagle.model import PEagleDraft
from specforge_ext.methods.peagle.plan import draw_chains
from specforge_ext.records import PackedBatch, StepContext, StepLoss, lengths_to_cu_seqlens


def run(
    method: PEagleMethod, draft: PEagleDraft, packed: PackedBatch, at: StepContext = peagle.AT
) -> tuple[StepLoss, dict[str, Tensor]]:
    draft.zero_grad(set_to_none=True)
    result = method.step(draft, packed, at)
    result.loss_sum.backward()
    return result, peagle.gradients(draft)


def assert_near(got: dict[str, Tensor], expected: dict[str, Tensor], *, tolerance: float) -> None:
    """Largest difference of each tensor against its own largest value."""
    assert set(got) == set(expected)
    for name, value in expected.items():
        scale = float(value.abs().max()) or 1.0
        error = float((got[name].double() - value.double()).abs().max()) / scale
        assert error <= tolerance, (name, error)


@pytest.mark.parametrize("compaction", [True, False])
@pytest.mark.parametrize(
    ("lengths", "vocab_size", "options"),
    [
        ((24, 5, 1, 17), 23, {"num_depths": 6}),  # samples of one token, shorter than the depths
        ((31,), None, {"num_layers": 1}),  # one layer: it is first and last
        ((12, 19), 23, {"num_layers": 3, "num_depths": 4, "temperature": 1.4}),
        ((9, 14), 7, {"num_depths": 1}),  # no chains; few rows survive the draft's vocabulary
        ((20, 8), 23, {"down_sample_ratio": 1.0, "num_depths": 5}),  # every chain, none dropped
        ((40,), 23, {"down_sample_ratio": 0.3, "down_sample_ratio_min": 0.0}),
    ],
)
def test_step_is_the_dense_definition(
    lengths: Sequence[int], vocab_size: int | None, options: dict[str, object], compaction: bool
) -> None:
    method, draft, weights = peagle.build(
        vocab_size=vocab_size, compaction=compaction, mask_token_id=7, **options
    )
    packed = cases.batch(lengths, seed=3, density=0.7)
    chains = draw_chains(packed, peagle.AT, method.config)
    parameters = peagle.double_parameters(draft)
    loss, sums = peagle.dense_step(parameters, draft, weights, packed, chains)
    loss.backward()
    result, got = run(method, draft, packed)
    assert float(sums[3].min()) > 0 or "down_sample_ratio" in options
    assert result.loss_sum.item() == pytest.approx(loss.item(), rel=3e-6)
    wanted = {
        name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in parameters.items()
    }
    assert_near(got, wanted, tolerance=4e-5)
    names = ("loss", "correct", "accepted", "rows", "scored")
    for name, expected in zip(names, sums, strict=True):
        torch.testing.assert_close(result.metrics[name], expected, rtol=3e-6, atol=1e-9)
    assert result.weight_sum.item() == sums[3].sum().item()


def test_embedding_and_mask_vector_are_trained() -> None:
    method, draft, _ = peagle.build(mask_token_id=60)
    _, got = run(method, draft, cases.batch((24,), density=0.9))
    assert got["mask_hidden"].abs().min() > 0
    assert got["embed_tokens.weight"][60].abs().max() > 0


def test_packed_is_separate() -> None:
    """The draw too: it is keyed by the sample, whatever it is packed with."""
    method, draft, _ = peagle.build(num_depths=5)
    packed = cases.batch((29, 1, 12, 33), density=0.8)
    whole, got = run(method, draft, packed)
    parts = [run(method, draft, sample) for sample in cases.separate(packed)]
    total = sum(p.loss_sum.item() for p, _ in parts)
    assert whole.loss_sum.item() == pytest.approx(total, rel=1e-6)
    assert_near(got, {k: torch.stack([g[k] for _, g in parts]).sum(0) for k in got}, tolerance=3e-6)
    for name, value in whole.metrics.items():
        expected = torch.stack([part.metrics[name] for part, _ in parts]).sum(0)
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-9)


def test_compaction_changes_nothing_but_work() -> None:
    packed = cases.batch((40, 3, 21), density=0.4)
    (compact, got), (full, expected) = (
        run(*peagle.build(compaction=on, num_layers=3)[:2], packed) for on in (True, False)
    )
    assert compact.loss_sum.item() == pytest.approx(full.loss_sum.item(), rel=1e-6)
    assert_near(got, expected, tolerance=3e-6)
    for name, value in full.metrics.items():
        torch.testing.assert_close(compact.metrics[name], value, rtol=1e-6, atol=1e-9)


def test_steps_draw_anew() -> None:
    method, draft, _ = peagle.build()
    packed = cases.batch((40,), density=0.9)
    losses = {
        method.step(draft, packed, StepContext(step=step, total_steps=9, seed=seed)).loss_sum.item()
        for step, seed in ((0, 0), (1, 0), (0, 1), (0, 0))
    }
    assert len(losses) == 3


def test_what_cannot_matter_is_not_read() -> None:
    method, draft, _ = peagle.build()
    packed = cases.batch((30, 11, 26), density=0.5)
    clean, expected = run(method, draft, packed)
    mask = packed.loss_mask.bool()
    aux, last = (packed.features[name].clone() for name in ("aux", "last"))
    last[~torch.cat((mask[:1] & False, mask[:-1]))] = float("nan")
    begin = 0
    for n in packed.lengths:
        scored = mask[begin : begin + n].nonzero()
        aux[begin + (int(scored[-1]) + 1 if len(scored) else 0) : begin + n] = float("nan")
        begin += n
    assert aux.isnan().any() and last.isnan().any()
    poisoned, got = run(method, draft, cases.with_features(packed, aux=aux, last=last))
    assert poisoned.loss_sum.item() == clean.loss_sum.item()
    assert all(torch.equal(got[name], value) for name, value in expected.items())


@pytest.mark.parametrize("u", [6, 13])
def test_rows_see_only_their_past(u: int) -> None:
    """With one scored position u, depth d may see aux up to u - d, tokens to u - d + 1."""
    method, draft, _ = peagle.build(vocab_size=None, down_sample_ratio=1.0, num_depths=5)
    packed = replace(cases.batch((20,)), loss_mask=torch.ones(20, dtype=torch.uint8))
    chains = draw_chains(packed, peagle.AT, method.config)
    mask = torch.zeros_like(packed.loss_mask)
    mask[u] = 1
    packed = replace(packed, loss_mask=mask)

    def losses(packed: PackedBatch) -> Tensor:
        return method.step_with(draft, packed, chains).metrics["loss"]

    before, seen = losses(packed), torch.zeros(2, 5, dtype=torch.int64)
    assert (before > 0).all()
    for s in range(20):
        aux, ids = packed.features["aux"].clone(), packed.input_ids.clone()
        aux[s] += 1
        ids[s] = (ids[s] + 7) % cases.VOCAB
        of_aux = losses(cases.with_features(packed, aux=aux)) != before
        of_ids = losses(replace(packed, input_ids=ids)) != before
        depth = torch.arange(5)
        assert not (of_aux & (s > u - depth)).any(), s
        assert not (of_ids & (s > u - depth + 1)).any(), s
        seen += torch.stack((of_aux, of_ids))
    # Token 0 is read by no row.
    assert seen[0].tolist() == seen[1].tolist() == [u - d + 1 for d in range(5)]


def test_no_chain_sees_another() -> None:
    """The key of (a, 1) reaches (a, 2), and no row of another anchor."""
    method, draft, _ = peagle.build(vocab_size=None, num_depths=3, num_layers=2)
    packed = replace(cases.batch((16,)), loss_mask=torch.tensor([1] * 15 + [0], dtype=torch.uint8))
    both = [torch.tensor([4, 7], dtype=torch.int32), torch.tensor([4, 7], dtype=torch.int32)]
    alone = [torch.tensor([7], dtype=torch.int32)] * 2
    deep = [both[0], torch.tensor([7], dtype=torch.int32)]
    results = [method.step_with(draft, packed, c).metrics["loss"] for c in (both, alone, deep)]
    of_7 = results[1][2]
    assert results[2][2].item() == pytest.approx(of_7.item(), rel=1e-6)
    assert results[0][2].item() != pytest.approx(of_7.item(), rel=1e-3)  # (4, 2) counts too
    assert results[0][1].item() == pytest.approx(results[2][1].item(), rel=1e-6)


@pytest.mark.parametrize("lengths", [(7, 5), (1,)])
def test_nothing_scored_is_zero_with_zero_gradients(lengths: Sequence[int]) -> None:
    method, draft, _ = peagle.build()
    result, got = run(method, draft, cases.batch(lengths, density=0.0))
    assert result.loss_sum.item() == 0 and result.weight_sum.item() == 0
    assert all((g == 0).all() for g in got.values())


def test_gradient_by_finite_differences() -> None:
    """Along one direction of all parameters, float32 loss against its own gradient."""
    method, draft, _ = peagle.build(num_depths=4)
    packed = cases.batch((18, 9), density=0.8)
    _, gradients = run(method, draft, packed)
    generator = torch.Generator().manual_seed(0)
    direction = {k: torch.randn(g.shape, generator=generator) for k, g in gradients.items()}
    slope = sum(float((gradients[k] * direction[k]).sum()) for k in gradients)
    values = []
    for step in (2e-4, -2e-4):
        moved = {k: p.detach() + step * direction[k] for k, p in draft.named_parameters()}
        kept = {k: p.detach().clone() for k, p in draft.named_parameters()}
        draft.load_state_dict(moved)
        values.append(method.step(draft, packed, peagle.AT).loss_sum.item())
        draft.load_state_dict(kept)
    assert (values[0] - values[1]) / 4e-4 == pytest.approx(slope, rel=5e-3)


def test_bfloat16_autocast_is_near() -> None:
    method, draft, _ = peagle.build()
    packed = cases.batch((33, 18), density=0.8)
    exact, expected = run(method, draft, packed)
    draft.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        result = method.step(draft, packed, peagle.AT)
    result.loss_sum.backward()
    assert result.loss_sum.item() == pytest.approx(exact.loss_sum.item(), rel=0.02)
    assert_near(peagle.gradients(draft), expected, tolerance=0.15)


def test_compiled_step_is_the_same() -> None:
    method, draft, _ = peagle.build(num_depths=2, num_layers=1)
    packed = cases.batch((16,), density=0.8)
    expected, gradients = run(method, draft, packed)
    draft.compile(backend="eager")
    result, got = run(method, draft, packed)
    assert result.loss_sum.item() == pytest.approx(expected.loss_sum.item(), rel=1e-6)
    assert_near(got, gradients, tolerance=2e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_step_is_the_cpu_step() -> None:
    packed = cases.batch((41, 1, 30), density=0.8)
    method, draft, _ = peagle.build()
    expected, gradients = run(method, draft, packed)
    draft.to("cuda")
    result, got = run(method, draft, packed.to(torch.device("cuda")))
    assert result.loss_sum.item() == pytest.approx(expected.loss_sum.item(), rel=1e-5)
    assert_near({name: g.cpu() for name, g in got.items()}, gradients, tolerance=1e-4)


def test_packed_positions_of_chains() -> None:
    """Sample 1's anchors are behind sample 0's, at every depth."""
    method, _, _ = peagle.build(num_depths=4, down_sample_ratio=1.0)
    packed = cases.batch((10, 14), density=1.0)
    chains = draw_chains(packed, peagle.AT, method.config)
    starts = lengths_to_cu_seqlens(packed.lengths).tolist()
    for d, anchors in enumerate(chains, 1):
        # Every chain but what min(V - d, ...) drops: V = n - 1 scored positions, from d on.
        for begin, end in pairwise(starts):
            inside = [a for a in anchors.tolist() if begin <= a < end]
            assert inside == list(range(begin, end - 1 - d))
