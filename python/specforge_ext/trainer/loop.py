"""The training loop: data in, steps made, checkpoints and metrics out."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from specforge_ext.config import defaults
from specforge_ext.methods.base import Method
from specforge_ext.trainer import rng
from specforge_ext.trainer.checkpoint import Checkpointer, Meta, read_meta
from specforge_ext.trainer.config import NUMERIC_FIELDS, TrainerConfig
from specforge_ext.trainer.data import StepData, StepSource
from specforge_ext.trainer.distributed import World
from specforge_ext.trainer.metrics import Clock, Sink, metrics_line, open_sinks
from specforge_ext.trainer.optim import ShardedAdamW
from specforge_ext.trainer.progress import Progress
from specforge_ext.trainer.sharding import Shards, checkpoint_activations, compile_units
from specforge_ext.trainer.signals import StopRequest, stop_on_signals
from specforge_ext.trainer.step import StepReport, TrainStep

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainResult:
    """What a `fit` did. Counts are of all ranks.

    steps: done since the run began, of total_steps. resumed_step: where this process went on.
    samples_trained, tokens_trained: since the run began. wall_s, data_wait_s: of this process (the
    wait is the mean over ranks), compilation and checkpoints included.
    stopped_by_signal: SIGTERM or Ctrl-C ended it before the last step; it is saved and can go on.
    """

    steps: int
    total_steps: int
    resumed_step: int
    samples_trained: int
    tokens_trained: int
    wall_s: float
    data_wait_s: float
    stopped_by_signal: bool
    final_loss: float | None
    checkpoint: Path | None


class Trainer:
    """Trains one draft. To be made and used by all ranks of a world alike.

    draft: on the world's device, float32, equal on every rank; it is sharded in place.
    identity: JSON values that a run that resumes must share (recipe, hash of the data plan, ...);
    the trainer adds its own. identity_defaults: what a checkpoint of an older version, which lacks
    a value, stands for. label: stands before what is shown of it, where several drafts train.
    Writes metrics.jsonl, tensorboard/ and checkpoints/ into output_dir.
    """

    def __init__(
        self,
        config: TrainerConfig,
        method: Method,
        draft: nn.Module,
        data: StepSource,
        *,
        output_dir: Path,
        world: World,
        identity: Mapping[str, Any] | None = None,
        identity_defaults: Mapping[str, Any] | None = None,
        label: str = "",
    ) -> None:
        if config.num_threads is not None:
            torch.set_num_threads(config.num_threads)
        self._config = config
        self._label = label
        self._state = _RunState(config.headline_metric)
        self._start_s = time.perf_counter()
        self._sinks: list[Sink] = []
        self._clock = Clock()
        self._data = data
        self._output_dir = output_dir
        self._world = world
        self.total_steps = min(data.total_steps, config.max_steps or data.total_steps)
        self._identity = {
            **(identity or {}),
            "total_steps": self.total_steps,
            "trainer": config.model_dump(mode="json", include=set(NUMERIC_FIELDS)),
        }
        self._identity_defaults = {**(identity_defaults or {}), "trainer": defaults(TrainerConfig)}
        units = list(method.shard_units(draft))
        if config.compile:
            compile_units(draft, units)
        if config.activation_checkpointing:
            checkpoint_activations(method.recompute_units(draft))
        self._shards = Shards(draft, units, world=world, precision=config.precision)
        self._optimizer = ShardedAdamW(self._shards.parameters(), config)
        self._step = TrainStep(
            method,
            self._shards,
            self._optimizer,
            world=world,
            config=config,
            total_steps=self.total_steps,
        )
        self._checkpointer = Checkpointer(
            output_dir / "checkpoints",
            world,
            keep_last=config.checkpoint.keep_last,
            keep_best=config.checkpoint.keep_best,
        )

    def fit(self) -> TrainResult:
        """Train to the last step, SIGTERM or Ctrl-C, from the checkpoint that the config names.

        Raises ValueError if that checkpoint is of another run, NonFiniteError, CollectiveError.
        """
        self.begin()
        with ExitStack() as stack:
            stop = stack.enter_context(stop_on_signals())
            self.open_sinks(stack)
            self._run(stop)
        return self.result()

    # What `fit` is made of, for who shares a stream among several.

    def begin(self) -> None:
        """Seed this process, and go to the checkpoint that the config names."""
        rng.seed_everything(self._config.seed, self._world.rank)
        self._state = self._resume()
        self._start_s = time.perf_counter()

    @property
    def step(self) -> int:
        """Steps done."""
        return self._state.step

    @property
    def done(self) -> bool:
        return self._state.step == self.total_steps

    def open_sinks(self, stack: ExitStack) -> None:
        """Where metrics go, until the stack ends."""
        self._sinks = self._open_sinks(self._state.step)
        for sink in self._sinks:
            stack.callback(sink.close)
        self._clock = Clock()

    def advance(self, data: StepData, stop: Callable[[], bool]) -> bool:
        """One step, with its metrics and its checkpoint; whether any rank was asked to stop."""
        state = self._state
        if data.step != state.step:
            raise ValueError(f"StepSource: wanted step {state.step}, got {data.step}")
        report = self._step.run(data, stop=stop)
        state.count(report)
        self._clock.count(report)
        last = report.stop or self.done
        if last or state.step % self._config.log_every_steps == 0:
            line = metrics_line(report, self._clock.lap())
            for sink in self._sinks:
                sink.write(line)
        if last or state.step % self._config.checkpoint.every_steps == 0:
            self.save()
        return report.stop

    def save(self) -> None:
        """All ranks: a checkpoint of this step, if there is none yet."""
        meta = Meta(
            step=self._state.step,
            world_size=self._world.size,
            updates=self._optimizer.updates,
            samples=self._state.samples,
            tokens=self._state.tokens,
            metric=self._state.take_headline(),
            identity=self._identity,
        )
        self._state.checkpoint = self._checkpointer.save(self._tensors(), meta)

    def result(self) -> TrainResult:
        state = self._state
        return TrainResult(
            steps=state.step,
            total_steps=self.total_steps,
            resumed_step=state.resumed_step,
            samples_trained=state.samples,
            tokens_trained=state.tokens,
            wall_s=time.perf_counter() - self._start_s,
            data_wait_s=state.wait_s,
            stopped_by_signal=state.step < self.total_steps,
            final_loss=state.loss,
            checkpoint=state.checkpoint,
        )

    def full_state_dict(self) -> dict[str, Tensor]:
        """All ranks: the whole draft's state dict, detached, on the CPU."""
        return self._shards.full_state_dict()

    def _run(self, stop: StopRequest) -> None:
        if self.done:
            log.info("nothing to do: step %d is the last one", self.step)
            return
        for data in self._data.iterate(self.step):
            if self.advance(data, stop) or self.done:
                return
        raise ValueError(
            f"StepSource: wanted {self.total_steps} steps, but the data ended after {self.step}"
        )

    def _open_sinks(self, step: int) -> list[Sink]:
        if self._world.rank != 0:
            return []
        self._output_dir.mkdir(parents=True, exist_ok=True)
        sinks = open_sinks(self._config, self._output_dir, resume_step=step, label=self._label)
        progress = Progress(
            start_step=step,
            total_steps=self.total_steps,
            headline=self._config.headline_metric,
            label=self._label,
        )
        return [*sinks, progress]

    def _tensors(self) -> dict[str, Tensor]:
        """Everything that a checkpoint holds as tensors; reading one writes into them."""
        draft = {f"draft.{k}": v for k, v in self._shards.draft.state_dict().items()}
        moments = {f"optimizer.{k}": v for k, v in self._optimizer.state().items()}
        return {**draft, **moments}

    def _resume(self) -> _RunState:
        path = self._checkpointer.choose(self._config.checkpoint.resume)
        if path is None:
            return _RunState(self._config.headline_metric)
        theirs = dict(read_meta(path).identity)
        check_identity(path, theirs, self._identity, when_absent=self._identity_defaults)
        meta = self._checkpointer.load(path, self._tensors())
        self._optimizer.updates = meta.updates
        if meta.world_size != self._world.size and self._world.rank == 0:
            log.warning(
                "%s was written by %d ranks and is read by %d: the same samples, new random states",
                path,
                meta.world_size,
                self._world.size,
            )
        log.info("going on from %s, step %d", path, meta.step)
        return _RunState(self._config.headline_metric, meta, path)


