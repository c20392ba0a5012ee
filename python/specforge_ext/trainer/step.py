"""One optimizer step. The only place that divides.

gradient = (sum over ranks and micro-batches of d loss_sum) / (sum over ranks and micro-batches of
weight_sum), so that neither the cut into micro-batches nor the number of ranks changes what is
learned.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from enum import IntEnum

import torch
from torch import Tensor

from specforge_ext.copies import STAGES, Stage, counting
from specforge_ext.methods.base import Method
from specforge_ext.records import PackedBatch, StepContext, StepLoss
from specforge_ext.trainer.config import TrainerConfig
from specforge_ext.trainer.data import StepData
from specforge_ext.trainer.distributed import World
from specforge_ext.trainer.optim import ShardedAdamW
from specforge_ext.trainer.prefetch import DevicePrefetcher
from specforge_ext.trainer.schedule import learning_rate
from specforge_ext.trainer.sharding import Shards
from specforge_ext.trainer.sums import MetricSums

log = logging.getLogger(__name__)

MAX_NAMED_SAMPLES = 16
"""Sample ids of a micro-batch that an error names."""


class NonFiniteError(ArithmeticError):
    """A loss, a weight or a gradient is NaN or infinite; the parameters are as before the step."""


@dataclass(frozen=True)
class StepReport:
    """What a step did, summed over ranks.

    step: index, from 0. loss: nats, mean by weight; None where `skipped`, because the weight is 0.
    grad_norm: of the mean gradient, before clipping. wait_s: mean over ranks.
    sums, ratios: see MetricSums. stop: a rank was asked to stop.
    delivered_bytes, copied: bytes of features, and those copied for them by stage (copies.py).
    """

    step: int
    loss: float | None
    lr: float
    grad_norm: float
    weight: float
    samples: int
    tokens: int
    wait_s: float
    skipped: bool
    stop: bool
    sums: Mapping[str, Tensor] = field(default_factory=dict)
    ratios: Mapping[str, str] = field(default_factory=dict)
    delivered_bytes: int = 0
    copied: Mapping[Stage, int] = field(default_factory=dict)


class _Slot(IntEnum):
    """Places in the vector that the ranks sum at the end of a step; the stages of copies follow."""

    LOSS = 0
    WEIGHT = 1
    GRAD_SQUARES = 2
    NON_FINITE = 3
    SAMPLES = 4
    TOKENS = 5
    WAIT_S = 6
    STOP = 7
    UNKNOWN_METRICS = 8
    DELIVERED_BYTES = 9


@dataclass(frozen=True)
class _Local:
    """This rank's part. losses, weights: [micro-batches] float64 on the CPU. copied: bytes."""

    losses: Tensor
    weights: Tensor
    grad_squares: float
    copied: Counter[Stage]


