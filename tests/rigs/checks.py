"""What the rigs' tests ask of any server."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rigs import build
from rigs.servers import Answers
from rigs.trained import Trained
from specforge_ext.evaluate import check_lossless


def built(rig: str) -> Path:
    """The rig's environment; skips where nobody has built it (a skip is a failure in .ci/run)."""
    venv = build.environment(rig)
    if not build.is_built(venv):
        command = build.command_to_build(rig)
        pytest.skip(f"no real {rig}: `{command}` installs it (3 minutes, 3 GB) into {venv}")
    return venv


def check_text(draft: Trained, answers: Answers) -> None:
    """Greedy text is the target's own, token for token, but for ties of its two best logits."""
    found = check_lossless([torch.tensor(row) for row in answers.tokens], draft.plain)
    print(f"text: {found}")
    assert found.lossless, str(found)


def check_counters(draft: Trained, answers: Answers) -> None:
    """Acceptance is our evaluator's: inside its interval, and nearly the same number of steps.

    The interval is over prompts, and both decode the same ones: what differs is rounding, which
    turns a drafted token now and then. Hence the second, tighter bound.
    """
    counted, ours = answers.counters, draft.acceptance
    assert counted is not None
    depth = draft.result.depth
    print(f"server {counted}, length {counted.length:.3f}; ours {ours}")
    low, high = ours.ci95
    assert low <= counted.length <= high, (counted, ours)
    assert counted.drafted == depth * counted.drafts
    assert len(counted.at) == depth and sum(counted.at) == counted.accepted
    assert list(counted.at) == sorted(counted.at, reverse=True)
    steps = int(draft.result.steps.sum())
    assert abs(counted.drafts - steps) <= 0.02 * steps, (counted, steps)
    for k, rate in enumerate(ours.per_position):
        assert abs(counted.at[k] / counted.drafts - rate) <= 0.03, (k, counted, ours)
