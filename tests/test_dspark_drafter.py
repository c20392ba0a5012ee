"""The drafter tells each token the one before, stops where it doubts, and loses nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import block_cases
import dspark_cases as cases
from specforge_ext.evaluate import evaluate
from specforge_ext.methods.dspark.drafter import DSparkDrafter
from specforge_ext.records import PackedBatch
from test_dflash_drafter import LAYOUT, FeatureTarget, observe
from toy_decoding import ragged_prompts, random_table


def started(drafter: DSparkDrafter, samples: list[PackedBatch], anchors: list[int]) -> None:
    drafter.start(len(samples), 40)
    observe(drafter, samples, [range(a) for a in anchors])  # type: ignore[arg-type]


def dense(
    draft: torch.nn.Module, sample: PackedBatch, anchor: int, tokens: list[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [K, V] and confidence [K] in float64, of the block at anchor, told these tokens."""
    parameters = {name: p.detach().double() for name, p in draft.named_parameters()}
    states = block_cases.dense_block(parameters, draft, sample, anchor)  # type: ignore[arg-type]
    ids = [int(sample.input_ids[anchor]), *tokens]
    logits, confidence = cases.dense_block_logits(parameters, draft, states, ids)  # type: ignore[arg-type]
    return torch.stack(logits), torch.sigmoid(torch.stack(confidence))


