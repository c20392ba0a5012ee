"""From counts to what is published: acceptance with its convention, speed-up, a table."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from rich import box
from rich.console import Console
from rich.table import Table

from specforge_ext.evaluate.decode import EvalResult
from specforge_ext.evaluate.interval import ratio_interval
from specforge_ext.evaluate.plain import PlainResult

BONUS_INCLUDED = "bonus_included: tokens / verify steps, of full steps, prefill token not counted"
"""What `Acceptance.length` is: SGLang's completion tokens / verify steps, without its two edge
effects (the token that prefill says, and the last step that the budget cuts short)."""

DRAFT_COSTS = (0.02, 0.05, 0.1, 0.2)
"""Costs of one draft pass, in passes of the target, at which an expected speed-up is stated."""


@dataclass(frozen=True)
class Acceptance:
    """Acceptance of one draft in one mode.

    draft: which one ("trained", "untrained", "bigram", ...). mode: "greedy" or "sampling".
    length: tokens a verify step, by `convention`. ci95: bootstrap over prompts.
    per_position[k]: share of rounds in which drafted tokens 0..k were all accepted (joint).
    lengths: the same run by other engines' conventions: "sglang" completion tokens / verify steps
    (all of both), "vllm" 1 + accepted / drafts.
    prompts, tokens, rounds: how much was counted.
    """

    draft: str
    mode: str
    temperature: float
    depth: int
    length: float
    ci95: tuple[float, float]
    per_position: tuple[float, ...]
    convention: str
    lengths: Mapping[str, float]
    prompts: int
    tokens: int
    rounds: int

    def to_dict(self) -> dict[str, object]:
        """Plain data, for summary.json."""
        return asdict(self)


def summarise(result: EvalResult, *, draft: str, seed: int = 0) -> Acceptance:
    """Acceptance of a run. ValueError if it holds no full round (budget of at most the depth)."""
    ci95 = ratio_interval(result.round_tokens, result.rounds, seed=seed)
    rounds, tokens = int(result.rounds.sum()), int(result.round_tokens.sum())
    accepted_K = result.accepted_at.sum(0)
    completion = sum(len(row) for row in result.tokens)
    return Acceptance(
        draft=draft,
        mode="greedy" if result.temperature == 0 else "sampling",
        temperature=result.temperature,
        depth=result.depth,
        length=tokens / rounds,
        ci95=ci95,
        per_position=tuple((accepted_K.double() / rounds).tolist()),
        convention=BONUS_INCLUDED,
        lengths={
            "sglang": completion / int(result.steps.sum()),
            "vllm": 1.0 + int(accepted_K.sum()) / rounds,
        },
        prompts=len(result.tokens),
        tokens=tokens,
        rounds=rounds,
    )


def expected_speedup(
    length: float, *, depth: int, draft_cost: float, verify_cost: float = 1.0
) -> float:
    """length / (verify_cost + depth * draft_cost), over plain decoding, whose pass costs 1.

    draft_cost: one draft pass; verify_cost: one target pass over depth + 1 tokens (1.0 where
    decoding is bound by reading the weights).
    Source: Leviathan et al., arXiv 2211.17192, Theorem 3.8.
    """
    return length / (verify_cost + depth * draft_cost)


@dataclass(frozen=True)
class SpeedUp:
    """Tokens a second of whole runs: with prefill, to the end of each wave's longest sequence.

    measured: speculative / plain, `batch_size` sequences together.
    expected[c]: `expected_speedup` at draft cost c and verify cost 1.
    """

    plain_tokens_per_s: float
    speculative_tokens_per_s: float
    measured: float
    batch_size: int
    expected: Mapping[float, float]


def speed_up(
    plain: PlainResult,
    speculative: EvalResult,
    acceptance: Acceptance,
    *,
    draft_costs: Sequence[float] = DRAFT_COSTS,
) -> SpeedUp:
    """Measured and expected gain over the same prompts with the same budget.

    Raises ValueError if the runs differ in prompts, batch size or temperature.
    """
    settings = [(len(run.tokens), run.batch_size, run.temperature) for run in (plain, speculative)]
    if settings[0] != settings[1]:
        raise ValueError(
            "speed_up: wanted runs of the same (prompts, batch size, temperature), "
            f"got plain {settings[0]} and speculative {settings[1]}"
        )
    plain_rate = sum(len(row) for row in plain.tokens) / plain.wall_s
    rate = sum(len(row) for row in speculative.tokens) / speculative.wall_s
    depth = acceptance.depth
    expected = {
        cost: expected_speedup(acceptance.length, depth=depth, draft_cost=cost)
        for cost in draft_costs
    }
    return SpeedUp(plain_rate, rate, rate / plain_rate, plain.batch_size, expected)


def speed_up_line(speed: SpeedUp) -> str:
    """One line: what was measured here, and what to expect at given costs."""
    expected = ", ".join(f"{gain:.2f}x at c={cost:g}" for cost, gain in speed.expected.items())
    return (
        f"wall clock, speculative / plain: {speed.measured:.2f}x measured here, batches of "
        f"{speed.batch_size} ({speed.speculative_tokens_per_s:.0f} / "
        f"{speed.plain_tokens_per_s:.0f} tokens/s); "
        f"expected length / (1 + depth c), c = draft pass / target pass: {expected}"
    )


def acceptance_table(rows: Sequence[Acceptance]) -> Table:
    """A row per draft and mode."""
    table = Table(
        box=box.SIMPLE,
        title="acceptance length (tokens / verify step, bonus included)",
        title_justify="left",
    )
    for name in ("draft", "mode", "depth", "length", "95 % interval", "accepted at 1.. (joint)"):
        table.add_column(name, justify="left" if name in ("draft", "mode") else "right")
    table.add_column("prompts", justify="right")
    table.add_column("rounds", justify="right")
    for row in rows:
        table.add_row(
            row.draft,
            "greedy" if row.mode == "greedy" else f"T={row.temperature:g}",
            str(row.depth),
            f"{row.length:.3f}",
            f"{row.ci95[0]:.3f}-{row.ci95[1]:.3f}",
            " ".join(f"{rate:.2f}" for rate in row.per_position),
            str(row.prompts),
            str(row.rounds),
        )
    return table


def render(table: Table, *, width: int = 100) -> str:
    """The table as plain text, for logs and files."""
    out = io.StringIO()
    Console(file=out, width=width, color_system=None).print(table)
    return out.getvalue()