class _RunState:
    """What changes from step to step beside the tensors."""

    def __init__(
        self, headline: str | None, meta: Meta | None = None, checkpoint: Path | None = None
    ) -> None:
        self.step = self.resumed_step = meta.step if meta else 0
        self.samples = meta.samples if meta else 0
        self.tokens = meta.tokens if meta else 0
        self.wait_s = 0.0
        self.loss: float | None = None
        self.checkpoint = checkpoint
        self._headline = headline
        self._above: Tensor | float = 0.0
        self._below: Tensor | float = 0.0

    def count(self, step: StepReport) -> None:
        self.step += 1
        self.wait_s += step.wait_s
        if step.skipped:
            return
        self.samples += step.samples
        self.tokens += step.tokens
        self.loss = step.loss
        if self._headline is None:
            return
        if self._headline not in step.ratios:
            raise ValueError(
                f"trainer.headline_metric: wanted one of the method's ratios "
                f"{', '.join(step.ratios)}, got {self._headline!r}"
            )
        self._above = self._above + step.sums[self._headline]
        self._below = self._below + step.sums[step.ratios[self._headline]]

    def take_headline(self) -> float | None:
        """The headline metric, pooled since the last call, mean over its defined entries."""
        above, below = torch.as_tensor(self._above), torch.as_tensor(self._below)
        self._above = self._below = 0.0
        entries = (above / below).reshape(-1)
        entries = entries[torch.isfinite(entries)]
        return float(entries.mean()) if entries.numel() else None


def check_identity(
    path: Path,
    theirs: Mapping[str, Any],
    ours: Mapping[str, Any],
    *,
    when_absent: Mapping[str, Any] | None = None,
    where: str = "",
) -> None:
    """ValueError names the first thing in which two runs differ. Tuples and lists are the same.

    when_absent: what stands where `theirs`, of a version that did not know it, has nothing. where:
    prefix of the keys in messages.
    """
    theirs, ours, absent = (json.loads(json.dumps(x)) for x in (theirs, ours, when_absent or {}))
    for key in [*ours, *(key for key in theirs if key not in ours)]:
        mine, other = ours.get(key), theirs.get(key, absent.get(key))
        if isinstance(mine, dict) and isinstance(other, dict):
            absent_here = absent.get(key) or {}
            check_identity(path, other, mine, when_absent=absent_here, where=f"{where}{key}.")
        elif mine != other:
            raise ValueError(
                f"{path}: is of another run: wanted {where}{key} = {mine!r}, got {other!r}; "
                "restore it or choose another output_dir"
            )
