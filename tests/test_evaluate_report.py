from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch

from specforge_ext.evaluate import (
    EvalResult,
    PlainResult,
    acceptance_table,
    check_lossless,
    cyclic_share,
    evaluate,
    expected_speedup,
    plain_decode,
    render,
    speed_up,
    speed_up_line,
    summarise,
)
from specforge_ext.evaluate.interval import ratio_interval
from specforge_ext.evaluate.plain import is_cyclic
from toy_decoding import LAYOUT, TableDrafter, TableTarget, half_right, ragged_prompts, random_table


def result_of(round_tokens: list[int], rounds: list[int], accepted: list[list[int]]) -> EvalResult:
    """A run whose every prompt had one step more than rounds, which said one token."""
    return EvalResult(
        depth=len(accepted[0]),
        temperature=0.8,
        tokens=tuple(torch.zeros(n + 2, dtype=torch.int64) for n in round_tokens),
        steps=torch.tensor(rounds) + 1,
        rounds=torch.tensor(rounds),
        round_tokens=torch.tensor(round_tokens),
        accepted_at=torch.tensor(accepted),
        proposed=(torch.tensor(rounds) + 1) * len(accepted[0]),
        wall_s=2.0,
        prefill_s=0.5,
        batch_size=64,
    )


def test_summary_by_hand_and_its_conventions():
    # Two prompts: rounds of (2 + 1) and (3 + 3 + 1) tokens at depth 2.
    result = result_of([3, 7], [2, 3], [[1, 0], [2, 2]])
    row = summarise(result, draft="trained")
    assert row.length == 10 / 5
    assert row.per_position == (3 / 5, 2 / 5)
    assert row.lengths == {"sglang": (3 + 7 + 4) / 7, "vllm": 1 + 5 / 5}
    assert (row.mode, row.temperature, row.depth) == ("sampling", 0.8, 2)
    assert (row.prompts, row.tokens, row.rounds) == (2, 10, 5)
    assert row.ci95 == (1.5, 7 / 3)
    assert row.convention.startswith("bonus_included: ")
    plain = json.loads(json.dumps(row.to_dict()))
    assert plain["ci95"] == [1.5, 7 / 3]
    assert plain["per_position"] == [3 / 5, 2 / 5]


def test_length_is_one_plus_the_joint_rates_when_nothing_is_cut():
    target = TableTarget(random_table(5, 11, seed=1))
    drafter = TableDrafter(half_right(target.table, seed=2))
    result = evaluate(
        target, drafter, ragged_prompts(20, 11, seed=3), LAYOUT,
        depth=4, max_new_tokens=30, temperature=0.7, seed=0,
    )  # fmt: skip
    row = summarise(result, draft="toy")
    assert row.length == pytest.approx(1 + sum(row.per_position), rel=1e-12)
    assert row.lengths["vllm"] == pytest.approx(row.length, rel=1e-12)
    assert all(a >= b for a, b in zip(row.per_position, row.per_position[1:], strict=False))
    assert row.ci95[0] < row.length < row.ci95[1]


def test_a_run_without_a_full_round_has_no_length():
    with pytest.raises(ValueError, match="wanted a prompt with at least one round, got none"):
        summarise(result_of([0], [0], [[0, 0]]), draft="toy")


def test_bootstrap_agrees_with_the_delta_method_and_is_seeded():
    generator = torch.Generator().manual_seed(4)
    rounds = torch.randint(10, 40, (400,), generator=generator)
    tokens = rounds * (1.5 + torch.rand(400, generator=generator))
    ratio = float(tokens.sum() / rounds.sum())
    spread = float((tokens - ratio * rounds).std()) / math.sqrt(400) / float(rounds.double().mean())
    low, high = ratio_interval(tokens, rounds, seed=5)
    assert low == pytest.approx(ratio - 1.96 * spread, abs=0.2 * spread)
    assert high == pytest.approx(ratio + 1.96 * spread, abs=0.2 * spread)
    assert (
        (low, high)
        == ratio_interval(tokens, rounds, seed=5)
        != ratio_interval(tokens, rounds, seed=6)
    )


def test_prompts_without_rounds_do_not_move_the_interval():
    tokens, rounds = torch.tensor([3, 7, 9]), torch.tensor([2, 3, 4])
    more = torch.cat([tokens, torch.zeros(1)]), torch.cat([rounds, torch.zeros(1)])
    assert ratio_interval(tokens, rounds) == ratio_interval(*more)


def plain_of(tokens: list[int], runners_up: list[int], gaps: list[float]) -> PlainResult:
    return PlainResult(
        temperature=0.0,
        tokens=(torch.tensor(tokens),),
        runners_up=(torch.tensor(runners_up),),
        gaps=(torch.tensor(gaps),),
        wall_s=1.0,
        prefill_s=0.1,
        batch_size=64,
    )


