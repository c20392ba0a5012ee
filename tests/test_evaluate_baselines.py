from __future__ import annotations

import pytest
import torch
from torch import Tensor

from specforge_ext.evaluate import BigramDrafter, evaluate, plain_decode, summarise, walk
from specforge_ext.records import lengths_to_cu_seqlens
from toy_decoding import (
    LAYOUT,
    QuietTableDrafter,
    TableDrafter,
    TableTarget,
    half_right,
    ragged_prompts,
    random_table,
)


def counted(texts: list[Tensor], vocab: int, alpha: float) -> Tensor:
    """[V, V]: the definition, pair by pair."""
    pairs, unigram = torch.zeros(vocab, vocab).double(), torch.ones(vocab).double()
    for text in texts:
        for token in text.tolist():
            unigram[token] += 1
        for first, then in zip(text.tolist(), text.tolist()[1:], strict=False):
            pairs[first, then] += 1
    unigram /= unigram.sum()
    return (pairs + alpha * unigram) / (pairs.sum(1, keepdim=True) + alpha)


@pytest.mark.parametrize("alpha", [0.1, 1.0])
def test_bigram_equals_the_definition(alpha):
    texts = ragged_prompts(30, 13, seed=1)
    drafter = BigramDrafter(texts, 17, alpha=alpha)  # 13..16 never occur
    asked = torch.tensor([3, 16, 3, 0, 12])
    wanted = counted(texts, 17, alpha)
    torch.testing.assert_close(drafter.distribution(asked), wanted[asked], rtol=1e-12, atol=0)


def test_bigram_of_a_real_vocabulary_stays_sparse():
    """151936 tokens: a dense table would be 185 GB."""
    drafter = BigramDrafter([torch.tensor([151935, 7, 151935, 7, 8])], 151936)
    drafter.start(2, 10)
    tokens = torch.tensor([[0, 151935], [0, 7]])
    drafter.observe(tokens, {}, tokens, torch.ones(2, 2, dtype=torch.bool))
    proposal = drafter.propose(2, temperature=0.0, generator=None)
    assert proposal.probs is None
    # 7 is followed once by 151935 and once by 8; the unigram decides.
    assert proposal.tokens.tolist() == [[7, 151935], [151935, 7]]


def test_bigram_follows_valid_columns_only():
    drafter = BigramDrafter([torch.arange(9)], 9, alpha=0.01)
    drafter.start(3, 10)

    def see(tokens: list[list[int]], valid: list[list[int]]) -> list[int]:
        ids = torch.tensor(tokens)
        drafter.observe(ids, {}, ids, torch.tensor(valid).bool())
        return drafter.propose(1, temperature=0.0, generator=None).tokens[:, 0].tolist()

    assert see([[1, 5], [2, 5], [3, 5]], [[1, 0], [1, 1], [0, 1]]) == [2, 6, 6]
    assert see([[7, 0], [7, 0], [0, 7]], [[1, 0], [0, 0], [0, 0]]) == [8, 6, 6]


def test_bigram_proposes_from_the_distribution_it_declares():
    texts = ragged_prompts(30, 5, seed=2)
    q = counted(texts, 5, 1.0)[torch.tensor(4)]
    drafter = BigramDrafter(texts, 5, text_temperature=0.8)
    drafter.start(20_000, 1)
    ids = torch.full((20_000, 1), 4)
    drafter.observe(ids, {}, ids, torch.ones_like(ids, dtype=torch.bool))
    for temperature, wanted in ((0.8, q), (1.6, q.sqrt() / q.sqrt().sum())):
        generator = torch.Generator().manual_seed(3)
        proposal = drafter.propose(2, temperature=temperature, generator=generator)
        torch.testing.assert_close(proposal.probs[0, 0].double(), wanted, rtol=1e-6, atol=0)
        share = proposal.tokens[:, 0].bincount(minlength=5).double() / 20_000
        assert float((share - wanted).abs().max()) < 0.02
        # The second distribution is that of the first drafted token.
        followed = drafter.distribution(proposal.tokens[:, 0]) ** (0.8 / temperature)
        followed = followed / followed.sum(1, keepdim=True)
        torch.testing.assert_close(proposal.probs[:, 1].double(), followed, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        ([], {}, "wanted at least one token, got none"),
        ([torch.tensor([], dtype=torch.int64)], {}, "wanted at least one token, got none"),
        ([torch.tensor([0, 5])], {}, r"wanted tokens in \[0, 5\), got 0..5"),
        ([torch.tensor([-1, 3])], {}, r"wanted tokens in \[0, 5\), got -1..3"),
        ([torch.tensor([1])], {"alpha": 0.0}, "must be positive, got 0.0 and 1.0"),
        ([torch.tensor([1])], {"text_temperature": -1.0}, "must be positive, got 1.0 and -1.0"),
    ],
)
def test_bigram_refuses(texts, options, message):
    with pytest.raises(ValueError, match=message):
        BigramDrafter(texts, 5, **options)


# --- the walk estimate -----------------------------------------------------------------------


def rates_along(texts: tuple[Tensor, ...], accept: Tensor, depth: int) -> Tensor:
    """[K, T], NaN where nothing may be read. accept: [K, V, V], chance of b after a at depth k."""
    columns = []
    for text in texts:
        rates = torch.full((depth, len(text)), float("nan"), dtype=torch.float64)
        for k in range(depth):
            end = len(text) - depth - 1
            for anchor in range(max(end, 0)):
                before, after = text[anchor + k], text[anchor + k + 1]
                rates[k, anchor] = accept[k % len(accept), before, after]
        columns.append(rates)
    return torch.cat(columns, 1)


