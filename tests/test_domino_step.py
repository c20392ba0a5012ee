"""A Domino step against the dense definition in float64, and what may and may not matter to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import block_cases
import domino_cases as cases
from specforge_ext.methods._block.plan import Anchors, draw, plan
from specforge_ext.methods.domino import DominoConfig, DominoMethod
from specforge_ext.methods.domino.model import DominoDraft, PrefixGru
from specforge_ext.methods.domino.plan import corrections
from specforge_ext.records import PackedBatch, StepContext, StepLoss
from specforge_ext.trainer.distributed import open_world
from specforge_ext.trainer.sharding import Shards

END = StepContext(step=19, total_steps=20, seed=7)
SHIFTED: dict[str, object] = {"shift_label": True}


def run(
    method: DominoMethod,
    draft: DominoDraft,
    packed: PackedBatch,
    anchors: Anchors | None = None,
    at: StepContext = cases.AT,
) -> tuple[StepLoss, dict[str, Tensor]]:
    draft.zero_grad(set_to_none=True)
    anchors = anchors or draw(packed, at, num_anchors=method.config.num_anchors)
    result = method.step_at(draft, packed, at, anchors)
    result.loss_sum.backward()
    return result, block_cases.gradients(draft)


def assert_near(got: dict[str, Tensor], expected: dict[str, Tensor], *, tolerance: float) -> None:
    """Largest difference of each tensor against its own largest value."""
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        scale = float(value.abs().max()) or 1.0
        error = float((got[name].double() - value.double()).abs().max()) / scale
        assert error <= tolerance, (name, error)


def summed(parts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([part[name] for part in parts]).sum(0) for name in parts[0]}


DEFINITIONS: list[tuple[Sequence[int], dict[str, object]]] = [
    ((17, 6, 1, 23), {}),  # samples shorter than a block and of one token
    ((17, 6, 1, 23), SHIFTED),
    ((23, 9), {"gamma": 3.0, **block_cases.MIXED}),
    ((23, 9), {"gamma": 3.0, **SHIFTED, **block_cases.MIXED}),
    ((40,), {"block_size": 3, "num_layers": 1, "layer_ids": (3, 8)}),  # one corrected slot
    ((40,), {"block_size": 2, "num_layers": 1, "layer_ids": (3, 8), **SHIFTED}),
    ((30, 30), {"block_size": 11, "num_anchors": 20, "gamma": 7.0}),  # many tokens read twice
    ((30, 30), {"block_size": 11, "num_anchors": 2, **SHIFTED}),  # few
]


@pytest.mark.parametrize("step", [0, 4, 15])
@pytest.mark.parametrize(("lengths", "config"), DEFINITIONS)
def test_step_is_the_dense_definition(
    lengths: Sequence[int], config: dict[str, object], step: int
) -> None:
    method, draft, _ = cases.build(**config)
    packed = block_cases.batch(lengths, seed=3)
    at = StepContext(step=step, total_steps=20, seed=7)
    anchors = draw(packed, at, num_anchors=method.config.num_anchors)
    parameters = block_cases.double_parameters(draft)
    places = block_cases.by_sample(anchors, packed.lengths)
    dense = cases.dense_step(parameters, method, draft, packed, places)
    share = {0: 1.0, 4: 0.6, 15: 0.0}[step]
    loss = (1 - share) * dense.final + share * dense.base
    loss.backward()
    result, got = run(method, draft, packed, anchors, at)
    assert len(dense.ce) > 2 and dense.scored.sum() > 4
    assert result.loss_sum.item() == pytest.approx(loss.item(), rel=2e-6)
    assert result.weight_sum.item() == pytest.approx(dense.weight, rel=1e-6)
    wanted = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in parameters.items()}
    assert_near(got, {name: wanted[name] for name in got}, tolerance=2e-5)
    assert bool(got["prefix_gru.weight_hh_l0"].any()) == (share < 1 and dense.ce.shape[1] > 1)
    scored = dense.scored.double()
    for prefix, ce, correct in (
        ("", dense.ce, dense.correct),
        ("base_", dense.base_ce, dense.base_correct),
    ):
        right = correct.double()
        for name, expected in {
            "loss": (ce * scored).sum(0),
            "correct": right.sum(0),
            "accepted": right.cumprod(1).sum(0),
        }.items():
            got_metric = result.metrics[prefix + name]
            torch.testing.assert_close(got_metric, expected, rtol=3e-6, atol=1e-9)
    torch.testing.assert_close(result.metrics["rows"], scored.sum(0))
    torch.testing.assert_close(result.metrics["blocks"], scored.cumprod(1).sum(0))


def test_recurrence_is_torchs() -> None:
    ours, torchs = PrefixGru(6, 5), nn.GRU(6, 5, bias=False, batch_first=True)
    ours.load_state_dict(torchs.state_dict())
    assert [*ours.state_dict()] == ["weight_ih_l0", "weight_hh_l0"]
    x = torch.randn(4, 7, 6)
    expected, _ = torchs(x)
    state = ours.initial(4)
    for j in range(7):
        state = ours.advance(ours.gates(x[:, j]), state)
        torch.testing.assert_close(state, expected[:, j])


@pytest.mark.parametrize(
    ("start", "ratio", "total", "expected"),
    [
        (1.0, 0.5, 200, {0: 1.0, 30: 0.7, 100: 0.0, 199: 0.0}),
        (0.8, 1.0, 10, {0: 0.8, 5: 0.4, 9: 0.08}),
        (1.0, 0.3, 9, {0: 1.0, 1: 0.5, 2: 0.0}),  # int(2.7) steps
        (1.0, 0.0, 10, {0: 1.0, 1: 0.0}),
        (0.0, 0.5, 10, {0: 0.0, 3: 0.0}),
        (1.0, 0.5, 1, {0: 1.0}),
    ],
)
def test_base_share_follows_the_optimizers_step(
    start: float, ratio: float, total: int, expected: dict[int, float]
) -> None:
    config = DominoConfig(lambda_start=start, lambda_decay_ratio=ratio)
    for step, share in expected.items():
        assert config.base_share(step, total) == pytest.approx(share, abs=1e-12)
    method, draft, _ = cases.build(lambda_start=start, lambda_decay_ratio=ratio)
    packed = block_cases.batch((30, 20))
    anchors = draw(packed, cases.AT, num_anchors=6)
    for step, share in expected.items():
        at = StepContext(step=step, total_steps=total, seed=0)
        result, _ = run(method, draft, packed, anchors, at)
        final, base = result.metrics["loss"].sum(), result.metrics["base_loss"].sum()
        mixed = float((1 - share) * final + share * base)
        assert result.loss_sum.item() == pytest.approx(mixed, rel=1e-6)


@pytest.mark.parametrize("config", [{}, {"gamma": 2.0, **SHIFTED, **block_cases.MIXED}])
@pytest.mark.parametrize("at", [cases.AT, END])
def test_packed_is_separate(config: dict[str, object], at: StepContext) -> None:
    """With the anchors that each sample draws by itself: the packing does not change them."""
    method, draft, _ = cases.build(**config)
    packed = block_cases.batch((19, 1, 8, 33))
    whole, got = run(method, draft, packed, at=at)
    parts = [run(method, draft, sample, at=at) for sample in block_cases.separate(packed)]
    loss = sum(part.loss_sum.item() for part, _ in parts)
    assert whole.loss_sum.item() == pytest.approx(loss, rel=1e-6)
    assert_near(got, summed([g for _, g in parts]), tolerance=3e-6)
    weight = sum(part.weight_sum.item() for part, _ in parts)
    assert whole.weight_sum.item() == pytest.approx(weight, rel=1e-6)
    for name, value in whole.metrics.items():
        expected = torch.stack([part.metrics[name] for part, _ in parts]).sum(0)
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-9)


def test_mean_of_micro_batches() -> None:
    """SpecForge's: every micro-batch's mean counts the same, however many rows it has."""
    rows, draft, _ = cases.build(gamma=2.0)
    means, _, _ = cases.build(gamma=2.0, denominator="micro_batch_mean")
    for packed in (block_cases.batch((33, 18)), block_cases.batch((9,))):
        by_rows, gradients = run(rows, draft, packed)
        by_mean, got = run(means, draft, packed)
        weight = by_rows.weight_sum.item() + 1e-6
        assert weight > 2 and by_mean.weight_sum.item() == 1
        assert by_mean.loss_sum.item() == pytest.approx(by_rows.loss_sum.item() / weight, rel=1e-6)
        scaled = {name: g / weight for name, g in gradients.items()}
        assert_near(got, scaled, tolerance=1e-6)
    nothing, got = run(means, draft, block_cases.batch((9,), density=0.0))
    assert nothing.loss_sum.item() == 0 and nothing.weight_sum.item() == 1
    assert not any(g.any() for g in got.values())


@pytest.mark.parametrize("shift", [False, True])
def test_no_leak_between_blocks_samples_or_from_the_label_on(shift: bool) -> None:
    """The row that predicts the token at p from anchor a: features before a, tokens a..p-1, label.

    Its uncorrected loss: features before a, the token at a, label.
    """
    method, draft, _ = cases.build(shift_label=shift)
    packed = replace(block_cases.batch((16, 14)), loss_mask=torch.ones(30, dtype=torch.uint8))
    places, starts = [[4, 6, 9], [3, 5]], [0, 16]
    at = block_cases.anchors(places, packed.lengths)
    before = row_losses(method, draft, packed, at)
    anchors = [(starts[s], starts[s] + a) for s, own in enumerate(places) for a in own]
    first = int(not shift)
    slots = range(first, block_cases.BLOCK)
    for t in range(30):
        hidden, ids = packed.features["hidden"].clone(), packed.input_ids.clone()
        hidden[t] += 1
        ids[t] = (ids[t] + 7) % cases.VOCAB
        changed = row_losses(method, draft, replace(packed, features={"hidden": hidden}), at)
        read = row_losses(method, draft, replace(packed, input_ids=ids), at)
        for block, (start, anchor) in enumerate(anchors):
            for kind in range(2):
                moved = [k for k in slots if changed[kind, block, k] != before[kind, block, k]]
                assert moved == [*slots] * (start <= t < anchor), (t, block)
                told = [k for k in slots if read[kind, block, k] != before[kind, block, k]]
                label_of = t - anchor - 1 + first  # the slot that predicts t
                if t == anchor:
                    wanted = [*slots]
                elif label_of not in slots:
                    wanted = []
                else:
                    wanted = [*range(label_of, slots.stop)] if kind == 0 else [label_of]
                assert told == wanted, (t, block, kind)


def row_losses(
    method: DominoMethod, draft: DominoDraft, packed: PackedBatch, at: Anchors
) -> Tensor:
    """[2, A, B]: final and base."""
    config = method.config
    blocks = plan(packed, at, block_size=config.block_size, first_label=int(config.shift_label))
    with torch.no_grad():
        rows = draft(
            packed.features["hidden"],
            packed.input_ids,
            blocks,
            corrections(blocks, config, base_share=0.5),
        )
    return torch.stack([blocks.by_block(rows.loss), blocks.by_block(rows.base_loss)])


def test_tokens_read_once_or_per_block_are_the_same() -> None:
    method, draft, _ = cases.build()
    ids = torch.randint(cases.VOCAB, (25,))
    anchors = torch.tensor([0, 3, 4, 9, 15, 16, 23])
    many = draft.prefix_states(ids, anchors, 4)  # 28 places
    few = draft.prefix_states(ids, anchors[:5], 4)  # 20
    torch.testing.assert_close(many[:5], few)
    assert many.shape == (7, 4, cases.STATE) and method.config.first == 1


def test_blocks_without_a_label_are_left_out() -> None:
    """As the padding of anchors, which SpecForge computes: the result is as without them."""
    for config in ({}, SHIFTED):
        method, draft, _ = cases.build(**config)
        packed = block_cases.batch((20, 20))
        mask = torch.ones(40, dtype=torch.uint8)
        mask[8:20] = 0
        packed = replace(packed, loss_mask=mask)
        padded = block_cases.anchors([[2, 10, 12], [0, 19]], packed.lengths)
        with_them, got = run(method, draft, packed, padded)
        alone = block_cases.anchors([[2], [0]], packed.lengths)
        without, expected = run(method, draft, packed, alone)
        assert with_them.loss_sum.item() == without.loss_sum.item()
        assert all(torch.equal(got[name], value) for name, value in expected.items())


@pytest.mark.parametrize("lengths", [(7, 5), (1,)])
def test_nothing_scored_is_zero_with_zero_gradients(lengths: Sequence[int]) -> None:
    method, draft, _ = cases.build()
    result, got = run(method, draft, block_cases.batch(lengths, density=0.0))
    assert result.loss_sum.item() == 0 and result.weight_sum.item() == 0
    assert all((g == 0).all() for g in got.values())


def test_the_frozen_head_and_embedding_get_no_gradient() -> None:
    method, draft, _ = cases.build()
    names = {name.split(".")[0] for name, _ in draft.named_parameters()}
    assert names == {"fc", "hidden_norm", "layers", "norm", "prefix_gru", "embed_proj"}
    draft.target_head.requires_grad_()  # and would get none if it were a parameter
    draft.embed_tokens.requires_grad_(False)
    run(method, draft, block_cases.batch((20,)))
    assert draft.target_head.grad is None


def test_bfloat16_autocast_is_near() -> None:
    method, draft, _ = cases.build(gamma=4.0)
    packed = block_cases.batch((33, 18))
    exact, expected = run(method, draft, packed)
    draft.zero_grad()
    anchors = draw(packed, cases.AT, num_anchors=6)
    with torch.autocast("cpu", torch.bfloat16):
        result = method.step_at(draft, packed, cases.AT, anchors)
    result.loss_sum.backward()
    assert result.loss_sum.dtype == torch.float32
    assert result.loss_sum.item() == pytest.approx(exact.loss_sum.item(), rel=0.02)
    assert_near(block_cases.gradients(draft), expected, tolerance=0.1)


def test_fsdp2_casts_neither_positions_nor_weights() -> None:
    """It casts floating tensors that a module is given, those in dataclasses and tuples too."""
    method, draft, _ = cases.build(gamma=3.0)
    seen: list[tuple[str, torch.dtype]] = []

    def look_at_layer(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        _, context, view, *_ = arguments
        seen.append(("context", context.dtype))
        seen.extend(("table", t.dtype) for t in (*view.context, *view.block))

    def look_at_draft(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        seen.append(("weight", arguments[3].weight.dtype))

    with open_world(device="cpu", timeout_s=30) as world:
        shards = Shards(draft, method.shard_units(draft), world=world, precision="bfloat16")
        draft.register_forward_pre_hook(look_at_draft)
        for layer in draft.layers:
            layer.register_forward_pre_hook(look_at_layer)
        shards.gather()
        with torch.autocast("cpu", torch.bfloat16):
            method.step(draft, block_cases.batch((20, 9)), cases.AT)
    dtypes = {name: {dtype for other, dtype in seen if other == name} for name, _ in seen}
    assert dtypes == {
        "weight": {torch.float32},
        "context": {torch.bfloat16},  # or nothing would be shown
        "table": {torch.float32},
    }


def test_a_fresh_draft_corrects_nothing() -> None:
    """So that it starts as its backbone, which it is warm-started to."""
    method, shaken, weights = cases.build(warm_start="target", layer_ids=(2, 7))
    draft = method.build(weights, method.vocab([], weights.spec), seed=0)
    packed = block_cases.batch((30, 20))
    result, _ = run(method, draft, packed, at=END)
    assert torch.equal(result.metrics["loss"], result.metrics["base_loss"])
    result, _ = run(method, shaken, packed, at=END)
    assert not torch.equal(result.metrics["loss"], result.metrics["base_loss"])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("config", [{}, {**SHIFTED, **block_cases.MIXED}])
def test_cuda_step_is_the_cpu_step(config: dict[str, object]) -> None:
    packed = block_cases.batch((41, 1, 30))
    method, draft, _ = cases.build(weights=cases.target(head_dim=16), **config)
    expected, gradients = run(method, draft, packed)
    cuda = torch.device("cuda")
    draft.to(cuda)
    result, got = run(method, draft, packed.to(cuda))
    assert result.loss_sum.item() == pytest.approx(expected.loss_sum.item(), rel=1e-5)
    assert_near({name: g.cpu() for name, g in got.items()}, gradients, tolerance=1e-4)
    with torch.autocast("cuda", torch.bfloat16):
        rounded, _ = run(method, draft, packed.to(cuda))
    assert rounded.loss_sum.item() == pytest.approx(expected.loss_sum.item(), rel=0.02)
