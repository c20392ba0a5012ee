from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from specforge_ext.engines.base import TargetOutput
from specforge_ext.evaluate import (
    BigramDrafter,
    check_lossless,
    evaluate,
    plain_decode,
    prefill,
    summarise,
    verify,
)
from specforge_ext.records import FeatureLayout, FeatureSpec, Proposal
from toy_decoding import (
    LAYOUT,
    QuietTableDrafter,
    TableDrafter,
    TableTarget,
    half_right,
    ragged_prompts,
    random_table,
)

VOCAB = 11


def greedy_definition(
    target: TableTarget,
    drafter: TableDrafter,
    prompt: list[int],
    depth: int,
    max_new: int,
    eos: tuple[int, ...],
) -> tuple[list[int], int, int, int, list[int]]:
    """Read off a finished text: tokens, steps, rounds, tokens of rounds, accepted by position."""
    own = target.greedy(prompt, max_new, eos)
    beyond = target.greedy(prompt, max_new + depth + 1)
    done, steps, rounds, round_tokens, accepted_at = 1, 0, 0, 0, [0] * depth
    while done < len(own):
        last, hits = beyond[done - 1], 0
        for k in range(depth):
            last = int(drafter.q[k % len(drafter.q), last].argmax())
            if last != beyond[done + k]:
                break
            hits += 1
        room = max_new - done
        emitted = min(hits + 1, len(own) - done)
        steps += 1
        if room > depth:
            rounds += 1
            round_tokens += emitted
            for k in range(min(hits, emitted)):
                accepted_at[k] += 1
        done += emitted
    return own, steps, rounds, round_tokens, accepted_at


def a_fair_game() -> tuple[TableTarget, TableDrafter, list[Tensor]]:
    noise = 0.5 * random_table(5, VOCAB, seed=1)
    target = TableTarget(noise + random_table(1, VOCAB, seed=2))
    return target, TableDrafter(half_right(target.table, seed=3)), ragged_prompts(17, VOCAB, seed=4)


@pytest.mark.parametrize("depth", [1, 2, 4, 5])
@pytest.mark.parametrize("max_new", [1, 2, 5, 6, 23])
@pytest.mark.parametrize("eos", [(), (3,), (3, 7)])
def test_greedy_tokens_and_counts_equal_the_definition(depth, max_new, eos):
    target, drafter, prompts = a_fair_game()
    result = evaluate(
        target, drafter, prompts, LAYOUT,
        depth=depth, max_new_tokens=max_new, temperature=0.0, seed=0, eos_ids=eos,
    )  # fmt: skip
    for i, prompt in enumerate(prompts):
        wanted = greedy_definition(target, drafter, prompt.tolist(), depth, max_new, eos)
        got = (
            result.tokens[i].tolist(),
            int(result.steps[i]),
            int(result.rounds[i]),
            int(result.round_tokens[i]),
            result.accepted_at[i].tolist(),
        )
        assert got == wanted
    assert result.drafted == int(result.steps.sum()) * depth
    assert drafter.given <= drafter.capacity


def test_the_definition_above_accepts_some_and_rejects_some():
    """Otherwise the test before this one would say little."""
    target, drafter, prompts = a_fair_game()
    result = evaluate(
        target, drafter, prompts, LAYOUT, depth=4, max_new_tokens=23, temperature=0.0, seed=0
    )
    rates = result.accepted_at.sum(0) / result.rounds.sum()
    assert rates[0] < 0.9
    assert rates[-1] > 0.1
    assert any(3 in text.tolist() for text in result.tokens)  # the end token of the test above


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_every_row_is_observed_once_in_order_and_aligned(temperature):
    """Row t: features of position t, token t + 1; rejected tokens leave no row."""
    target = TableTarget(random_table(5, VOCAB, seed=5))
    drafter = TableDrafter(half_right(target.table, seed=6))
    prompts = ragged_prompts(13, VOCAB, seed=7)
    result = evaluate(
        target, drafter, prompts, LAYOUT,
        depth=3, max_new_tokens=12, temperature=temperature, seed=1,
    )  # fmt: skip
    for prompt, said, rows in zip(prompts, result.tokens, drafter.rows, strict=True):
        text = prompt.tolist() + said.tolist()
        assert [row[0] for row in rows] == list(range(len(rows)))
        assert len(rows) >= len(text) - 1  # the last step may go past the budget
        for position in range(len(text) - 1):
            feature = [float(text[position]), float(position)]
            assert rows[position] == (position, text[position + 1], feature)