@pytest.mark.parametrize("kind", cases.KINDS)
@pytest.mark.parametrize("config", [{}, block_cases.MIXED])
def test_a_block_is_the_training_block_told_the_same_tokens(
    kind: str, config: dict[str, object]
) -> None:
    """Distributions behind sampled tokens are the definition's when it is fed these tokens."""
    method, draft, _ = cases.build(markov_head=kind, **config)
    samples = block_cases.separate(cases.batch((30, 22), density=1.0))
    drafter, places = method.drafter(draft), [9, 4]
    started(drafter, samples, places)
    proposal = drafter.propose(5, temperature=0.8, generator=torch.Generator().manual_seed(3))
    assert proposal.probs is not None and proposal.lengths is None
    for b, (sample, anchor) in enumerate(zip(samples, places, strict=True)):
        logits, _ = dense(draft, sample, anchor, proposal.tokens[b].tolist())
        wanted = torch.softmax(logits / 0.8, 1)
        torch.testing.assert_close(proposal.probs[b].double(), wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", cases.KINDS)
def test_greedy_tokens_follow_one_another(kind: str) -> None:
    """Each is the argmax once it has been told the one before, and that matters."""
    method, draft, _ = cases.build(markov_head=kind)
    samples = block_cases.separate(cases.batch((20,) * 6, density=1.0))
    drafter = method.drafter(draft)
    started(drafter, samples, [7] * 6)
    proposal = drafter.propose(5, temperature=0, generator=None)
    assert proposal.probs is None and proposal.tokens.shape == (6, 5)
    plain = draft.logits(drafter.states()).argmax(-1)
    for b, sample in enumerate(samples):
        tokens = proposal.tokens[b].tolist()
        assert dense(draft, sample, 7, tokens)[0].argmax(1).tolist() == tokens
    assert not torch.equal(proposal.tokens, plain)
    shorter = drafter.propose(2, temperature=0, generator=None)
    assert torch.equal(shorter.tokens, proposal.tokens[:, :2])  # and the look-ahead left no trace


@pytest.mark.parametrize("kind", cases.KINDS)
def test_the_cut_is_at_the_product_of_confidences(kind: str) -> None:
    method, draft, _ = cases.build(markov_head=kind)
    samples = block_cases.separate(cases.batch((20,) * 8, density=1.0))
    whole = method.drafter(draft)
    started(whole, samples, [7] * 8)
    tokens = whole.propose(5, temperature=0, generator=None).tokens
    survival = torch.stack(
        [
            dense(draft, sample, 7, tokens[b].tolist())[1].cumprod(0)
            for b, sample in enumerate(samples)
        ]
    )
    cut = float(survival.flatten().sort().values[14:16].mean())
    drafter = DSparkDrafter(draft, confidence_cut=cut)
    started(drafter, samples, [7] * 8)
    proposal = drafter.propose(5, temperature=0, generator=None)
    assert torch.equal(proposal.tokens, tokens)
    assert proposal.lengths is not None
    assert torch.equal(proposal.lengths, (survival >= cut).sum(1))
    assert len(set(proposal.lengths.tolist())) > 1
    assert torch.equal(proposal.proposed(), survival >= cut)


def test_the_config_sets_the_cut() -> None:
    for cut, lengths in ((0.0, [5, 5]), (1.0, [0, 0])):
        method, draft, _ = cases.build(confidence_cut=cut)
        drafter = method.drafter(draft)
        started(drafter, block_cases.separate(cases.batch((12, 12))), [6, 4])
        proposal = drafter.propose(5, temperature=0, generator=None)
        assert proposal.lengths is not None and proposal.lengths.tolist() == lengths


@pytest.mark.parametrize("cut", [None, 0.3, 1.0])
@pytest.mark.parametrize("kind", cases.KINDS)
def test_greedy_decoding_is_lossless(kind: str, cut: float | None) -> None:
    method, draft, _ = cases.build(markov_head=kind, confidence_cut=cut)
    target = FeatureTarget(random_table(3, block_cases.VOCAB, seed=1))
    prompts = ragged_prompts(5, block_cases.VOCAB, seed=2)
    result = evaluate(
        target, method.drafter(draft), prompts, LAYOUT,
        depth=4, max_new_tokens=17, temperature=0, seed=0,
    )  # fmt: skip
    for prompt, tokens in zip(prompts, result.tokens, strict=True):
        assert tokens.tolist() == target.greedy(prompt.tolist(), 17)
    most = 4 * int(result.steps.sum())
    if cut is None:
        assert result.drafted == most
    elif cut == 1.0:
        assert result.drafted == 0 and int(result.steps.sum()) == 5 * 16
    else:
        assert 0 < result.drafted < most


@pytest.mark.parametrize("cut", [None, 0.35])
def test_sampled_decoding_is_lossless(cut: float | None) -> None:
    """Second to fourth token of many continuations against the chain's own distribution."""
    method, draft, _ = cases.build(confidence_cut=cut)
    table = random_table(1, block_cases.VOCAB, seed=3, scale=3.0)  # a Markov chain
    count = 6000
    result = evaluate(
        FeatureTarget(table), method.drafter(draft), [torch.tensor([5, 9])] * count, LAYOUT,
        depth=3, max_new_tokens=6, temperature=0.9, seed=1, batch_size=count,
    )  # fmt: skip
    step = torch.softmax(table[0].double() / 0.9, -1)
    expected = step[9]
    said = torch.stack(list(result.tokens))
    assert int(result.accepted_at.sum()) > 0
    if cut is not None:
        assert 0 < result.drafted < 3 * int(result.steps.sum())
    for column in range(4):
        share = torch.bincount(said[:, column], minlength=block_cases.VOCAB).double() / count
        deviation = (expected * (1 - expected) / count).sqrt()
        assert float(((share - expected).abs() / deviation.clamp_min(1e-3)).max()) < 5
        expected = expected @ step


def test_errors_name_what_is_wrong() -> None:
    method, draft, _ = cases.build()
    drafter = method.drafter(draft)
    with pytest.raises(ValueError, match=r"dspark drafter: wanted start\(\) first"):
        drafter.propose(1, temperature=0, generator=None)
    started(drafter, block_cases.separate(cases.batch((12, 12))), [6, 4])
    with pytest.raises(ValueError, match=r"depth: wanted 0..5 \(block_size\), got 6"):
        drafter.propose(6, temperature=0, generator=None)
    with pytest.raises(ValueError, match=r"temperature: wanted 0 or more, got -1"):
        drafter.propose(1, temperature=-1, generator=None)
    assert drafter.propose(0, temperature=0, generator=None).tokens.shape == (2, 0)
    assert replace(drafter.propose(2, temperature=0, generator=None)).proposed().all()
