"""The drafter decodes with exactly what training computes, and loses nothing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import block_cases as cases
from specforge_ext.evaluate import evaluate
from specforge_ext.methods._block.plan import plan
from specforge_ext.methods.dflash.drafter import DFlashDrafter
from specforge_ext.records import FeatureLayout, FeatureSpec, PackedBatch
from toy_decoding import TableTarget, ragged_prompts, random_table

CONFIGS: list[dict[str, object]] = [{}, cases.MIXED]


def observe(drafter: DFlashDrafter, samples: list[PackedBatch], rows: list[range]) -> None:
    """One call; sequence b gets its rows[b], at the end of the columns, garbage in the others."""
    width = max(len(r) for r in rows)
    shape = (len(samples), width)
    tokens = torch.randint(0, cases.VOCAB, shape)
    positions, valid = torch.randint(0, 99, shape), torch.zeros(shape, dtype=torch.bool)
    hidden = torch.full((*shape, cases.FEATURES), float("nan"))
    for b, (sample, r) in enumerate(zip(samples, rows, strict=True)):
        if len(r):
            columns = slice(width - len(r), width)
            tokens[b, columns] = sample.input_ids[r.start + 1 : r.stop + 1]
            positions[b, columns] = torch.tensor(list(r))
            hidden[b, columns] = sample.features["hidden"][r.start : r.stop]
            valid[b, columns] = True
    drafter.observe(tokens, {"hidden": hidden}, positions, valid)


@pytest.mark.parametrize("config", CONFIGS)
def test_a_block_in_decoding_is_the_block_in_training(config: dict[str, object]) -> None:
    """After rows 0..a-1 the block begins at the token at a: as in training, as defined."""
    method, draft, _ = cases.build(**config)
    packed = cases.batch((30, 22), density=1.0)
    samples = cases.separate(packed)
    parameters = {name: p.detach().double() for name, p in draft.named_parameters()}
    drafter = method.drafter(draft)
    drafter.start(2, 64)
    seen = [0, 0]
    for step in ([5, 9], [3, 1], [0, 2], [7, 0]):
        rows = [range(a, a + n) for a, n in zip(seen, step, strict=True)]
        observe(drafter, samples, rows)
        seen = [r.stop for r in rows]
        got = drafter.states()
        blocks = plan(
            packed,
            cases.anchors([[a] for a in seen], packed.lengths),
            block_size=cases.BLOCK,
            first_label=0,
        )
        with torch.no_grad():
            trained = draft.predicted(packed.features["hidden"], packed.input_ids, blocks)
        torch.testing.assert_close(got.flatten(0, 1)[blocks.rows], trained, rtol=1e-5, atol=1e-5)
        for b, anchor in enumerate(seen):
            wanted = cases.dense_block(parameters, draft, samples[b], anchor)
            torch.testing.assert_close(got[b].double(), wanted, rtol=1e-5, atol=1e-5)


def test_greedy_proposal_is_the_argmax_of_each_slot() -> None:
    method, draft, _ = cases.build()
    samples = cases.separate(cases.batch((12, 12)))
    drafter = method.drafter(draft)
    drafter.start(2, 16)
    observe(drafter, samples, [range(0, 6), range(0, 4)])
    proposal = drafter.propose(4, temperature=0, generator=None)
    assert proposal.probs is None and proposal.tokens.shape == (2, 4)
    assert torch.equal(proposal.tokens, draft.logits(drafter.states()).argmax(-1)[:, 1:])
    shorter = drafter.propose(2, temperature=0, generator=None)
    assert torch.equal(shorter.tokens, proposal.tokens[:, :2])  # and the look-ahead left no trace


def test_sampled_proposal_has_its_probabilities() -> None:
    method, draft, _ = cases.build()
    (sample,) = cases.separate(cases.batch((12,)))
    drafter = method.drafter(draft)
    drafter.start(2000, 8)
    observe(drafter, [sample] * 2000, [range(0, 5)] * 2000)
    proposal = drafter.propose(3, temperature=0.7, generator=torch.Generator().manual_seed(0))
    assert proposal.probs is not None and proposal.probs.shape == (2000, 3, cases.VOCAB)
    wanted = torch.softmax(draft.logits(drafter.states()[:, 1:4]) / 0.7, -1)
    torch.testing.assert_close(proposal.probs, wanted, rtol=1e-5, atol=1e-7)
    for slot in range(3):
        share = torch.bincount(proposal.tokens[:, slot], minlength=cases.VOCAB) / 2000
        assert float((share - proposal.probs[0, slot]).abs().max()) < 0.04  # 3.5 deviations
    same = drafter.propose(3, temperature=0.7, generator=torch.Generator().manual_seed(0))
    assert torch.equal(same.tokens, proposal.tokens)


class FeatureTarget(TableTarget):
    """A table target whose features are wide enough for a draft: a code of token and position."""

    def start(self, num_sequences: int, layout: FeatureLayout) -> None:
        super().start(num_sequences, layout)
        generator = torch.Generator().manual_seed(4)
        self.codes = torch.randn(99, cases.FEATURES, generator=generator)

    def forward(self, input_ids: Tensor, positions: Tensor, valid: Tensor):  # type: ignore[no-untyped-def]
        out = super().forward(input_ids, positions, valid)
        code = self.codes[(7 * input_ids + positions) % 99]
        return type(out)(out.logits, dict.fromkeys(out.features, code))


LAYOUT = FeatureLayout((FeatureSpec("hidden", (2, 3), cases.FEATURES, "float32"),))


@pytest.mark.parametrize("depth", [1, 3, 4])
def test_greedy_decoding_is_lossless(depth: int) -> None:
    method, draft, _ = cases.build(**cases.MIXED)
    target = FeatureTarget(random_table(3, cases.VOCAB, seed=1))
    prompts = ragged_prompts(5, cases.VOCAB, seed=2)
    result = evaluate(
        target, method.drafter(draft), prompts, LAYOUT,
        depth=depth, max_new_tokens=17, temperature=0, seed=0,
    )  # fmt: skip
    for prompt, tokens in zip(prompts, result.tokens, strict=True):
        assert tokens.tolist() == target.greedy(prompt.tolist(), 17)


def test_sampled_decoding_is_lossless() -> None:
    """Second and third token of many continuations against the chain's own distribution."""
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
    assert int(result.accepted_at.sum()) > 0
    for column in range(3):
        share = torch.bincount(said[:, column], minlength=cases.VOCAB).double() / count
        deviation = (expected * (1 - expected) / count).sqrt()
        assert float(((share - expected).abs() / deviation.clamp_min(1e-3)).max()) < 5
        expected = expected @ step


