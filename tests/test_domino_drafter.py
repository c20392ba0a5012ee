"""The drafter corrects, token by token, by exactly what training computes, and loses nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import block_cases
import domino_cases as cases
from specforge_ext.evaluate import evaluate
from specforge_ext.methods._block.plan import plan
from specforge_ext.methods.domino.drafter import DominoDrafter
from specforge_ext.methods.domino.plan import corrections
from specforge_ext.records import PackedBatch
from test_dflash_drafter import LAYOUT, FeatureTarget, observe
from toy_decoding import ragged_prompts, random_table

CONFIGS: list[dict[str, object]] = [{}, {"shift_label": True, **block_cases.MIXED}]


def observed(drafter: DominoDrafter, samples: list[PackedBatch], anchors: list[int]) -> None:
    drafter.start(len(samples), 64)
    observe(drafter, samples, [range(a) for a in anchors])  # type: ignore[arg-type]


def with_tokens(sample: PackedBatch, after: int, tokens: Tensor) -> PackedBatch:
    ids = sample.input_ids.clone()
    ids[after + 1 : after + 1 + len(tokens)] = tokens
    return replace(sample, input_ids=ids)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_proposals_are_those_of_training_fed_the_same_tokens(
    config: dict[str, object], temperature: float
) -> None:
    """Put into the text, the proposed tokens give training the distributions they came from."""
    method, draft, _ = cases.build(**config)
    samples = block_cases.separate(block_cases.batch((30, 22, 25), density=1.0))
    anchors, shift = [5, 9, 1], method.config.shift_label
    depth = method.config.block_size - method.config.first
    drafter = method.drafter(draft)
    observed(drafter, samples, anchors)
    generator = torch.Generator().manual_seed(3)
    proposal = drafter.propose(depth, temperature=temperature, generator=generator)
    parameters = {name: p.detach().double() for name, p in draft.named_parameters()}
    corrected = 0
    for b, (sample, anchor) in enumerate(zip(samples, anchors, strict=True)):
        fed = with_tokens(sample, anchor, proposal.tokens[b])
        base, final = cases.dense_logits(parameters, draft, fed, anchor, shift=shift)
        corrected += int((base.argmax(1) != final.argmax(1)).sum())
        if temperature == 0:
            assert proposal.probs is None
            assert torch.equal(proposal.tokens[b], final.argmax(1))
        else:
            assert proposal.probs is not None
            wanted = torch.softmax(final / temperature, -1).float()
            torch.testing.assert_close(proposal.probs[b], wanted, rtol=1e-4, atol=1e-6)
        # And so says the step: the chance of each proposed token is exp(-loss) of its row.
        mask = torch.zeros_like(fed.loss_mask)
        mask[anchor : anchor + depth + 1] = 1
        fed = replace(fed, loss_mask=mask)
        at = block_cases.anchors([[anchor]], fed.lengths)
        blocks = plan(fed, at, block_size=method.config.block_size, first_label=int(shift))
        with torch.no_grad():
            rows = draft(
                fed.features["hidden"],
                fed.input_ids,
                blocks,
                corrections(blocks, method.config, base_share=0.5),
            )
        picked = torch.log_softmax(final, -1).gather(1, proposal.tokens[b][:, None])[:, 0]
        torch.testing.assert_close(-rows.loss.double(), picked, rtol=1e-5, atol=1e-5)
        if temperature == 0:
            assert rows.correct.all()
    assert corrected > 2


def test_shorter_proposals_are_prefixes() -> None:
    for config in CONFIGS:
        method, draft, _ = cases.build(**config)
        samples = block_cases.separate(block_cases.batch((12, 12)))
        drafter = method.drafter(draft)
        observed(drafter, samples, [6, 4])
        whole = drafter.propose(4, temperature=0, generator=None).tokens
        for depth in range(4):
            shorter = drafter.propose(depth, temperature=0, generator=None).tokens
            assert torch.equal(shorter, whole[:, :depth])


def test_sampled_tokens_follow_their_distributions() -> None:
    """A token of slot 2, among proposals that began alike."""
    method, draft, _ = cases.build()
    (sample,) = block_cases.separate(block_cases.batch((12,)))
    count = 20000
    drafter = method.drafter(draft)
    observed(drafter, [sample] * count, [6] * count)
    generator = torch.Generator().manual_seed(0)
    proposal = drafter.propose(2, temperature=2.0, generator=generator)
    assert proposal.probs is not None
    begun = int(torch.bincount(proposal.tokens[:, 0]).argmax())
    alike = proposal.tokens[:, 0] == begun
    drawn, probs = proposal.tokens[alike, 1], proposal.probs[alike, 1]
    assert len(drawn) > 1000
    torch.testing.assert_close(probs, probs[:1].expand_as(probs))
    other = proposal.probs[~alike, 1][0]
    assert float((other - probs[0]).abs().max()) > 0.01  # the first token matters to the second
    share = torch.bincount(drawn, minlength=cases.VOCAB) / len(drawn)
    deviation = (probs[0] * (1 - probs[0]) / len(drawn)).sqrt().clamp_min(1e-3)
    assert float(((share - probs[0]).abs() / deviation).max()) < 5


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("depth", [1, 4])
def test_greedy_decoding_is_lossless(config: dict[str, object], depth: int) -> None:
    method, draft, _ = cases.build(**config)
    target = FeatureTarget(random_table(3, cases.VOCAB, seed=1))
    prompts = ragged_prompts(5, cases.VOCAB, seed=2)
    result = evaluate(
        target, method.drafter(draft), prompts, LAYOUT,
        depth=depth, max_new_tokens=17, temperature=0, seed=0,
    )  # fmt: skip
    for prompt, tokens in zip(prompts, result.tokens, strict=True):
        assert tokens.tolist() == target.greedy(prompt.tolist(), 17)


def test_sampled_decoding_is_lossless() -> None:
    """Tokens of many continuations against the chain's own distribution."""
    method, draft, _ = cases.build()
    table = random_table(1, cases.VOCAB, seed=3, scale=3.0)  # a Markov chain
    count = 6000
    result = evaluate(
        FeatureTarget(table), method.drafter(draft), [torch.tensor([5, 9])] * count, LAYOUT,
        depth=3, max_new_tokens=6, temperature=0.9, seed=1, batch_size=count,
    )  # fmt: skip
    step = torch.softmax(table[0].double() / 0.9, -1)
    expected = step[9]
    said = torch.stack(list(result.tokens))
    assert int(result.accepted_at[1:].sum()) > 0  # corrected ones too
    for column in range(4):
        share = torch.bincount(said[:, column], minlength=cases.VOCAB).double() / count
        deviation = (expected * (1 - expected) / count).sqrt()
        assert float(((share - expected).abs() / deviation.clamp_min(1e-3)).max()) < 5
        expected = expected @ step


def test_errors_name_what_is_wrong() -> None:
    for config, most in zip(CONFIGS, (4, 5), strict=True):
        method, draft, _ = cases.build(**config)
        (sample,) = block_cases.separate(block_cases.batch((12,)))
        drafter = method.drafter(draft)
        with pytest.raises(ValueError, match=r"domino drafter: wanted start\(\) first"):
            drafter.propose(1, temperature=0, generator=None)
        observed(drafter, [sample], [3])
        with pytest.raises(ValueError, match=rf"depth: wanted 0..{most} .*, got {most + 1}"):
            drafter.propose(most + 1, temperature=0, generator=None)
        with pytest.raises(ValueError, match=r"temperature: wanted 0 or more, got -1"):
            drafter.propose(1, temperature=-1, generator=None)
