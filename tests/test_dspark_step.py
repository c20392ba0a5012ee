"""A DSpark step against its definition in float64, and what may and may not matter to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import block_cases
import dspark_cases as cases
from specforge_ext.methods._block.plan import Anchors, draw, plan
from specforge_ext.methods.dspark import DSparkMethod
from specforge_ext.methods.dspark.model import DSparkDraft, Objective, SparkLoss
from specforge_ext.methods.dspark.plan import with_teachers
from specforge_ext.records import PackedBatch, StepLoss


def run(
    method: DSparkMethod, draft: DSparkDraft, packed: PackedBatch, at: Anchors | None = None
) -> tuple[StepLoss, dict[str, Tensor]]:
    draft.zero_grad(set_to_none=True)
    at = at or draw(packed, block_cases.AT, num_anchors=method.config.num_anchors)
    result = method.step_at(draft, packed, at)
    result.loss_sum.backward()
    return result, block_cases.gradients(draft)


def assert_near(got: dict[str, Tensor], expected: dict[str, Tensor], *, tolerance: float) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        scale = float(value.abs().max())
        assert float((got[name] - value).abs().max()) <= tolerance * max(scale, 1e-12), name


# Lengths, and what is set. Every head; decay; no confidence head; no hard labels; other weights.
DEFINITIONS: list[tuple[Sequence[int], dict[str, object]]] = [
    ((19, 1, 8, 33), {}),
    ((19, 1, 8, 33), {"markov_head": "gated", "gamma": 2.0, **block_cases.MIXED}),
    ((19, 1, 8, 33), {"markov_head": "rnn", "gamma": 2.0}),
    ((40,), {"block_size": 2, "num_layers": 1, "layer_ids": (3, 8), "markov_head": "rnn"}),
    ((30, 30), {"block_size": 11, "num_anchors": 3, "gamma": 7.0, "markov_head": "rnn"}),
    ((26, 12), {"confidence_weight": 0.0, "markov_head": "gated"}),
    ((26, 12), {"ce_weight": 0.0, "confidence_weight": 0.3, "markov_rank": 1}),
    ((26, 12), {"ce_weight": 2.0, "l1_weight": 0.25}),
]  # fmt: skip


@pytest.mark.parametrize(("lengths", "config"), DEFINITIONS)
def test_step_is_the_definition(lengths: Sequence[int], config: dict[str, object]) -> None:
    method, draft, _ = cases.build(**config)
    packed = cases.batch(lengths, seed=3, density=0.8)
    at = draw(packed, block_cases.AT, num_anchors=method.config.num_anchors)
    parameters = block_cases.double_parameters(draft)
    places = block_cases.by_sample(at, packed.lengths)
    dense = cases.dense_step(parameters, method, draft, packed, places)
    dense.loss_sum.backward()
    result, got = run(method, draft, packed, at)
    assert len(dense.scored) > 2 and dense.scored.sum() > 4
    assert result.loss_sum.item() == pytest.approx(dense.loss_sum.item(), rel=2e-6)
    assert result.weight_sum.item() == pytest.approx(dense.weight, rel=1e-6)
    assert_near(
        got,
        {name: p.grad for name, p in parameters.items() if p.grad is not None},
        tolerance=2e-5,
    )
    wanted = {
        "loss": dense.loss,
        "correct": dense.correct,
        "rows": dense.scored,
        "accepted": dense.correct.cumprod(1),
        "blocks": dense.scored.cumprod(1),
        "acceptance": dense.accepted,
        "reached": dense.accepted.cumprod(1),
        "foretold_error": dense.foretold_error,
    }
    if not method.config.confidence_weight:
        assert "foretold_error" not in result.metrics
        wanted.pop("foretold_error")
    assert result.metrics.keys() == wanted.keys()
    for name, expected in wanted.items():
        torch.testing.assert_close(result.metrics[name], expected.sum(0), rtol=1e-5, atol=1e-6)


def test_slots_after_a_gap_are_not_scored() -> None:
    """Block at 2: labels 3 and 4, then a gap; 6 and 7 are scored for other blocks only."""
    method, draft, _ = cases.build()
    packed = cases.batch((12,))
    mask = torch.zeros(12, dtype=torch.uint8)
    mask[[2, 3, 4, 6, 7]] = 1
    packed = replace(packed, loss_mask=mask)
    result, _ = run(method, draft, packed, block_cases.anchors([[2]], [12]))
    assert result.metrics["rows"].tolist() == [1, 1, 0, 0, 0]
    assert result.weight_sum.item() == 2
    later = packed.input_ids.clone()
    later[5:] = (later[5:] + 3) % block_cases.VOCAB
    changed, _ = run(
        method, draft, replace(packed, input_ids=later), block_cases.anchors([[2]], [12])
    )
    assert changed.loss_sum.item() == result.loss_sum.item()


@pytest.mark.parametrize("kind", cases.KINDS)
def test_packed_is_separate(kind: str) -> None:
    """With the anchors that each sample draws by itself: the packing does not change them."""
    method, draft, _ = cases.build(markov_head=kind, gamma=3.0)
    packed = cases.batch((19, 1, 8, 33))
    whole, got = run(method, draft, packed)
    parts = [run(method, draft, sample) for sample in block_cases.separate(packed)]
    loss = sum(part.loss_sum.item() for part, _ in parts)
    assert whole.loss_sum.item() == pytest.approx(loss, rel=1e-6)
    summed = {name: torch.stack([g[name] for _, g in parts]).sum(0) for name in got}
    assert_near(got, summed, tolerance=5e-6)
    weight = sum(part.weight_sum.item() for part, _ in parts)
    assert whole.weight_sum.item() == pytest.approx(weight, rel=1e-6)


def block_rows(
    method: DSparkMethod, draft: DSparkDraft, packed: PackedBatch, at: Anchors
) -> Tensor:
    """[A, B] losses."""
    blocks, teachers = with_teachers(
        plan(packed, at, block_size=method.config.block_size, first_label=1, stops_at_gap=True)
    )
    objective = Objective(0.1, 0.9, 1.0, None)
    features = packed.features
    with torch.no_grad():
        rows: SparkLoss = draft(
            features["hidden"], features["last"], packed.input_ids, blocks, teachers, objective
        )
    return blocks.by_block(rows.loss)


@pytest.mark.parametrize("kind", cases.KINDS)
def test_no_leak_between_blocks_samples_or_to_earlier_slots(kind: str) -> None:
    """Slot k of the block at a: features before a, the tokens a..a+k+1 (the last of them as its
    label), of which "rnn" sees all and the others a, a+k and the label, and `last` at a+k.
    """
    method, draft, _ = cases.build(markov_head=kind)
    packed = replace(cases.batch((16, 14)), loss_mask=torch.ones(30, dtype=torch.uint8))
    places, starts = [[4, 6, 9], [3, 5]], [0, 16]
    at = block_cases.anchors(places, packed.lengths)
    before = block_rows(method, draft, packed, at)
    anchors = [(s, starts[s] + a) for s, own in enumerate(places) for a in own]
    slots = range(block_cases.BLOCK)
    for t in range(30):
        ids = packed.input_ids.clone()
        ids[t] = (ids[t] + 7) % block_cases.VOCAB
        read = block_rows(method, draft, replace(packed, input_ids=ids), at)
        moved = {}
        for name in ("hidden", "last"):
            values = packed.features[name].clone()
            values[t] += torch.randn(values.shape[1], generator=torch.Generator().manual_seed(t))
            features = {**packed.features, name: values}
            moved[name] = block_rows(method, draft, replace(packed, features=features), at)
        for block, (s, anchor) in enumerate(anchors):
            sees = starts[s] <= t < anchor
            assert bool((moved["hidden"][block] != before[block]).any()) == sees, (t, block)
            judged = (moved["last"][block] != before[block]).nonzero()[:, 0].tolist()
            assert judged == [k for k in slots if t == anchor + k], (t, block)
            told = (read[block] != before[block]).nonzero()[:, 0].tolist()
            if t == anchor:
                wanted = list(slots)  # slot 0's token, which the whole block sees
            elif kind == "rnn":
                wanted = [k for k in slots if anchor < t <= anchor + k + 1]
            else:
                wanted = [k for k in slots if anchor < t in (anchor + k, anchor + k + 1)]
            assert told == wanted, (t, block)


def test_padding_of_anchors_costs_nothing() -> None:
    """Blocks without a label are left out, as in SpecForge those whose anchor is padding."""
    method, draft, _ = cases.build(markov_head="rnn")
    packed = cases.batch((20, 20))
    mask = torch.ones(40, dtype=torch.uint8)
    mask[8:20] = 0
    packed = replace(packed, loss_mask=mask)
    padded = block_cases.anchors([[2, 10, 12], [0, 19]], packed.lengths)
    with_them, got = run(method, draft, packed, padded)
    only = block_cases.anchors([[2], [0]], packed.lengths)
    without, expected = run(method, draft, packed, only)
    assert with_them.loss_sum.item() == without.loss_sum.item()
    assert all(torch.equal(got[name], value) for name, value in expected.items())


def test_what_cannot_matter_is_not_read() -> None:
    """`last` where no row is judged, features from a sample's last anchor on."""
    method, draft, _ = cases.build()
    packed = replace(cases.batch((20, 14)), loss_mask=torch.ones(34, dtype=torch.uint8))
    at = block_cases.anchors([[3, 5], [2]], packed.lengths)
    clean, expected = run(method, draft, packed, at)
    hidden, last = (packed.features[name].clone() for name in ("hidden", "last"))
    hidden[6:20], hidden[23:] = float("nan"), float("nan")
    last[:3], last[10:22], last[27:] = (float("nan") for _ in range(3))
    features = {"hidden": hidden, "last": last}
    poisoned, got = run(method, draft, replace(packed, features=features), at)
    assert poisoned.loss_sum.item() == clean.loss_sum.item()
    for name, value in expected.items():
        assert torch.equal(got[name], value), name


