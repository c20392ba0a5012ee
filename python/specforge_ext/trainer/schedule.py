"""Learning rates as a pure function of the step, so that a resumed run needs no scheduler state."""

from __future__ import annotations

import math

from specforge_ext.trainer.config import TrainerConfig


def warmup_steps(config: TrainerConfig, total_steps: int) -> int:
    """Steps of the linear rise, rounded up, so that any positive ratio has at least one."""
    return math.ceil(config.warmup_ratio * total_steps)


def learning_rate(config: TrainerConfig, step: int, total_steps: int) -> float:
    """The rate of step `step` (from 0) of `total_steps`.

    Step s of w warm-up steps has lr * (s + 1) / w; after it, with x = (s - w) / (total - w), cosine
    is lr * (1 + cos(pi x)) / 2 and linear lr * (1 - x): 0 would be reached at step `total_steps`.
    """
    warmup = warmup_steps(config, total_steps)
    if step < warmup:
        return config.lr * ((step + 1) / warmup)
    if config.schedule == "constant":
        return config.lr
    done = (step - warmup) / (total_steps - warmup)
    if config.schedule == "linear":
        return config.lr * (1.0 - done)
    return config.lr * 0.5 * (1.0 + math.cos(math.pi * done))
