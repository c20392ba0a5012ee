"""What every method of the registry promises, and a toy of one folder and one registry line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import method_worker
from method_cases import LENGTHS, VOCAB, Layout, LayoutTarget, Source, Subject, subject
from specforge_ext.evaluate import evaluate
from specforge_ext.export import Observed, read_strict, verify_export, write
from specforge_ext.methods import METHODS, Drafter
from specforge_ext.records import DTYPES, DraftCheckpoint, PackedBatch, StepContext, StepLoss
from specforge_ext.trainer.distributed import World, open_world
from specforge_ext.trainer.loop import Trainer
from toy_decoding import ragged_prompts, random_table
from trainer_toy import config

NAMES = [*METHODS, "toy"]
ALL = list(range(len(LENGTHS)))
ONE_RANK: Layout = [[ALL]]
AT = StepContext(step=2, total_steps=8, seed=0)
"""In the midst of a run: a schedule may leave a parameter without a gradient at its ends."""


@pytest.fixture(autouse=True)
def toy_is_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS._entries, "toy", "toy_method:ToyMethod")


@pytest.fixture(params=NAMES)
def one(request: pytest.FixtureRequest) -> Subject:
    return subject(request.param)


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with open_world(device="cpu", timeout_s=30) as world:
        yield world


def train(world: World, one: Subject, folder: Path, *, layout: Layout = ONE_RANK, **settings: Any):  # type: ignore[no-untyped-def]
    trainer = Trainer(
        config(**{"lr": 1e-3, **settings}),
        one.method,
        one.draft(),
        Source(one, method_worker.STEPS, layout),
        output_dir=folder,
        world=world,
    )
    trainer.fit()
    return trainer.full_state_dict()


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Largest difference."""
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def step(one: Subject, draft: nn.Module, batch: PackedBatch) -> tuple[StepLoss, dict[str, Tensor]]:
    draft.zero_grad(set_to_none=True)
    result = one.method.step(draft, batch, AT)
    if result.loss_sum.requires_grad:
        result.loss_sum.backward()
    return result, {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in draft.named_parameters()
    }


def test_layout_is_of_the_target(one: Subject) -> None:
    spec = one.weights.spec
    for feature in one.layout.features:
        assert feature.width == len(feature.layer_ids) * spec.hidden_size
        assert feature.dtype == spec.dtype
        assert 0 <= min(feature.layer_ids) <= max(feature.layer_ids) <= spec.num_layers


def test_build_follows_the_seed_and_trains_nothing_of_the_target(one: Subject) -> None:
    vocab = one.vocab()
    first, same, other = (one.method.build(one.weights, vocab, seed=s) for s in (1, 1, 2))
    parameters = dict(first.named_parameters())
    assert parameters
    assert all(p.requires_grad and p.dtype == torch.float32 for p in parameters.values())
    assert distance(first.state_dict(), same.state_dict()) == 0
    assert distance(first.state_dict(), other.state_dict()) > 0
    theirs = {t.data_ptr() for t in (one.weights.embed_tokens, one.weights.lm_head)}
    assert not theirs & {p.data_ptr() for p in parameters.values()}


def test_step_gives_sums_and_finite_gradients(one: Subject) -> None:
    draft = one.draft()
    result, gradients = step(one, draft, one.batch(0, ALL))
    for value in (result.loss_sum, result.weight_sum):
        assert value.shape == () and value.dtype == torch.float32
    assert result.loss_sum.item() > 0 and result.weight_sum.item() > 0
    assert not result.weight_sum.requires_grad
    for value in result.metrics.values():
        assert value.dim() <= 1 and value.dtype == torch.float64 and not value.requires_grad
    assert {*result.ratios, *result.ratios.values()} <= result.metrics.keys()
    for name, gradient in gradients.items():
        assert torch.isfinite(gradient).all() and gradient.any(), name


