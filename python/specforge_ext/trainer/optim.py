"""AdamW on the local shards.

Adam works element by element, so it needs no DTensor arithmetic, whose dispatch costs more than the
update of a small draft. For checkpoints the moments are shown as DTensors laid out like their
parameters, which is what lets them be read by another number of ranks.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from specforge_ext.trainer.config import TrainerConfig

MOMENTS = ("exp_avg", "exp_avg_sq")


class ShardedAdamW:
    """AdamW over the local parts of `parameters` (name -> sharded float32 parameter)."""

    def __init__(self, parameters: Mapping[str, DTensor], config: TrainerConfig) -> None:
        self._parameters = dict(parameters)
        self._updates = 0
        self._shards = {name: _local(p) for name, p in self._parameters.items()}
        self._adam = torch.optim.AdamW(
            [shard for shard in self._shards.values() if shard.numel()] or [_nothing()],
            lr=config.lr,
            betas=config.betas,
            eps=config.eps,
            weight_decay=config.weight_decay,
            fused=True,
        )
        for shard in self._shards.values():
            self._adam.state[shard] = {
                # The fused kernel wants its step count on the device of the parameter.
                "step": torch.zeros((), dtype=torch.float32, device=shard.device),
                **{moment: torch.zeros_like(shard) for moment in MOMENTS},
            }

    def gradients(self) -> list[Tensor]:
        """This rank's part of every gradient that there is; writing to them writes through."""
        return [_local(g) for p in self._parameters.values() if (g := p.grad) is not None]

    def step(self, lr: float) -> None:
        """Update the parameters in place from their gradients, and drop the gradients."""
        for group in self._adam.param_groups:
            group["lr"] = lr
        for name, parameter in self._parameters.items():
            if parameter.grad is not None:
                self._shards[name].grad = _local(parameter.grad)
        self._adam.step()
        self._updates += 1
        self.drop_gradients()

    def drop_gradients(self) -> None:
        for name, parameter in self._parameters.items():
            parameter.grad = None
            self._shards[name].grad = None

    def state(self) -> dict[str, Tensor]:
        """`<moment>.<name>` -> a DTensor over the moment itself; writing to it restores it."""
        return {
            f"{moment}.{name}": _like(parameter, self._adam.state[self._shards[name]][moment])
            for name, parameter in self._parameters.items()
            for moment in MOMENTS
        }

    @property
    def updates(self) -> int:
        """Updates made so far; steps of no weight make none."""
        return self._updates

    @updates.setter
    def updates(self, value: int) -> None:
        self._updates = value
        for shard in self._shards.values():
            self._adam.state[shard]["step"].fill_(float(value))


def _local(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor, over the same memory."""
    assert isinstance(tensor, DTensor)
    part: Tensor = tensor.to_local()
    return part.detach()


def _nothing() -> Tensor:
    """A stand-in for a rank that holds no element of any parameter: AdamW refuses an empty list."""
    return torch.zeros(0)


def _like(parameter: DTensor, local: Tensor) -> Tensor:
    return DTensor.from_local(
        local,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
