"""A DFlash step against the dense definition in float64, and what may and may not matter to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import block_cases as cases
from specforge_ext.methods._block.objective import DpaceKind, dpace_weight, slot_decay
from specforge_ext.methods._block.plan import Anchors, draw, plan
from specforge_ext.methods._common import sample_keys
from specforge_ext.methods.dflash import DFlashMethod
from specforge_ext.methods.dflash.model import DFlashDraft
from specforge_ext.nn.layer import Attention, Tables
from specforge_ext.ops import reference
from specforge_ext.records import PackedBatch, StepContext, StepLoss
from specforge_ext.trainer.distributed import open_world
from specforge_ext.trainer.sharding import Shards


def run(
    method: DFlashMethod, draft: DFlashDraft, packed: PackedBatch, at: Anchors | None = None
) -> tuple[StepLoss, dict[str, Tensor]]:
    draft.zero_grad(set_to_none=True)
    at = at or draw(packed, cases.AT, num_anchors=method.config.num_anchors)
    result = method.step_at(draft, packed, at)
    result.loss_sum.backward()
    return result, cases.gradients(draft)


def assert_near(got: dict[str, Tensor], expected: dict[str, Tensor], *, tolerance: float) -> None:
    """Largest difference of each tensor against its own largest value."""
    for name, value in expected.items():
        scale = float(value.abs().max()) or 1.0
        error = float((got[name].double() - value.double()).abs().max()) / scale
        assert error <= tolerance, (name, error)


DEFINITIONS: list[tuple[Sequence[int], dict[str, object]]] = [
    ((17, 6, 1, 23), {}),  # samples shorter than a block and of one token
    ((23, 9), {"gamma": 3.0, **cases.MIXED}),  # sliding and full layers, decay
    ((40,), {"block_size": 2, "num_layers": 1, "layer_ids": (3, 8)}),  # the smallest block
    (
        (30, 30),
        {  # blocks longer than the rest of their samples, a window longer than all
            "block_size": 11,
            "num_anchors": 3,
            "layer_types": ("sliding_attention",) * 2,
            "sliding_window": 100,
            "gamma": 7.0,
        },
    ),
    ((12, 19), {"dpace": "suffix", "dpace_alpha": 0.5}),
    ((12, 19), {"dpace": "prefix", "dpace_alpha": 0.2}),
    ((12, 19), {"dpace": "suffix_over_prefix", "dpace_alpha": 0.9, **cases.MIXED}),
]


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (2, 2)])
@pytest.mark.parametrize(("lengths", "config"), DEFINITIONS)
def test_step_is_the_dense_definition(
    lengths: Sequence[int], config: dict[str, object], heads: int, kv_heads: int
) -> None:
    weights = cases.target(heads=heads, kv_heads=kv_heads)
    method, draft, _ = cases.build(weights=weights, **config)
    packed = cases.batch(lengths, seed=3)
    if draft.block_shape.features_width != cases.FEATURES:
        raise AssertionError("the cases' batches have features of two layers")
    at = draw(packed, cases.AT, num_anchors=method.config.num_anchors)
    parameters = cases.double_parameters(draft)
    dense = cases.dense_step(parameters, method, draft, packed, cases.by_sample(at, packed.lengths))
    dense.loss.backward()
    result, got = run(method, draft, packed, at)
    assert len(dense.ce) > 2 and dense.scored.sum() > 4
    assert result.loss_sum.item() == pytest.approx(dense.loss.item(), rel=2e-6)
    assert result.weight_sum.item() == pytest.approx(dense.weight, rel=1e-6)
    wanted = {name: p.grad for name, p in parameters.items() if p.grad is not None}
    assert_near(got, wanted, tolerance=2e-5)
    scored, right = dense.scored[:, 1:].double(), dense.correct[:, 1:].double()
    for name, expected in {
        "loss": (dense.ce[:, 1:] * scored).sum(0),
        "correct": right.sum(0),
        "rows": scored.sum(0),
        "accepted": right.cumprod(1).sum(0),
        "blocks": scored.cumprod(1).sum(0),
    }.items():
        torch.testing.assert_close(result.metrics[name], expected, rtol=3e-6, atol=1e-9)


@pytest.mark.parametrize("config", [{}, {"gamma": 2.0, **cases.MIXED}, {"dpace": "suffix"}])
def test_packed_is_separate(config: dict[str, object]) -> None:
    """With the anchors that each sample draws by itself: the packing does not change them."""
    method, draft, _ = cases.build(**config)
    packed = cases.batch((19, 1, 8, 33))
    whole, got = run(method, draft, packed)
    parts = [run(method, draft, sample) for sample in cases.separate(packed)]
    loss = sum(part.loss_sum.item() for part, _ in parts)
    assert whole.loss_sum.item() == pytest.approx(loss, rel=1e-6)
    summed = {name: torch.stack([g[name] for _, g in parts]).sum(0) for name in got}
    assert_near(got, summed, tolerance=2e-6)
    weight = sum(part.weight_sum.item() for part, _ in parts)
    assert whole.weight_sum.item() == pytest.approx(weight, rel=1e-6)
    for name, value in whole.metrics.items():
        expected = torch.stack([part.metrics[name] for part, _ in parts]).sum(0)
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-9)


def test_anchors_depend_on_seed_step_and_sample_alone() -> None:
    packed = cases.batch((40, 25, 31), density=0.9)
    whole = cases.by_sample(draw(packed, cases.AT, num_anchors=4), packed.lengths)
    for sample, own in zip(cases.separate(packed), whole, strict=True):
        assert cases.by_sample(draw(sample, cases.AT, num_anchors=4), sample.lengths) == [own]
    assert all(len(own) == 4 for own in whole)
    for other in (replace(cases.AT, step=4), replace(cases.AT, seed=8)):
        assert cases.by_sample(draw(packed, other, num_anchors=4), packed.lengths) != whole
    later = replace(cases.AT, total_steps=99)
    assert cases.by_sample(draw(packed, later, num_anchors=4), packed.lengths) == whole
    assert sample_keys([f"s{k}" for k in range(1000)]).unique().numel() == 1000
    assert sample_keys(["s0"]).item() == -3923385926934806093  # on every machine, for ever


def test_anchors_are_scored_tokens_before_scored_ones() -> None:
    packed = cases.batch((40, 2, 1, 31))
    drawn = draw(packed, cases.AT, num_anchors=100).places.long()
    mask = packed.loss_mask.bool()
    follows = torch.cat((mask[1:], mask[:1]))
    ends = torch.tensor(packed.lengths).cumsum(0) - 1
    wanted = mask & follows
    wanted[ends] = False
    assert torch.equal(drawn, wanted.nonzero()[:, 0])


def test_no_leak_between_blocks_samples_or_from_the_anchor_on() -> None:
    """Block at anchor a of sample s: features of s before a, the token at a, labels; nothing else.

    SpecForge once let blocks see each other, and shifted the mask of packed samples wrongly.
    """
    for config in ({}, cases.MIXED):
        method, draft, _ = cases.build(**config)
        packed = replace(cases.batch((16, 14)), loss_mask=torch.ones(30, dtype=torch.uint8))
        places = [[4, 6, 9], [3, 5]]
        at = cases.anchors(places, packed.lengths)
        before = block_losses(method, draft, packed, at)
        starts = [0, 16]
        anchors = [(s, starts[s] + a) for s, own in enumerate(places) for a in own]
        seen_any = False
        for t in range(30):
            hidden, ids = packed.features["hidden"].clone(), packed.input_ids.clone()
            hidden[t] += 1
            ids[t] = (ids[t] + 7) % cases.VOCAB
            changed = block_losses(method, draft, replace(packed, features={"hidden": hidden}), at)
            read = block_losses(method, draft, replace(packed, input_ids=ids), at)
            for block, (s, anchor) in enumerate(anchors):
                sees = starts[s] <= t < anchor  # with a sliding layer, through the other one
                moved = bool((changed[block] != before[block]).any())
                assert moved == sees, (t, block)
                seen_any |= moved
                told = (read[block] != before[block]).nonzero()[:, 0].tolist()
                if t == anchor:
                    assert told == [1, 2, 3, 4]
                else:
                    assert told == [t - anchor] * (anchor < t < anchor + cases.BLOCK)
        assert seen_any


def block_losses(
    method: DFlashMethod, draft: DFlashDraft, packed: PackedBatch, at: Anchors
) -> Tensor:
    """[A, B]."""
    blocks = plan(packed, at, block_size=method.config.block_size, first_label=0)
    with torch.no_grad():
        rows = draft(packed.features["hidden"], packed.input_ids, blocks)
    return blocks.by_block(rows.loss)


def test_sliding_layers_forget() -> None:
    """Two sliding layers: context before the window of slot 0 cannot matter."""
    config = {"layer_types": ("sliding_attention",) * 2, "sliding_window": 5}
    method, draft, _ = cases.build(**config)
    packed = replace(cases.batch((16,)), loss_mask=torch.ones(16, dtype=torch.uint8))
    at = cases.anchors([[9]], [16])
    before = block_losses(method, draft, packed, at)
    for t in range(16):
        hidden = packed.features["hidden"].clone()
        hidden[t] += 1
        moved = block_losses(method, draft, replace(packed, features={"hidden": hidden}), at)
        changed = (moved != before)[0].nonzero()[:, 0].tolist()
        # Slot j sees t >= 9 + j - 4 in a layer, and the slots before it, which saw more.
        assert changed == ([1, 2, 3, 4] if 5 <= t < 9 else []), t


def test_what_cannot_matter_is_not_read() -> None:
    """Features after a sample's last anchor are not read; a block without a label costs nothing."""
    method, draft, _ = cases.build()
    packed = cases.batch((30, 11, 26))
    at = draw(packed, cases.AT, num_anchors=2)
    clean, expected = run(method, draft, packed, at)
    hidden = packed.features["hidden"].clone()
    own = cases.by_sample(at, packed.lengths)
    begin = 0
    for n, places in zip(packed.lengths, own, strict=True):
        hidden[begin + (max(places) + 1 if places else 0) : begin + n] = float("nan")
        begin += n
    assert hidden.isnan().any(1).sum() > 5
    poisoned, got = run(method, draft, replace(packed, features={"hidden": hidden}), at)
    assert poisoned.loss_sum.item() == clean.loss_sum.item()
    for name, value in expected.items():
        assert torch.equal(got[name], value), name