def test_packed_is_separate(one: Subject) -> None:
    draft = one.draft()
    whole, gradients = step(one, draft, one.batch(0, ALL))
    for split in ([[i] for i in ALL], [[4, 0], [5, 3, 1], [2]]):
        parts = [step(one, draft, one.batch(0, own)) for own in split]
        for name in ("loss_sum", "weight_sum"):
            total = sum(getattr(part, name).item() for part, _ in parts)
            assert getattr(whole, name).item() == pytest.approx(total, rel=1e-5)
        for name, value in whole.metrics.items():
            total = torch.stack([part.metrics[name] for part, _ in parts]).sum(0)
            torch.testing.assert_close(value, total, rtol=1e-5, atol=1e-9)
        for name, gradient in gradients.items():
            total = torch.stack([g[name] for _, g in parts]).sum(0)
            scale = float(gradient.abs().max())
            assert float((total - gradient).abs().max()) < 1e-5 * scale, name


def test_samples_do_not_see_each_other(one: Subject) -> None:
    """The metrics of a sample alone, from the packed batch whose other samples change."""
    draft = one.draft()
    batch = one.batch(0, [0, 4])
    ids, mask = batch.input_ids.clone(), batch.loss_mask.clone()
    mask[: LENGTHS[0]] = 0
    alone = PackedBatch(**{**vars(batch), "loss_mask": mask})
    ids[: LENGTHS[0]] = (ids[: LENGTHS[0]] + 7) % VOCAB
    features = {name: x.clone() for name, x in batch.features.items()}
    for x in features.values():
        x[: LENGTHS[0]] += 1
    other = PackedBatch(**{**vars(alone), "input_ids": ids, "features": features})
    (before, g), (after, h) = (step(one, draft, b) for b in (alone, other))
    assert before.loss_sum.item() > 0
    assert after.loss_sum.item() == before.loss_sum.item()
    assert distance(g, h) <= 1e-6 * max(float(x.abs().max()) for x in g.values())


def test_nothing_scored_weighs_nothing(one: Subject) -> None:
    result, gradients = step(one, one.draft(), one.batch(0, ALL, masked=True))
    assert result.loss_sum.item() == 0 and result.weight_sum.item() == 0
    assert not any(g.any() for g in gradients.values())


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_trains_and_resumes_to_the_same_bits(
    world: World, tmp_path: Path, one: Subject, precision: str
) -> None:
    every = {"every_steps": 1, "keep_last": 9}
    whole = train(world, one, tmp_path / "a", checkpoint=every, precision=precision)
    assert all(torch.isfinite(t).all() for t in whole.values() if t.is_floating_point())
    assert distance(whole, one.draft().state_dict()) > 0
    start = str(tmp_path / "a" / "checkpoints" / "step_00000002")
    again = train(
        world, one, tmp_path / "b", checkpoint={**every, "resume": start}, precision=precision
    )
    assert distance(whole, again) == 0


def test_micro_batches_and_recomputation_change_nothing(
    world: World, tmp_path: Path, one: Subject
) -> None:
    whole = train(world, one, tmp_path / "a")
    start = one.draft().state_dict()
    cut = train(world, one, tmp_path / "b", layout=[[[3, 0], [5], [1, 2, 4]]])
    recomputed = train(world, one, tmp_path / "c", activation_checkpointing=True)
    moved = distance(whole, start)
    # Adam turns a gradient's rounding into a share of the rate where the gradient is near zero.
    assert distance(whole, cut) < 0.02 * moved
    assert distance(whole, recomputed) < 0.02 * moved


