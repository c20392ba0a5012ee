"""Several drafts from one stream of steps, each exactly as it would be trained alone."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from specforge_ext.trainer import rng
from specforge_ext.trainer.data import StepData, StepSource
from specforge_ext.trainer.loop import Trainer, TrainResult
from specforge_ext.trainer.signals import StopRequest, stop_on_signals
from specforge_ext.trainer.step import NonFiniteError

log = logging.getLogger(__name__)


@dataclass
class Lane:
    """One of the drafts. view: of a step of the stream, the part that this draft reads.

    Its random states are its own: they stand still while another draft draws.
    """

    name: str
    trainer: Trainer
    view: Callable[[StepData], StepData]
    _states: Mapping[str, Any] | None = None

    def begin(self) -> None:
        self.trainer.begin()
        self._states = rng.capture()

    def advance(self, data: StepData, stop: StopRequest) -> bool:
        """Whether any rank was asked to stop. NonFiniteError names the draft."""
        self._resume_random()
        try:
            asked = self.trainer.advance(self.view(data), stop)
        except NonFiniteError as error:
            raise NonFiniteError(f"draft {self.name}: {error}") from error
        self._states = rng.capture()
        return asked

    def save(self) -> None:
        self._resume_random()
        self.trainer.save()

    def _resume_random(self) -> None:
        assert self._states is not None, "begin comes first"
        rng.restore(dict(self._states))


class JointTrainer:
    """Trains the drafts step by step, one after the other. To be used by all ranks alike.

    Each has its own checkpoints, schedule and metrics. A job that was killed between two drafts'
    checkpoints goes on from the older one; the draft that is ahead waits until the stream is there.
    """

    def __init__(self, lanes: list[Lane], data: StepSource) -> None:
        self._lanes = lanes
        self._data = data

    def fit(self) -> dict[str, TrainResult]:
        """As `Trainer.fit`, by name. SIGTERM ends all drafts after the same step of the stream."""
        with ExitStack() as stack:
            for lane in self._lanes:
                lane.begin()
            stop = stack.enter_context(stop_on_signals())
            for lane in self._lanes:
                lane.trainer.open_sinks(stack)
            self._run(stop)
        return {lane.name: lane.trainer.result() for lane in self._lanes}

    def _run(self, stop: StopRequest) -> None:
        if not (left := self._left()):
            log.info("nothing to do: every draft has done its last step")
            return
        for data in self._data.iterate(min(lane.trainer.step for lane in left)):
            turns = [lane for lane in self._left() if lane.trainer.step <= data.step]
            asked = [lane.advance(data, stop) for lane in turns]
            if any(asked):
                for lane in self._left():
                    lane.save()
                return
            if not self._left():
                return
        late = ", ".join(f"{lane.name} after {lane.trainer.step}" for lane in self._left())
        raise ValueError(f"StepSource: the data ended before the drafts were done: {late}")

    def _left(self) -> list[Lane]:
        return [lane for lane in self._lanes if not lane.trainer.done]