def test_blocks_without_a_label_are_left_out() -> None:
    """As the padding of anchors, which SpecForge computes: the result is as without them."""
    method, draft, _ = cases.build()
    packed = cases.batch((20, 20))
    mask = torch.ones(40, dtype=torch.uint8)
    mask[8:20] = 0
    packed = replace(packed, loss_mask=mask)
    padded = cases.anchors([[2, 10, 12], [0, 19]], packed.lengths)
    blocks = plan(packed, padded, block_size=cases.BLOCK, first_label=0)
    assert blocks.anchors.tolist() == [2, 20]
    assert blocks.context.tolist() == [0, 1, 2, 20]
    with_them, got = run(method, draft, packed, padded)
    without, expected = run(method, draft, packed, cases.anchors([[2], [0]], packed.lengths))
    assert with_them.loss_sum.item() == without.loss_sum.item()
    assert all(torch.equal(got[name], value) for name, value in expected.items())


def test_labels_stop_at_a_gap_where_asked() -> None:
    mask = torch.zeros(12, dtype=torch.uint8)
    mask[[2, 3, 4, 6, 7]] = 1
    packed = replace(cases.batch((12,)), loss_mask=mask)
    at = cases.anchors([[2]], [12])

    def supervised(**settings: bool | int) -> list[int]:
        blocks = plan(packed, at, block_size=6, **settings)  # type: ignore[arg-type]
        assert torch.equal(blocks.rows, blocks.slots)
        assert blocks.labels[0, blocks.rows].tolist() == [
            2 + int(settings["first_label"]) + k for k in blocks.slots.tolist()
        ]
        return blocks.slots.tolist()

    assert supervised(first_label=0) == [1, 2, 4, 5]
    assert supervised(first_label=0, stops_at_gap=True) == [1, 2]
    assert supervised(first_label=1) == [0, 1, 3, 4]
    assert supervised(first_label=1, stops_at_gap=True) == [0, 1]