def test_two_ranks_train_the_same_draft(world: World, tmp_path: Path) -> None:
    """FSDP2 over gloo; one rank gets one micro-batch, the other three."""
    layout: Layout = [[[0, 3]], [[1], [2, 5], [4]]]
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"),
        *("--master-addr", "127.0.0.1", "--master-port", "0"),
        *("--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "--no-python"),
        *(sys.executable, str(Path(__file__).with_name("method_worker.py"))),
        *(str(tmp_path), json.dumps(layout), *NAMES),
    ]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in NAMES:
        one = subject(name)
        single = train(world, one, tmp_path / f"{name}.single")
        two = torch.load(tmp_path / f"{name}.pt", weights_only=True)
        assert distance(single, two) < 0.02 * distance(single, one.draft().state_dict()), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_export_is_the_trained_draft(tmp_path: Path, one: Subject, dtype: torch.dtype) -> None:
    draft, spec = one.draft(), one.weights.spec
    checkpoint = one.method.export(draft, spec, dtype=dtype)
    configs = one.method.engine_configs(checkpoint.config, spec)
    assert configs
    for directory, settings in configs.items():
        json.dumps(dict(settings))
        write(DraftCheckpoint(checkpoint.tensors, settings), tmp_path / "export" / directory)
        schema = one.method.schema(settings)
        assert {n: tuple(t.shape) for n, t in checkpoint.tensors.items()} == {
            n: shape for n, (shape, _) in schema.items()
        }
    first = tmp_path / "export" / next(iter(configs))
    assert isinstance(read_strict(first, one.method), DraftCheckpoint)
    check = verify_export(
        one.method, draft, first, one.weights, observed(one, 3, 12), depth=3, dtype=dtype
    )
    assert check.ok, str(check)


def observed(one: Subject, sequences: int, rows: int) -> Observed:
    generator = torch.Generator().manual_seed(3)
    return Observed(
        next_tokens=torch.randint(VOCAB, (sequences, rows), generator=generator),
        features={
            spec.name: torch.randn(sequences, rows, spec.width, generator=generator).to(
                DTYPES[spec.dtype]
            )
            for spec in one.layout.features
        },
        positions=torch.arange(rows).expand(sequences, -1),
        valid=torch.ones(sequences, rows, dtype=torch.bool),
    )


def show(drafter: Drafter, rows: Observed, columns: slice = slice(None)) -> None:
    features = {name: x[:, columns] for name, x in rows.features.items()}
    drafter.observe(
        rows.next_tokens[:, columns], features, rows.positions[:, columns], rows.valid[:, columns]
    )


def test_proposals_are_tokens_with_their_distributions(one: Subject) -> None:
    drafter = one.method.drafter(one.draft())
    drafter.start(3, 12)
    show(drafter, observed(one, 3, 12))
    greedy = drafter.propose(4, temperature=0, generator=None)
    assert greedy.tokens.shape == (3, 4) and greedy.tokens.dtype == torch.int64
    assert greedy.probs is None
    sampled = drafter.propose(4, temperature=0.8, generator=torch.Generator().manual_seed(1))
    assert sampled.probs is not None and sampled.probs.shape == (3, 4, VOCAB)
    assert sampled.probs.dtype == torch.float32
    torch.testing.assert_close(sampled.probs.sum(-1), torch.ones(3, 4))
    assert (sampled.probs.gather(2, sampled.tokens[..., None]) > 0).all()
    for proposal in (greedy, sampled):
        assert (proposal.tokens >= 0).all() and (proposal.tokens < VOCAB).all()
    # Looking ahead leaves no trace.
    assert torch.equal(drafter.propose(4, temperature=0, generator=None).tokens, greedy.tokens)
    shorter = drafter.propose(2, temperature=0, generator=None).tokens
    assert torch.equal(shorter, greedy.tokens[:, :2])