def test_rejected_columns_are_holes() -> None:
    """Columns that are not valid leave no trace, wherever they lie."""
    method, draft, _ = cases.build(**cases.MIXED)
    (sample,) = cases.separate(cases.batch((20,)))
    whole, holed = (method.drafter(draft) for _ in range(2))
    whole.start(1, 32)
    observe(whole, [sample], [range(0, 9)])
    holed.start(2, 32)
    observe(holed, [sample] * 2, [range(0, 4), range(0, 1)])
    observe(holed, [sample] * 2, [range(4, 5), range(1, 6)])
    observe(holed, [sample] * 2, [range(5, 9), range(6, 9)])
    states = holed.states()
    for b in range(2):
        torch.testing.assert_close(states[b], whole.states()[0], rtol=1e-5, atol=1e-5)


def test_errors_name_what_is_wrong() -> None:
    method, draft, _ = cases.build()
    (sample,) = cases.separate(cases.batch((12,)))
    drafter = method.drafter(draft)
    with pytest.raises(ValueError, match=r"dflash drafter: wanted start\(\) first"):
        drafter.propose(1, temperature=0, generator=None)
    drafter.start(2, 4)
    with pytest.raises(ValueError, match=r"wanted at most 4 columns.*got 5"):
        observe(drafter, [sample] * 2, [range(0, 5)] * 2)
    observe(drafter, [sample] * 2, [range(0, 3), range(0)])
    with pytest.raises(ValueError, match=r"sequences \[1\] have no row"):
        drafter.propose(1, temperature=0, generator=None)
    observe(drafter, [sample] * 2, [range(0), range(0, 1)])
    with pytest.raises(ValueError, match=r"temperature: wanted 0 or more, got -1"):
        drafter.propose(1, temperature=-1, generator=None)
    with pytest.raises(ValueError, match=r"depth: wanted 0..4 \(block_size - 1\), got 5"):
        drafter.propose(5, temperature=0, generator=None)
    assert drafter.propose(0, temperature=0, generator=None).tokens.shape == (2, 0)