def test_slot_decay() -> None:
    assert slot_decay(4, gamma=None, first=1).tolist() == [1, 1, 1, 1]
    wanted = torch.exp(-torch.tensor([0.0, 0.0, 1.0, 2.0]) / 7)
    torch.testing.assert_close(slot_decay(4, gamma=7.0, first=1), wanted)
    wanted = torch.exp(-torch.tensor([0.0, 1.0, 2.0, 3.0]) / 7)
    torch.testing.assert_close(slot_decay(4, gamma=7.0, first=0), wanted)


def test_dpace_weight_by_hand() -> None:
    """Slots of chance 1/2, 1/4, unsupervised with garbage, 1/2; alpha 0."""
    loss = -torch.tensor([[0.5, 0.25, 1.0, 0.5]]).log()
    loss[0, 2] = float("nan")
    supervised = torch.tensor([[True, True, False, True]])
    prefix = torch.tensor([[1 / 2, 1 / 8, 0, 1 / 16]])
    suffix = torch.tensor([[11 / 16, 3 / 16, 0, 1 / 16]])
    kinds: list[tuple[DpaceKind, Tensor]] = [
        ("prefix", prefix),
        ("suffix", suffix),
        ("suffix_over_prefix", torch.tensor([[11 / 8, 3 / 2, 0, 1]])),
    ]
    for kind, wanted in kinds:
        got = dpace_weight(loss, supervised, alpha=0.0, kind=kind)
        torch.testing.assert_close(got, wanted)
    certain = dpace_weight(loss, supervised, alpha=1.0, kind="suffix")
    torch.testing.assert_close(certain, torch.tensor([[3.0, 2, 0, 1]]))