def test_perfect_and_hopeless_drafts_reach_the_bounds():
    table = random_table(1, VOCAB, seed=8)
    prompts = ragged_prompts(9, VOCAB, seed=9)
    for q, length in ((table.softmax(2), 5.0), ((-table).softmax(2), 1.0)):
        result = evaluate(
            TableTarget(table), TableDrafter(q), prompts, LAYOUT,
            depth=4, max_new_tokens=31, temperature=0.0, seed=0,
        )  # fmt: skip
        row = summarise(result, draft="toy")
        assert row.length == length
        assert row.ci95 == (length, length)


def test_at_any_temperature_a_draft_that_is_the_target_is_always_accepted():
    table = random_table(1, VOCAB, seed=10)
    drafter = TableDrafter((table / 0.7).softmax(2))
    result = evaluate(
        TableTarget(table), drafter, ragged_prompts(9, VOCAB, seed=11), LAYOUT,
        depth=3, max_new_tokens=33, temperature=0.7, seed=0,
    )  # fmt: skip
    # float32 rounding of p / q may reject about one token in a million.
    assert summarise(result, draft="toy").length == 4.0


def test_neither_waves_nor_neighbours_nor_prefill_chunks_change_greedy_text(monkeypatch):
    target = TableTarget(random_table(7, VOCAB, seed=12))
    prompts = ragged_prompts(10, VOCAB, seed=13, longest=30)
    drafter = TableDrafter(half_right(target.table, seed=14))
    settings = {"depth": 3, "max_new_tokens": 15, "temperature": 0.0, "seed": 0, "eos_ids": (1,)}
    together = evaluate(target, drafter, prompts, LAYOUT, **settings)
    waves = evaluate(target, drafter, prompts, LAYOUT, **settings, batch_size=3)
    monkeypatch.setattr(prefill, "PREFILL_COLUMNS", 4)
    chunks = evaluate(target, drafter, prompts, LAYOUT, **settings)
    for other in (waves, chunks):
        assert [t.tolist() for t in other.tokens] == [t.tolist() for t in together.tokens]
        assert torch.equal(other.accepted_at, together.accepted_at)
        assert torch.equal(other.rounds, together.rounds)


def test_plain_decoding_equals_the_definition():
    target = TableTarget(random_table(7, VOCAB, seed=15))
    prompts = ragged_prompts(10, VOCAB, seed=16)
    plain = plain_decode(
        target, prompts, max_new_tokens=9, temperature=0.0, seed=0, eos_ids=(4,), batch_size=4
    )
    for i, prompt in enumerate(prompts):
        assert plain.tokens[i].tolist() == target.greedy(prompt.tolist(), 9, (4,))
        assert len(plain.gaps[i]) == len(plain.runners_up[i]) == len(plain.tokens[i])
    first = target.table[(int((prompts[0] + 1).sum()) + len(prompts[0]) - 1) % 7, prompts[0][-1]]
    best = first.sort(descending=True)
    assert float(plain.gaps[0][0]) == float(best.values[0] - best.values[1])
    assert int(plain.runners_up[0][0]) == int(best.indices[1])


def test_same_seed_same_result_other_seed_another():
    target = TableTarget(random_table(7, VOCAB, seed=17))
    drafter = TableDrafter(half_right(target.table, seed=18))
    prompts = ragged_prompts(6, VOCAB, seed=19)

    def run(seed: int) -> list[list[int]]:
        result = evaluate(
            target, drafter, prompts, LAYOUT,
            depth=3, max_new_tokens=16, temperature=0.8, seed=seed,
        )  # fmt: skip
        return [t.tolist() for t in result.tokens]

    def run_plain(seed: int) -> list[list[int]]:
        result = plain_decode(target, prompts, max_new_tokens=16, temperature=0.8, seed=seed)
        return [t.tolist() for t in result.tokens]

    for decode in (run, run_plain):
        assert decode(3) == decode(3) != decode(4)