def test_greedy_walk_equals_real_decoding_for_every_prompt():
    depth, vocab = 4, 23
    target = TableTarget(random_table(1, vocab, 4) + random_table(5, vocab, 5, scale=1.0))
    drafter = TableDrafter(half_right(target.table, seed=6))
    prompts = ragged_prompts(24, vocab, seed=7)
    result = evaluate(
        target, drafter, prompts, LAYOUT,
        depth=depth, max_new_tokens=33, temperature=0.0, seed=0,
    )  # fmt: skip
    best = torch.nn.functional.one_hot(drafter.q.argmax(2), vocab).double()
    lengths = [len(text) for text in result.tokens]
    estimate = walk(rates_along(result.tokens, best, depth), lengths_to_cu_seqlens(lengths))
    row = summarise(result, draft="toy")
    assert estimate.rounds.tolist() == result.rounds.tolist()
    assert estimate.tokens.tolist() == result.round_tokens.tolist()
    assert estimate.length == row.length
    assert estimate.per_position == row.per_position
    assert estimate.ci95 == row.ci95
    assert 1.2 < row.length < 4.0


def test_sampled_walk_agrees_with_simulation_where_marginals_do_not():
    """A toy chain whose acceptance depends on where one stands; text and decoding differ."""
    depth, vocab, count, budget = 3, 6, 3000, 41
    table = random_table(1, vocab, seed=8, scale=1.5)
    p = table[0].double().softmax(1)
    q = table.softmax(2).repeat(2, 1, 1)
    q[:, ::2] = random_table(2, vocab, seed=9).softmax(2)[:, ::2]  # wrong after even tokens
    prompts = [torch.tensor([1])] * count
    settings = {"max_new_tokens": budget, "temperature": 1.0, "batch_size": count}
    real = summarise(
        evaluate(
            TableTarget(table), QuietTableDrafter(q), prompts, LAYOUT,
            depth=depth, seed=10, **settings,
        ),
        draft="toy",
    )  # fmt: skip
    texts = plain_decode(TableTarget(table), prompts, seed=11, **settings).tokens
    accept = (q.double() / p).clamp(max=1.0)

    text = torch.stack(texts)
    rates = torch.full((depth, count, budget), float("nan"), dtype=torch.float64)
    anchors = budget - depth - 1
    for k in range(depth):
        before, after = text[:, k : k + anchors], text[:, k + 1 : k + 1 + anchors]
        rates[k, :, :anchors] = accept[k % 2, before, after]
    estimate = walk(rates.flatten(1), lengths_to_cu_seqlens([budget] * count))

    # Half-widths of the two independent intervals, added in squares: 1.96 standard errors.
    noise = (
        ((real.ci95[1] - real.ci95[0]) / 2) ** 2 + ((estimate.ci95[1] - estimate.ci95[0]) / 2) ** 2
    ) ** 0.5
    assert abs(estimate.length - real.length) < 1.5 * noise
    for walked, counted_rate in zip(estimate.per_position, real.per_position, strict=True):
        assert walked == pytest.approx(counted_rate, abs=0.01)
    marginal = rates[:, :, :anchors].flatten(1)
    uniform = 1 + float(marginal.cumprod(0).mean(1).sum())
    assert abs(uniform - real.length) > 5 * noise


def test_walk_by_hand():
    """Depth 1, one sample of 4 tokens: anchors 0 and 1 count; the first always starts a step."""
    rates = torch.tensor([[0.25, 0.5, float("nan"), float("nan")]])
    estimate = walk(rates, torch.tensor([0, 4]))
    # Anchor 1 is visited when anchor 0's draft is rejected: 0.75.
    assert estimate.rounds.tolist() == [1.75]
    assert estimate.tokens.tolist() == [1.25 + 0.75 * 1.5]
    assert estimate.per_position == ((0.25 + 0.75 * 0.5) / 1.75,)
    assert estimate.length == (1.25 + 0.75 * 1.5) / 1.75


def test_short_samples_say_nothing_and_disturb_nothing():
    rates = torch.rand(2, 9, generator=torch.Generator().manual_seed(12))
    alone = walk(rates, torch.tensor([0, 9]))
    wider = torch.cat([torch.full((2, 3), float("nan")), rates], 1)
    both = walk(wider, torch.tensor([0, 3, 3, 12]))
    assert both.length == alone.length
    assert both.rounds.tolist() == [0.0, 0.0, *alone.rounds.tolist()]


@pytest.mark.parametrize(
    ("rates", "offsets", "message"),
    [
        (torch.full((1, 4), 1.5), [0, 4], r"wanted rates in \[0, 1\]"),
        (torch.full((1, 4), float("nan")), [0, 4], r"wanted rates in \[0, 1\]"),
        (torch.zeros(1, 4), [0, 5], r"T = cu_seqlens\[-1\] = 5, got \[1, 4\]"),
        (torch.zeros(2, 4), [0, 1, 4], "wanted a sample of at least 4 tokens, got 3 at most"),
    ],
)
def test_walk_refuses(rates, offsets, message):
    with pytest.raises(ValueError, match=message):
        walk(rates, torch.tensor(offsets))