class TrainStep:
    """Makes steps with one draft: `run` is called by all ranks, for the same step."""

    def __init__(
        self,
        method: Method,
        shards: Shards,
        optimizer: ShardedAdamW,
        *,
        world: World,
        config: TrainerConfig,
        total_steps: int,
    ) -> None:
        self._method = method
        self._shards = shards
        self._optimizer = optimizer
        self._world = world
        self._config = config
        self._total_steps = total_steps
        self._metrics = MetricSums(world)
        self._prefetcher = DevicePrefetcher(world.device)

    def run(self, data: StepData, *, stop: Callable[[], bool] = lambda: False) -> StepReport:
        """Train on this rank's part of a step.

        stop: asked once, after the work; the report says whether any rank answered True.
        Raises NonFiniteError, on all ranks alike; CollectiveError if another rank is gone.
        """
        local = self._forward_backward(data)
        total = self._sum(local, data, stop=stop())
        if total[_Slot.UNKNOWN_METRICS]:
            self._metrics.agree()
        sums = self._metrics.reduce()
        if total[_Slot.NON_FINITE] or not math.isfinite(total[_Slot.GRAD_SQUARES]):
            self._optimizer.drop_gradients()
            raise NonFiniteError(self._explain(data, local))
        weight = total[_Slot.WEIGHT]
        grad_norm = math.sqrt(total[_Slot.GRAD_SQUARES]) / weight if weight else 0.0
        lr = learning_rate(self._config, data.step, self._total_steps)
        self._update(data.step, weight=weight, grad_norm=grad_norm, lr=lr)
        return StepReport(
            step=data.step,
            loss=total[_Slot.LOSS] / weight if weight else None,
            lr=lr,
            grad_norm=grad_norm,
            weight=weight,
            samples=int(total[_Slot.SAMPLES]),
            tokens=int(total[_Slot.TOKENS]),
            wait_s=total[_Slot.WAIT_S] / self._world.size,
            skipped=not weight,
            stop=bool(total[_Slot.STOP]),
            sums=sums,
            ratios=self._metrics.ratios,
            delivered_bytes=int(total[_Slot.DELIVERED_BYTES]),
            copied={s: int(n) for s, n in zip(STAGES, total[len(_Slot) :], strict=True) if n},
        )

    def _forward_backward(self, data: StepData) -> _Local:
        """Leaves the gradients of the sum over all ranks in the shards."""
        self._shards.gather()
        losses, weights = [], []
        at = StepContext(step=data.step, total_steps=self._total_steps, seed=self._config.seed)
        with counting() as here:
            for batch in self._prefetcher.batches(data):
                loss = self._micro_batch(batch, at)
                losses.append(loss.loss_sum.detach())
                weights.append(loss.weight_sum.detach())
                self._metrics.add(loss)
        self._shards.reduce_gradients()
        return _Local(
            losses=_to_host(losses),
            weights=_to_host(weights),
            grad_squares=_squares(self._optimizer.gradients()),
            copied=here + Counter(data.copied),
        )

    def _micro_batch(self, batch: PackedBatch, at: StepContext) -> StepLoss:
        with self._autocast():
            loss = self._method.step(self._shards.draft, batch, at)
        # Without a scored token a method may return a constant: nothing to go back through.
        if loss.loss_sum.requires_grad:
            loss.loss_sum.backward()  # type: ignore[no-untyped-call]
        return loss

    def _autocast(self) -> AbstractContextManager[object]:
        """FSDP2 casts parameters, not buffers: frozen target tensors need autocast as well."""
        if self._config.precision == "bfloat16":
            return torch.autocast(self._world.device.type, dtype=torch.bfloat16)
        return nullcontext()

    def _sum(self, local: _Local, data: StepData, *, stop: bool) -> list[float]:
        mine = torch.zeros(len(_Slot) + len(STAGES), dtype=torch.float64)
        finite = torch.isfinite(local.losses) & torch.isfinite(local.weights)
        mine[_Slot.LOSS] = local.losses.sum()
        mine[_Slot.WEIGHT] = local.weights.sum()
        mine[_Slot.GRAD_SQUARES] = local.grad_squares
        mine[_Slot.NON_FINITE] = float((~finite).sum())
        mine[_Slot.SAMPLES] = data.samples
        mine[_Slot.TOKENS] = data.tokens
        mine[_Slot.WAIT_S] = data.wait_s
        mine[_Slot.STOP] = float(stop)
        mine[_Slot.UNKNOWN_METRICS] = float(self._metrics.is_unknown())
        mine[_Slot.DELIVERED_BYTES] = data.delivered_bytes
        for place, stage in enumerate(STAGES, len(_Slot)):
            mine[place] = local.copied[stage]
        return self._world.sum(mine, f"sums of step {data.step}").tolist()

    def _update(self, step: int, *, weight: float, grad_norm: float, lr: float) -> None:
        if not weight:
            if self._world.rank == 0:
                log.warning("step %d skipped: no rank has a scored token (weight 0)", step)
            self._optimizer.drop_gradients()
            return
        clip = self._config.clip_norm
        scale = 1.0 if clip is None or grad_norm <= clip else clip / grad_norm
        for gradient in self._optimizer.gradients():
            gradient.mul_(scale / weight)
        self._optimizer.step(lr)

    def _explain(self, data: StepData, local: _Local) -> str:
        """All ranks: which micro-batches are to blame."""
        bad = ~(torch.isfinite(local.losses) & torch.isfinite(local.weights))
        mine = [
            (
                bool(bad[i]),
                f"rank {self._world.rank} micro-batch {i} (loss {float(local.losses[i]):g}, weight "
                f"{float(local.weights[i]):g}): samples {_named(batch.sample_ids)}",
            )
            for i, batch in enumerate(data.micro_batches)
        ]
        everything = [
            line for lines in self._world.gather(mine, "non-finite step") for line in lines
        ]
        guilty = [text for is_bad, text in everything if is_bad]
        what = "loss or weight is not finite" if guilty else "loss is finite, its gradient is not"
        return f"step {data.step}: {what}: " + "; ".join(guilty or [text for _, text in everything])


def _named(sample_ids: tuple[str, ...]) -> str:
    more = len(sample_ids) - MAX_NAMED_SAMPLES
    return ", ".join(sample_ids[:MAX_NAMED_SAMPLES]) + (f" and {more} more" if more > 0 else "")


def _to_host(values: list[Tensor]) -> Tensor:
    if not values:
        return torch.zeros(0, dtype=torch.float64)
    return torch.stack([value.to(torch.float64) for value in values]).cpu()


def _squares(gradients: list[Tensor]) -> float:
    """Sum of the squares of all elements, one synchronisation."""
    norm = torch.nn.utils.get_total_norm(gradients)
    return float(norm.to(torch.float64).square())
