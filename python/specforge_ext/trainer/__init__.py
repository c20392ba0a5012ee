"""Trains a draft from a method object and a source of steps: FSDP2, checkpoints, metrics."""

from specforge_ext.trainer.checkpoint import CheckpointError
from specforge_ext.trainer.config import TrainerConfig
from specforge_ext.trainer.data import StepData, StepSource
from specforge_ext.trainer.distributed import CollectiveError, World, open_world
from specforge_ext.trainer.joint import JointTrainer, Lane
from specforge_ext.trainer.loop import Trainer, TrainResult
from specforge_ext.trainer.step import NonFiniteError

__all__ = [
    "CheckpointError",
    "CollectiveError",
    "JointTrainer",
    "Lane",
    "NonFiniteError",
    "StepData",
    "StepSource",
    "TrainResult",
    "Trainer",
    "TrainerConfig",
    "World",
    "open_world",
]