def chi_square_z(counts: Tensor, probs: Tensor) -> float:
    """Standard normal score of Pearson's statistic (Wilson and Hilferty's cube root)."""
    expected = probs * counts.sum()
    assert float(expected.min()) > 5
    freedom = len(probs) - 1
    statistic = float(((counts - expected) ** 2 / expected).sum()) / freedom
    spread = 2 / (9 * freedom)
    return (statistic ** (1 / 3) - (1 - spread)) / math.sqrt(spread)


def score_of_three_tokens(temperature: float) -> float:
    """How far the joint counts of the three tokens after prefill's are from the target's chain."""
    vocab, sequences = 5, 40_000
    table = random_table(1, vocab, seed=20, scale=0.8)
    bad = torch.cat([random_table(1, vocab, seed=s, scale=1.0).softmax(2) for s in (21, 22, 23)])
    result = evaluate(
        TableTarget(table), QuietTableDrafter(bad), [torch.tensor([2])] * sequences, LAYOUT,
        depth=3, max_new_tokens=4, temperature=temperature, seed=24, batch_size=sequences,
    )  # fmt: skip
    p = (table[0].double() / temperature).softmax(1)
    joint = torch.einsum("a,ab,bc,cd->bcd", p[2], p, p, p).reshape(-1)
    said = torch.stack(result.tokens)
    cell = (said[:, 1] * vocab + said[:, 2]) * vocab + said[:, 3]
    # Some of each: rejected drafts, accepted ones, second and third steps.
    assert 1.3 < float(result.steps.double().mean()) < 2.7
    return chi_square_z(cell.bincount(minlength=vocab**3).double(), joint)


@pytest.mark.parametrize("temperature", [1.0, 0.8])
def test_sampled_text_has_the_targets_distribution(temperature):
    assert abs(score_of_three_tokens(temperature)) < 4


@pytest.mark.parametrize("bug", ["residual is p", "residual is q", "accepts half of the rest"])
def test_the_distribution_test_notices_planted_bugs(bug, monkeypatch):
    if bug == "residual is p":
        monkeypatch.setattr(verify, "residual", lambda p, q: p)
    elif bug == "residual is q":
        monkeypatch.setattr(verify, "residual", lambda p, q: q)
    else:
        real = torch.rand
        monkeypatch.setattr(verify.torch, "rand", lambda *a, **k: real(*a, **k) / 2)
    assert score_of_three_tokens(1.0) > 10


def test_first_acceptance_rate_is_the_overlap_of_the_distributions():
    """Joint rate of the first drafted token: sum of min(p, q), averaged over what it follows."""
    vocab, sequences = 5, 20_000
    table = random_table(1, vocab, seed=25, scale=1.0)
    q = random_table(1, vocab, seed=26, scale=1.0).softmax(2)
    result = evaluate(
        TableTarget(table), QuietTableDrafter(q), [torch.tensor([0])] * sequences, LAYOUT,
        depth=1, max_new_tokens=3, temperature=1.0, seed=27, batch_size=sequences,
    )  # fmt: skip
    p = table[0].double().softmax(1)
    rate = float(p[0] @ torch.minimum(p, q[0].double()).sum(1))
    # One full round a sequence: the budget is 1 + 2.
    assert result.rounds.tolist() == [1] * sequences
    got = float(result.accepted_at.sum()) / sequences
    assert abs(got - rate) < 4 * math.sqrt(rate * (1 - rate) / sequences)


class Qwen3Target:
    """A transformers Qwen3 without a cache: every sequence is read again from the start."""

    def __init__(self, seed: int) -> None:
        from transformers import Qwen3Config, Qwen3ForCausalLM

        config = Qwen3Config(
            vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, head_dim=8,
            max_position_embeddings=256, tie_word_embeddings=True,
        )  # fmt: skip
        torch.manual_seed(seed)
        self.model = Qwen3ForCausalLM(config).eval()
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.mul_(4.0 if parameter.dim() == 2 else 1.0)

    def start(self, num_sequences: int, layout: FeatureLayout) -> None:
        self.layout = layout
        self.texts: list[list[int]] = [[] for _ in range(num_sequences)]
        self.fresh = torch.zeros(num_sequences, 0, dtype=torch.int64)

    def forward(self, input_ids: Tensor, positions: Tensor, valid: Tensor) -> TargetOutput:
        sequences, columns = input_ids.shape
        logits = torch.zeros(sequences, columns, 97)
        features = {s.name: torch.zeros(sequences, columns, s.width) for s in self.layout.features}
        for b in range(sequences):
            here = valid[b].nonzero().squeeze(1)
            if not len(here):
                continue
            old = len(self.texts[b])
            self.texts[b] += input_ids[b, here].tolist()
            assert positions[b, here].tolist() == list(range(old, len(self.texts[b])))
            out = self.model(torch.tensor([self.texts[b]]), output_hidden_states=True)
            logits[b, here] = out.logits[0, old:]
            for spec in self.layout.features:
                states = torch.cat([out.hidden_states[i] for i in spec.layer_ids], 2)
                features[spec.name][b, here] = states[0, old:]
        self.valid = valid
        return TargetOutput(logits, features)

    def drop(self, keep: Tensor) -> None:
        dropped = (self.valid & ~keep).sum(1).tolist()
        for text, count in zip(self.texts, dropped, strict=True):
            del text[len(text) - count :]

    def select(self, rows: Tensor) -> None:
        self.texts = [self.texts[row] for row in rows.tolist()]
        self.valid = self.valid[rows]