@pytest.mark.parametrize("lengths", [(7, 5), (1,)])
def test_nothing_scored_is_zero_with_zero_gradients(lengths: Sequence[int]) -> None:
    method, draft, _ = cases.build()
    packed = cases.batch(lengths, density=0.0)
    result, got = run(method, draft, packed)
    assert result.loss_sum.item() == 0 and result.weight_sum.item() == 0
    assert all((g == 0).all() for g in got.values())


def test_the_frozen_head_and_embedding_get_no_gradient() -> None:
    method, draft, _ = cases.build()
    names = {name.split(".")[0] for name, _ in draft.named_parameters()}
    assert names == {"fc", "hidden_norm", "layers", "norm"}
    assert not draft.target_head.requires_grad and not draft.embed_tokens.requires_grad
    draft.target_head.requires_grad_()  # and would get none if it were a parameter
    run(method, draft, cases.batch((20,)))
    assert draft.target_head.grad is None


def test_bfloat16_autocast_is_near() -> None:
    method, draft, _ = cases.build(gamma=4.0)
    packed = cases.batch((33, 18))
    exact, expected = run(method, draft, packed)
    draft.zero_grad()
    at = draw(packed, cases.AT, num_anchors=6)
    with torch.autocast("cpu", torch.bfloat16):
        result = method.step_at(draft, packed, at)
    result.loss_sum.backward()
    assert result.loss_sum.dtype == torch.float32
    assert result.loss_sum.item() == pytest.approx(exact.loss_sum.item(), rel=0.02)
    assert_near(cases.gradients(draft), expected, tolerance=0.1)


def test_compiled_step_is_the_same() -> None:
    method, draft, _ = cases.build(**cases.MIXED)
    packed = cases.batch((16, 9))
    expected, gradients = run(method, draft, packed)
    for layer in method.shard_units(draft):
        layer.compile(backend="eager")
    result, got = run(method, draft, packed)
    assert result.loss_sum.item() == pytest.approx(expected.loss_sum.item(), rel=1e-6)
    assert_near(got, gradients, tolerance=2e-6)


def test_visibility_is_that_of_the_attention() -> None:
    """The dense definition used here sees what ops.reference.block_visibility sees."""
    at = cases.anchors([[5]], [9])
    visible = reference.block_visibility(
        at.places, at.bounds, torch.tensor([0, 9], dtype=torch.int32),
        num_context=9, block_size=4, window=3,
    )  # fmt: skip
    assert visible[0].nonzero()[:, 0].tolist() == [3, 4, 9]
    assert visible[3].nonzero()[:, 0].tolist() == [9, 10, 11, 12]


def test_step_draws_what_its_context_says() -> None:
    method, draft, _ = cases.build(num_anchors=2)
    packed = cases.batch((40, 30))

    def loss(step: int, seed: int) -> float:
        at = StepContext(step=step, total_steps=9, seed=seed)
        return method.step(draft, packed, at).loss_sum.item()

    assert len({loss(0, 0), loss(1, 0), loss(0, 1)}) == 3
    assert loss(1, 0) == loss(1, 0)


def test_fsdp2_leaves_the_rotary_tables_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """It casts the arguments of a layer to bfloat16, dataclasses too."""
    method, draft, _ = cases.build()
    packed = cases.batch((16, 9))
    at = draw(packed, cases.AT, num_anchors=6)
    expected, seen = method.step_at(draft, packed, at), set()
    whole = Attention.query

    def query(self: Attention, x: Tensor, tables: Tables) -> Tensor:
        seen.add((x.dtype, *(table.dtype for table in tables)))
        return whole(self, x, tables)

    monkeypatch.setattr(Attention, "query", query)
    with open_world(device="cpu", timeout_s=30) as world:
        Shards(draft, method.shard_units(draft), world=world, precision="bfloat16")
        with torch.autocast("cpu", torch.bfloat16):
            result = method.step_at(draft, packed, at)
    assert seen == {(torch.bfloat16, torch.float32, torch.float32)}
    assert result.loss_sum.item() == pytest.approx(expected.loss_sum.item(), rel=0.02)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("config", [{}, cases.MIXED])
def test_cuda_step_is_the_cpu_step(config: dict[str, object]) -> None:
    packed = cases.batch((41, 1, 30))
    weights = cases.target(head_dim=16)
    method, draft, _ = cases.build(weights=weights, **config)
    expected, gradients = run(method, draft, packed)
    cuda = torch.device("cuda")
    draft.to(cuda)
    result, got = run(method, draft, packed.to(cuda))
    assert result.loss_sum.item() == pytest.approx(expected.loss_sum.item(), rel=1e-5)
    assert_near({name: g.cpu() for name, g in got.items()}, gradients, tolerance=1e-4)
    with torch.autocast("cuda", torch.bfloat16):
        rounded, _ = run(method, draft, packed.to(cuda))
    assert rounded.loss_sum.item() == pytest.approx(expected.loss_sum.item(), rel=0.02)