PLAIN = plain_of([5, 6, 7], [1, 2, 3], [0.5, 5e-5, 0.5])


@pytest.mark.parametrize(
    ("said", "lossless", "ties", "text"),
    [
        ([5, 6, 7], True, 0, "1 of 1 continuations token for token the target's own"),
        ([5, 2, 9], True, 1, "0 of 1 .*, 1 part at a tie"),
        ([5, 9, 7], False, 0, "1 DIFFER; first: prompt 0, token 1: speculative 9, target 6"),
        ([1, 6, 7], False, 0, "token 0: speculative 1, target 5, logit gap 0.5"),
        ([5, 6], False, 0, "token 2: speculative -1, target 7"),
        ([5, 6, 7, 8], False, 0, "token 3: speculative 8, target -1, logit gap nan"),
    ],
)
def test_lossless_means_equal_or_a_tie_with_the_runner_up(said, lossless, ties, text):
    check = check_lossless([torch.tensor(said)], PLAIN)
    assert (check.lossless, check.ties) == (lossless, ties)
    assert pytest.raises(ValueError, match=text).matches(ValueError(str(check)))


def test_a_target_that_forgets_to_drop_is_caught():
    target = TableTarget(random_table(7, 11, seed=7))
    drafter = TableDrafter(half_right(target.table, seed=8))
    prompts = ragged_prompts(8, 11, seed=9)
    plain = plain_decode(target, prompts, max_new_tokens=16, temperature=0.0, seed=0)
    target.drop = lambda keep: None
    result = evaluate(
        target, drafter, prompts, LAYOUT, depth=3, max_new_tokens=16, temperature=0.0, seed=0
    )
    assert not check_lossless(result.tokens, plain).lossless


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(ValueError, match="wanted 1 continuations, got 2"):
        check_lossless([torch.tensor([1]), torch.tensor([1])], PLAIN)
    sampled = replace(PLAIN, temperature=0.8)
    with pytest.raises(ValueError, match=r"wanted greedy continuations, got temperature 0.8"):
        check_lossless([torch.tensor([1])], sampled)


@pytest.mark.parametrize(
    ("tokens", "cyclic"),
    [
        ([4, 4, 4], True),
        ([1, 4, 4], False),
        ([9, 8, 1, 2, 1, 2, 1, 2], True),
        ([1, 2, 1, 2, 1, 2, 3], False),
        ([9, *list(range(16)) * 3], True),
        (list(range(17)) * 3, False),
        ([], False),
    ],
)
def test_cycles(tokens, cyclic):
    assert is_cyclic(torch.tensor(tokens, dtype=torch.int64)) is cyclic


def test_share_of_cyclic_text():
    texts = [
        torch.tensor([1, 1, 1]),
        torch.tensor([1, 2, 3]),
        torch.tensor([2, 2, 2]),
        PLAIN.tokens[0],
    ]
    assert cyclic_share(texts) == 0.5


def test_speed_ups():
    assert expected_speedup(2.0, depth=4, draft_cost=0.05) == pytest.approx(2.0 / 1.2)
    assert expected_speedup(2.0, depth=4, draft_cost=0.1, verify_cost=1.1) == pytest.approx(2 / 1.5)
    result = result_of([3, 7], [2, 3], [[1, 0], [2, 2]])  # 14 tokens in 2 s
    plain = plain_of([5] * 7, [1] * 7, [0.5] * 7)  # twice 7 tokens in 1 s
    plain = replace(plain, tokens=plain.tokens * 2, temperature=0.8)
    row = summarise(result, draft="toy")
    speed = speed_up(plain, result, row)
    assert speed.measured == 0.5
    assert speed.expected[0.05] == pytest.approx(2.0 / 1.1)  # depth 2
    line = speed_up_line(speed)
    assert "0.50x measured here, batches of 64 (7 / 14 tokens/s)" in line
    assert "1.82x at c=0.05" in line
    for other in (
        replace(plain, batch_size=1),
        replace(plain, temperature=0.0),
        replace(plain, tokens=plain.tokens[:1]),
    ):
        with pytest.raises(ValueError, match=r"wanted runs of the same \(prompts, batch size"):
            speed_up(other, result, row)


def cells(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines()]


def test_table_holds_a_row_per_draft_and_mode_in_plain_text():
    result = result_of([3, 7], [2, 3], [[1, 0], [2, 2]])
    rows = [summarise(result, draft=name) for name in ("trained", "untrained", "bigram")]
    text = render(acceptance_table(rows), width=90)
    wanted = ["T=0.8", "2", "2.000", "1.500-2.333", "0.60", "0.40", "2", "5"]
    for name in ("trained", "untrained", "bigram"):
        assert [name, *wanted] in cells(text)
    assert "bonus included" in text
    assert "\x1b" not in text
    assert max(len(line) for line in text.splitlines()) <= 90