def test_teachers_are_shared_by_blocks_that_overlap() -> None:
    packed = replace(cases.batch((9,)), loss_mask=torch.ones(9, dtype=torch.uint8))
    at = block_cases.anchors([[1, 2, 6]], [9])
    blocks, teachers = with_teachers(
        plan(packed, at, block_size=3, first_label=1, stops_at_gap=True)
    )
    assert teachers.places.tolist() == [1, 2, 3, 4, 6, 7]
    assert teachers.row_to_teacher.tolist() == [0, 1, 1, 2, 2, 3, 4, 5]
    assert blocks.rows.tolist() == [0, 1, 3, 2, 4, 5, 6, 7]
    assert blocks.slots.tolist() == [0, 1, 0, 2, 1, 2, 0, 1]


@pytest.mark.parametrize("lengths", [(7, 5), (1,)])
@pytest.mark.parametrize("kind", cases.KINDS)
def test_nothing_scored_is_zero_with_zero_gradients(lengths: Sequence[int], kind: str) -> None:
    method, draft, _ = cases.build(markov_head=kind)
    result, got = run(method, draft, cases.batch(lengths, density=0.0))
    assert result.loss_sum.item() == 0 and result.weight_sum.item() == 0
    assert all((g == 0).all() for g in got.values())


def test_the_targets_tensors_get_no_gradient() -> None:
    method, draft, _ = cases.build()
    names = {name.split(".")[0] for name, _ in draft.named_parameters()}
    assert names == {"fc", "hidden_norm", "layers", "norm", "markov_head", "confidence_head"}
    draft.target_head.requires_grad_()  # and would get none if it were a parameter
    run(method, draft, cases.batch((20,)))
    assert draft.target_head.grad is None