def test_a_transformer_decodes_losslessly():
    target = Qwen3Target(seed=28)
    prompts = ragged_prompts(6, 97, seed=29)
    plain = plain_decode(target, prompts, max_new_tokens=20, temperature=0.0, seed=0)
    layout = FeatureLayout((FeatureSpec("aux", (1, 2), 64, "float32"),))
    result = evaluate(
        target, BigramDrafter(plain.tokens, 97), prompts, layout,
        depth=4, max_new_tokens=20, temperature=0.0, seed=0,
    )  # fmt: skip
    check = check_lossless(result.tokens, plain)
    assert check.lossless, str(check)
    # Text that the draft was counted from: it must get something right, and not everything.
    assert 1.2 < summarise(result, draft="bigram").length < 5.0


TARGET = TableTarget(random_table(1, 4, seed=0))
DRAFTER = TableDrafter(random_table(1, 4, seed=1).softmax(2))
GOOD = {"depth": 2, "max_new_tokens": 4, "temperature": 0.0, "seed": 0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depth": 0}, "depth: wanted at least 1, got 0"),
        ({"max_new_tokens": 0}, "max_new_tokens: wanted at least 1, got 0"),
        ({"temperature": -0.5}, "temperature: wanted a finite value of at least 0, got -0.5"),
        (
            {"temperature": float("nan")},
            "temperature: wanted a finite value of at least 0, got nan",
        ),
        ({"batch_size": 0}, "batch_size: wanted at least 1, got 0"),
    ],
)
def test_arguments_out_of_range(change, message):
    with pytest.raises(ValueError, match=message):
        evaluate(TARGET, DRAFTER, [torch.tensor([1])], LAYOUT, **{**GOOD, **change})


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "prompts: wanted at least one, got none"),
        (
            [torch.tensor([1]), torch.tensor([], dtype=torch.int64)],
            r"prompts\[1\]: wanted \[S >= 1\]",
        ),
        ([torch.tensor([1.0])], r"prompts\[0\].*got \[1\] torch.float32"),
        ([torch.tensor([[1]])], r"prompts\[0\].*got \[1, 1\] torch.int64"),
    ],
)
def test_prompts_that_cannot_be_read(prompts, message):
    with pytest.raises(ValueError, match=message):
        evaluate(TARGET, DRAFTER, prompts, LAYOUT, **GOOD)


@pytest.mark.parametrize(
    ("probs", "message"),
    [
        (None, r"Proposal.probs: wanted .* at temperature 1.0, got None"),
        (torch.tensor([[[0.5, 0.2]]]), "rows that sum to 1 within 0.001"),
        (torch.tensor([[[float("nan"), 1.0]]]), "rows that sum to 1 within 0.001"),
        (torch.tensor([[[0.0, 1.0]]]), "a token that Proposal.probs gives probability 0"),
    ],
)
def test_proposals_that_cannot_be_verified(probs, message):
    proposal = Proposal(torch.tensor([[0]]), probs)
    with pytest.raises(ValueError, match=message):
        verify.verify(torch.zeros(1, 2, 2), proposal, temperature=1.0, generator=torch.Generator())


