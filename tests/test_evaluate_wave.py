"""Sequences that have ended leave the wave; the target may compute on another device."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor

from specforge_ext.engines.base import TargetOutput
from specforge_ext.evaluate import BigramDrafter, EvalResult, decode, evaluate, plain_decode
from specforge_ext.records import FeatureLayout
from toy_decoding import LAYOUT, TableDrafter, TableTarget, half_right, ragged_prompts, random_table

VOCAB = 11
NEVER = 1 << 30


class Watched(TableTarget):
    """Counts how many sequences each pass after the prompt computes."""

    def start(self, num_sequences: int, layout: FeatureLayout) -> None:
        super().start(num_sequences, layout)
        self.passes: list[int] = []

    def forward(self, input_ids: Tensor, positions: Tensor, valid: Tensor) -> TargetOutput:
        self.passes.append(len(input_ids))
        return super().forward(input_ids, positions, valid)


def a_game() -> tuple[Watched, TableDrafter, list[Tensor]]:
    target = Watched(0.5 * random_table(5, VOCAB, seed=1) + random_table(1, VOCAB, seed=2))
    return target, TableDrafter(half_right(target.table, seed=3)), ragged_prompts(32, VOCAB, seed=4)


def run(target: Any, drafter: Any, prompts: list[Tensor], **options: Any) -> EvalResult:
    settings: dict[str, Any] = {"depth": 4, "max_new_tokens": 23, "temperature": 0.0, "seed": 0}
    return evaluate(target, drafter, prompts, LAYOUT, **{**settings, **options})


def counts(result: EvalResult) -> dict[str, Any]:
    """All but the times."""
    values = {f.name: getattr(result, f.name) for f in fields(result)}
    return {
        name: [x.tolist() for x in value] if isinstance(value, tuple) else
        value.tolist() if isinstance(value, Tensor) else value
        for name, value in values.items() if not name.endswith("_s")
    }  # fmt: skip


@pytest.mark.parametrize("leave", [1, 1.25, 5])
@pytest.mark.parametrize("eos", [(), (3,), (3, 7)])
@pytest.mark.parametrize("batch_size", [5, 64])
def test_who_leaves_changes_no_count(
    leave: float, eos: tuple[int, ...], batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"eos_ids": eos, "batch_size": batch_size}
    monkeypatch.setattr(decode, "LEAVE", NEVER)
    stayed = run(*a_game(), **options)
    monkeypatch.setattr(decode, "LEAVE", leave)
    target, drafter, prompts = a_game()
    left = run(target, drafter, prompts, **options)
    assert counts(left) == counts(stayed)
    passes = target.passes
    assert passes == sorted(passes, reverse=True)
    assert batch_size == 5 or passes[-1] < passes[0]
    # What each sequence observed is its own text, whoever left.
    for prompt, said, rows in zip(
        prompts[-len(drafter.rows) :], left.tokens[-len(drafter.rows) :], drafter.rows, strict=True
    ):
        text = [*prompt.tolist(), *said.tolist()]
        assert [row[1] for row in rows][: len(text) - 1] == text[1:]


def test_they_leave_once_they_are_a_fifth() -> None:
    """Of the sequences that a pass computes, more than four in five go on."""
    target, drafter, prompts = a_game()
    result = run(target, drafter, prompts)
    steps = sorted(result.steps.tolist(), reverse=True)
    size, wanted = len(prompts), []
    for done in range(steps[0]):
        alive = sum(n > done for n in steps)
        size = alive if size >= 1.25 * alive else size
        wanted.append(size)
    assert target.passes[1:] == wanted and min(wanted) < len(prompts)


def test_sampled_text_is_complete_and_repeats() -> None:
    one, two = (run(*a_game(), temperature=0.9) for _ in range(2))
    assert counts(one) == counts(two)
    assert all(len(tokens) == 23 for tokens in one.tokens)


class Elsewhere(Tensor):
    """A tensor of another device: all that may be done with it is to bring it here."""

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is not Tensor.to:
            raise RuntimeError(f"{func} met a tensor of another device")
        assert args[1:] == (torch.device("cpu"),) and not kwargs
        with torch._C.DisableTorchFunctionSubclass():
            return args[0].as_subclass(Tensor)


class FarTarget(TableTarget):
    def forward(self, input_ids: Tensor, positions: Tensor, valid: Tensor) -> TargetOutput:
        said = super().forward(input_ids, positions, valid)
        return TargetOutput(
            said.logits.as_subclass(Elsewhere),
            {name: rows.as_subclass(Elsewhere) for name, rows in said.features.items()},
        )


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_what_a_target_on_another_device_says_is_brought_here(temperature: float) -> None:
    near, drafter, prompts = a_game()
    here = run(near, drafter, prompts, temperature=temperature)
    far = FarTarget(near.table)
    there = run(far, drafter, prompts, temperature=temperature, device=torch.device("cpu"))
    assert counts(there) == counts(here)
    options: dict[str, Any] = {"max_new_tokens": 9, "temperature": temperature, "seed": 1}
    plain = [plain_decode(target, prompts, **options) for target in (near, far)]
    assert [t.tolist() for t in plain[0].tokens] == [t.tolist() for t in plain[1].tokens]
    with pytest.raises(RuntimeError, match="met a tensor of another device"):
        far.start(1, LAYOUT)
        far.forward(*(torch.zeros(1, 1, dtype=torch.int64),) * 3).logits.argmax(-1)


def test_a_bigram_forgets_the_others_too() -> None:
    drafter = BigramDrafter([torch.tensor([0, 1, 2, 0, 1])], 3, alpha=0.01)
    drafter.start(3, 4)
    tokens, valid = torch.tensor([[0], [1], [2]]), torch.ones(3, 1, dtype=torch.bool)
    drafter.observe(tokens, {}, torch.zeros_like(tokens), valid)
    drafter.select(torch.tensor([0, 2]))
    assert drafter.propose(2, temperature=0, generator=None).tokens.tolist() == [[1, 2], [0, 1]]