def test_the_confidence_head_does_not_move_the_rest_by_its_target() -> None:
    """Its target is detached: with the loss of the confidence alone w2 gets nothing."""
    method, draft, _ = cases.build(ce_weight=0.0, l1_weight=1e-30)
    _, got = run(method, draft, cases.batch((20,)))
    assert float(got["markov_head.markov_w2.weight"].abs().max()) < 1e-25
    assert float(got["markov_head.markov_w1.weight"].abs().max()) > 1e-4  # which it reads
    assert float(got["confidence_head.proj.weight"].abs().max()) > 1e-4


@pytest.mark.parametrize("kind", cases.KINDS)
def test_bfloat16_autocast_is_near(kind: str) -> None:
    method, draft, _ = cases.build(markov_head=kind, gamma=4.0)
    packed = cases.batch((33, 18))
    exact, expected = run(method, draft, packed)
    draft.zero_grad()
    at = draw(packed, block_cases.AT, num_anchors=6)
    with torch.autocast("cpu", torch.bfloat16):
        result = method.step_at(draft, packed, at)
    result.loss_sum.backward()
    assert result.loss_sum.dtype == torch.float32
    assert result.loss_sum.item() == pytest.approx(exact.loss_sum.item(), rel=0.02)
    assert_near(block_cases.gradients(draft), expected, tolerance=0.15)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", cases.KINDS)
def test_cuda_step_is_the_cpu_step(kind: str) -> None:
    packed = cases.batch((41, 1, 30))
    method, draft, _ = cases.build(weights=block_cases.target(head_dim=16), markov_head=kind)
    expected, gradients = run(method, draft, packed)
    cuda = torch.device("cuda")
    draft.to(cuda)
    result, got = run(method, draft, packed.to(cuda))
    assert result.loss_sum.item() == pytest.approx(expected.loss_sum.item(), rel=1e-5)
    assert_near({name: g.cpu() for name, g in got.items()}, gradients, tolerance=1e-4)
    with torch.autocast("cuda", torch.bfloat16):
        rounded, _ = run(method, draft, packed.to(cuda))
    assert rounded.loss_sum.item() == pytest.approx(expected.loss_sum.item(), rel=0.02)
