"""Settings of the trainer. Everything that shapes the parameters is listed in `NUMERIC_FIELDS`."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from specforge_ext.config import Config

Beta = Annotated[float, Field(ge=0, lt=1)]


class CheckpointConfig(Config):
    """When checkpoints are written and which of them stay.

    every_steps: steps between checkpoints; the last step, SIGTERM and Ctrl-C are saved as well.
    keep_last: number of newest checkpoints that stay.
    keep_best: the checkpoint with the highest `headline_metric` stays too.
    resume: "auto" goes on from the newest complete checkpoint of the output directory if there is
        one, "none" starts anew, anything else is the path of a checkpoint.
    """

    every_steps: int = Field(default=1000, ge=1)
    keep_last: int = Field(default=2, ge=1)
    keep_best: bool = False
    resume: str = "auto"


class TrainerConfig(Config):
    """How a draft is trained.

    max_steps: stop, with the schedule at its end, after this many steps; None: the data plan's own.
    lr: highest learning rate. clip_norm: bound of the global gradient norm, None for no clipping.
    warmup_ratio: share of all steps in which the rate rises linearly from 0.
    schedule: course of the rate after the warm-up; "cosine" and "linear" end at 0.
    precision: "bfloat16" gathers parameters and multiplies matrices in bfloat16; gradients are
        summed over micro-batches and ranks in float32, parameters and moments are float32.
    activation_checkpointing: recompute each shard unit of the method in backward.
    compile: torch.compile each shard unit (the whole draft where a method names none).
    seed: of dropout and the like; rank r draws from its own stream. The draft's own initialisation
        has its own seed.
    num_threads: of torch's CPU kernels, None leaves torch's choice. Where processes share cores,
        OMP_WAIT_POLICY=passive must be in the environment before torch is imported.
    collective_timeout_s: longest wait for another rank, the time it waits for data included.
    headline_metric: ratio of the method that the progress display shows first and `keep_best`
        maximises (mean over its entries, pooled since the last checkpoint).
    log_every_steps: steps between lines of metrics.jsonl. wandb_project: None for no wandb.
    """

    max_steps: int | None = Field(default=None, ge=1)
    lr: float = Field(default=1e-4, gt=0)
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    clip_norm: float | None = Field(default=0.5, gt=0)
    warmup_ratio: float = Field(default=0.015, ge=0, le=1)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    precision: Literal["float32", "bfloat16"] = "float32"
    activation_checkpointing: bool = False
    compile: bool = False
    seed: int = Field(default=0, ge=0)
    num_threads: int | None = Field(default=None, ge=1)
    collective_timeout_s: float = Field(default=600.0, gt=0)
    checkpoint: CheckpointConfig = CheckpointConfig()
    headline_metric: str | None = None
    log_every_steps: int = Field(default=10, ge=1)
    tensorboard: bool = True
    wandb_project: str | None = None

    @model_validator(mode="after")
    def _best_needs_a_metric(self) -> Self:
        if self.checkpoint.keep_best and self.headline_metric is None:
            raise ValueError("checkpoint.keep_best wants headline_metric, got None")
        return self


NUMERIC_FIELDS = (
    "lr",
    "betas",
    "eps",
    "weight_decay",
    "clip_norm",
    "warmup_ratio",
    "schedule",
    "precision",
    "seed",
)
"""Fields that a resumed run may not change: with others it would not be the same run."""
