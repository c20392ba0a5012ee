"""The drafter decodes with exactly what training computes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import eagle3_cases as cases
from specforge_ext.methods._drafter import ChainDrafter
from specforge_ext.methods.eagle3.model import Eagle3Draft
from specforge_ext.records import PackedBatch, TargetWeights

DEPTH = 7


def training_logits(
    draft: Eagle3Draft, weights: TargetWeights, sample: PackedBatch
) -> list[Tensor]:
    parameters = {name: p.detach().double() for name, p in draft.named_parameters()}
    return cases.dense_logits(parameters, draft, weights, sample)


def observe(drafter: ChainDrafter, samples: list[PackedBatch], rows: list[range]) -> None:
    """One call; sequence b gets its rows[b], at the end of the columns, garbage in the others."""
    width = max(len(r) for r in rows)
    shape = (len(samples), width)
    tokens = torch.randint(0, cases.VOCAB, shape)
    positions, valid = torch.randint(0, 99, shape), torch.zeros(shape, dtype=torch.bool)
    aux = torch.full((*shape, 3 * cases.HIDDEN), float("nan"))
    for b, (sample, r) in enumerate(zip(samples, rows, strict=True)):
        if len(r):
            columns = slice(width - len(r), width)
            tokens[b, columns] = sample.input_ids[r.start + 1 : r.stop + 1]
            positions[b, columns] = torch.tensor(list(r))
            aux[b, columns] = sample.features["aux"][r.start : r.stop]
            valid[b, columns] = True
    drafter.observe(tokens, {"aux": aux}, positions, valid)


def test_look_ahead_is_the_training_step() -> None:
    """Logits of teacher-forced look-aheads equal row t's logits at steps 0..6, at several t."""
    method, draft, weights = cases.build()
    samples = cases.separate(cases.batch((30, 22)))
    expected = [training_logits(draft, weights, s) for s in samples]
    drafter = method.drafter(draft)
    drafter.start(2, 64)
    seen = [0, 0]
    for step in ([5, 9], [3, 1], [0, 2], [7, 0]):
        rows = [range(a, a + n) for a, n in zip(seen, step, strict=True)]
        observe(drafter, samples, rows)
        seen = [r.stop for r in rows]
        following = torch.stack(
            [s.input_ids[t + 1 : t + DEPTH] for s, t in zip(samples, seen, strict=True)]
        )
        got = drafter.logits_along(following)
        for b, t in enumerate(seen):
            wanted = torch.stack([logits[t - 1] for logits in expected[b]])
            torch.testing.assert_close(got[b].double(), wanted, rtol=1e-5, atol=1e-5)


def test_training_forward_has_the_same_logits() -> None:
    """The same against the training code itself, rather than the definition."""
    method, draft, _ = cases.build(vocab_size=None)
    (sample,) = cases.separate(cases.batch((20,), density=1.0))
    teacher = draft.teacher(sample.loss_mask, sample.features["last"], sample.lengths)
    plan = cases.plan(draft, teacher.mask, sample.lengths)
    with torch.no_grad():
        hidden = draft.backbone(plan, sample.input_ids, sample.positions, sample.features["aux"])
    drafter = method.drafter(draft)
    drafter.start(1, 20)
    observe(drafter, [sample], [range(0, 12)])
    got = drafter.logits_along(sample.input_ids[None, 12 + 1 : 12 + DEPTH])
    for i in range(DEPTH):
        row = int((plan.steps[i].rows == 11).nonzero())
        torch.testing.assert_close(got[0, i], draft.logits(hidden[i][row]), rtol=1e-5, atol=1e-5)


def test_greedy_proposal_follows_its_own_tokens() -> None:
    method, draft, _ = cases.build()
    samples = cases.separate(cases.batch((12, 12)))
    drafter = method.drafter(draft)
    drafter.start(2, 16)
    observe(drafter, samples, [range(0, 6), range(0, 4)])
    proposal = drafter.propose(4, temperature=0, generator=None)
    assert proposal.probs is None and proposal.tokens.shape == (2, 4)
    assert draft.t2d[proposal.tokens].all()
    logits = drafter.logits_along(proposal.tokens[:, :3])
    best = logits.argmax(-1)
    assert torch.equal(best + draft.d2t[best], proposal.tokens)
    again = drafter.propose(4, temperature=0, generator=None)
    assert torch.equal(again.tokens, proposal.tokens)  # the look-ahead left no trace


def test_sampled_proposal_has_its_probabilities() -> None:
    method, draft, _ = cases.build()
    (sample,) = cases.separate(cases.batch((12,)))
    drafter = method.drafter(draft)
    drafter.start(2000, 8)
    observe(drafter, [sample] * 2000, [range(0, 5)] * 2000)
    proposal = drafter.propose(2, temperature=0.7, generator=torch.Generator().manual_seed(0))
    assert proposal.probs is not None and proposal.probs.shape == (2000, 2, cases.VOCAB)
    assert (proposal.probs[..., ~draft.t2d] == 0).all()
    logits = drafter.logits_along(proposal.tokens[:, :1])
    wanted = torch.softmax(logits / 0.7, -1)
    torch.testing.assert_close(proposal.probs[..., draft.t2d], wanted, rtol=1e-5, atol=1e-7)
    share = torch.bincount(proposal.tokens[:, 0], minlength=cases.VOCAB) / 2000
    assert float((share - proposal.probs[0, 0]).abs().max()) < 0.04  # 3.5 standard deviations
    same = drafter.propose(2, temperature=0.7, generator=torch.Generator().manual_seed(0))
    assert torch.equal(same.tokens, proposal.tokens)


def test_start_forgets() -> None:
    method, draft, _ = cases.build()
    samples = cases.separate(cases.batch((12, 9)))
    drafter = method.drafter(draft)
    drafter.start(1, 16)
    observe(drafter, samples[:1], [range(0, 8)])
    drafter.start(1, 16)
    observe(drafter, samples[1:], [range(0, 3)])
    fresh = method.drafter(draft)
    fresh.start(1, 16)
    observe(fresh, samples[1:], [range(0, 3)])
    tokens = samples[1].input_ids[None, 3:6]
    assert torch.equal(drafter.logits_along(tokens), fresh.logits_along(tokens))


def test_errors_name_what_is_wrong() -> None:
    method, draft, _ = cases.build()
    (sample,) = cases.separate(cases.batch((12,)))
    drafter = method.drafter(draft)
    with pytest.raises(ValueError, match=r"wanted start\(\) first"):
        drafter.propose(1, temperature=0, generator=None)
    drafter.start(2, 4)
    with pytest.raises(ValueError, match=r"wanted at most 4 columns.*got 5"):
        observe(drafter, [sample] * 2, [range(0, 5)] * 2)
    observe(drafter, [sample] * 2, [range(0, 3), range(0)])
    with pytest.raises(ValueError, match=r"sequences \[1\] have no row"):
        drafter.propose(1, temperature=0, generator=None)
    with pytest.raises(ValueError, match=r"temperature: wanted 0 or more, got -1"):
        drafter.propose(1, temperature=-1, generator=None)