def test_rows_count_however_they_come(one: Subject) -> None:
    """At once, in parts, among columns that are not valid and hold garbage; after another text."""
    draft, rows = one.draft(), observed(one, 2, 10)

    def probs(drafter: Drafter) -> Tensor:
        out = drafter.propose(3, temperature=1.0, generator=torch.Generator().manual_seed(0)).probs
        assert out is not None
        return out[:, 0]  # later ones depend on the tokens drawn

    whole = one.method.drafter(draft)
    whole.start(2, 10)
    show(whole, rows)
    parts = one.method.drafter(draft)
    parts.start(2, 20)
    show(parts, observed(one, 2, 7))
    parts.start(2, 10)
    for columns in (slice(0, 4), slice(4, 5), slice(5, 10)):
        show(parts, rows, columns)
    torch.testing.assert_close(probs(parts), probs(whole), rtol=1e-4, atol=1e-6)
    holed = one.method.drafter(draft)
    holed.start(2, 20)
    spread = torch.arange(10) * 2
    valid = torch.zeros(2, 20, dtype=torch.bool)
    valid[:, spread] = True
    tokens, positions = torch.full((2, 20), 3), torch.full((2, 20), 77)
    tokens[:, spread], positions[:, spread] = rows.next_tokens, rows.positions
    features = {}
    for name, x in rows.features.items():
        features[name] = torch.full((2, 20, x.shape[2]), float("nan"), dtype=x.dtype)
        features[name][:, spread] = x
    holed.observe(tokens, features, positions, valid)
    torch.testing.assert_close(probs(holed), probs(whole), rtol=1e-4, atol=1e-6)


def test_selected_sequences_go_on_as_if_alone(one: Subject) -> None:
    """Rows that come before and after the others left; looking ahead at once, and further on."""
    draft, rows, chosen = one.draft(), observed(one, 5, 9), torch.tensor([1, 2, 4])
    rows.valid[:, 5] = torch.tensor([True, False, True, True, False])
    fewer = Observed(
        rows.next_tokens[chosen],
        {name: x[chosen] for name, x in rows.features.items()},
        rows.positions[chosen],
        rows.valid[chosen],
    )
    some, alone = one.method.drafter(draft), one.method.drafter(draft)
    some.start(5, 9)
    alone.start(3, 9)
    show(some, rows, slice(0, 6))
    show(alone, fewer, slice(0, 6))
    some.select(chosen)
    for columns in (slice(6, 7), slice(7, 9)):
        got, wanted = (
            drafter.propose(3, temperature=1.0, generator=torch.Generator().manual_seed(0))
            for drafter in (some, alone)
        )
        assert torch.equal(got.tokens, wanted.tokens)
        assert got.probs is not None and wanted.probs is not None
        torch.testing.assert_close(got.probs, wanted.probs, rtol=1e-5, atol=1e-7)
        show(some, fewer, columns)
        show(alone, fewer, columns)
    some.select(torch.tensor([2]))
    last = alone.propose(3, temperature=0, generator=None).tokens[2:]
    assert torch.equal(some.propose(3, temperature=0, generator=None).tokens, last)


def test_drafter_refuses_what_it_cannot_do(one: Subject) -> None:
    drafter = one.method.drafter(one.draft())
    with pytest.raises(ValueError, match="drafter"):
        drafter.propose(1, temperature=0, generator=None)
    drafter.start(1, 4)
    with pytest.raises(ValueError, match="no row"):
        drafter.propose(1, temperature=0, generator=None)
    with pytest.raises(ValueError, match="columns"):
        show(drafter, observed(one, 1, 5))


def test_decoding_is_lossless(one: Subject) -> None:
    target = LayoutTarget(random_table(3, VOCAB, seed=1))
    prompts = ragged_prompts(4, VOCAB, seed=2)
    result = evaluate(
        target, one.method.drafter(one.draft()), prompts, one.layout,
        depth=3, max_new_tokens=12, temperature=0, seed=0,
    )  # fmt: skip
    for prompt, tokens in zip(prompts, result.tokens, strict=True):
        assert tokens.tolist() == target.greedy(prompt.tolist(), 12)
    sampled = evaluate(
        target, one.method.drafter(one.draft()), prompts, one.layout,
        depth=3, max_new_tokens=12, temperature=0.8, seed=0,
    )  # fmt: skip
    assert all(len(tokens) == 12 for tokens in sampled.tokens)