def test_sampling_needs_a_generator():
    with pytest.raises(ValueError, match=r"generator is required at temperature 0.5"):
        verify.verify(
            torch.zeros(1, 2, 2), Proposal(torch.zeros(1, 1).long(), None),
            temperature=0.5, generator=None,
        )  # fmt: skip


class CutDrafter(TableDrafter):
    """Proposes as many tokens as the table says for the one before each, and garbage after them."""

    def __init__(self, q, stops):
        super().__init__(q)
        self.stops = stops  # [V] bool: after this token nothing more is proposed

    def record(self, next_tokens, features, positions, valid):
        pass

    def propose(self, depth, *, temperature, generator):
        whole = super().propose(depth, temperature=temperature, generator=generator)
        told = torch.cat([self.last[:, None], whole.tokens[:, :-1]], 1)
        lengths = (~self.stops[told]).long().cumprod(1).sum(1)
        cut = torch.arange(depth) >= lengths[:, None]
        tokens = whole.tokens.masked_fill(cut, 0)
        if whole.probs is None:
            return Proposal(tokens, None, lengths)
        return Proposal(tokens, whole.probs.masked_fill(cut[..., None], float("nan")), lengths)


def test_shorter_proposals_are_lossless_when_greedy():
    """Also where the columns that are not proposed happen to hold what the target would say."""
    target = TableTarget(random_table(1, 5, seed=3))
    stops = torch.tensor([False, True, False, True, False])
    drafter = CutDrafter(target.table.softmax(2), stops)  # always right
    prompts = [torch.tensor([k]) for k in range(5)]
    result = evaluate(
        target, drafter, prompts, LAYOUT, depth=3, max_new_tokens=12, temperature=0.0, seed=0
    )
    for prompt, tokens in zip(prompts, result.tokens, strict=True):
        assert tokens.tolist() == target.greedy(prompt.tolist(), 12)
    assert 0 < result.drafted < 3 * int(result.steps.sum())
    # Nothing is wrong: a round says what was proposed, and one token more.
    assert int(result.accepted_at.sum()) == int((result.round_tokens - result.rounds).sum())


def test_shorter_proposals_are_lossless_when_sampling():
    """Where to stop hangs on the tokens before: the chain's distribution stays exact."""
    vocab, count = 5, 20000
    table = random_table(1, vocab, seed=5, scale=2.0)
    stops = torch.tensor([False, True, False, False, True])
    drafter = CutDrafter(random_table(1, vocab, seed=6).softmax(2), stops)
    result = evaluate(
        TableTarget(table), drafter, [torch.tensor([2])] * count, LAYOUT,
        depth=3, max_new_tokens=6, temperature=1.0, seed=1, batch_size=count,
    )  # fmt: skip
    said = torch.stack(list(result.tokens))
    step = table[0].double().softmax(1)
    expected = step[2]
    assert 0 < result.drafted < 3 * int(result.steps.sum())
    for column in range(6):
        share = torch.bincount(said[:, column], minlength=vocab).double() / count
        deviation = (expected * (1 - expected) / count).sqrt()
        assert float(((share - expected).abs() / deviation).max()) < 4.5
        expected = expected @ step
    # Neighbours too: a token's residual must not depend on whether the next was proposed.
    pairs = torch.bincount(said[:, 3] * vocab + said[:, 4], minlength=vocab**2).view(vocab, vocab)
    given = pairs.sum(1, keepdim=True).double()
    deviation = (step * (1 - step) / given).sqrt()
    assert float(((pairs / given - step).abs() / deviation).max()) < 4.5


def test_nothing_proposed_is_plain_decoding():
    proposal = Proposal(torch.tensor([[1, 1]]), None, torch.tensor([0]))
    logits = torch.tensor([[[0.0, 1.0], [1.0, 0.0], [0.0, 1.0]]])
    verdict = verify.verify(logits, proposal, temperature=0.0, generator=None)
    assert verdict.accepted.tolist() == [0] and verdict.next_tokens.tolist() == [1]


@pytest.mark.parametrize("lengths", [[-1, 0], [1, 3]])
def test_lengths_must_be_those_of_the_tokens(lengths):
    proposal = Proposal(torch.zeros(2, 2).long(), None, torch.tensor(lengths))
    with pytest.raises(ValueError, match=r"Proposal.lengths: wanted 0..2, got"):
        verify.verify(torch.zeros(2, 3, 4), proposal, temperature=0.0, generator=None)
