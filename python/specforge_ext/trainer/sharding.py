"""FSDP2 around a draft: parameters gathered once a step, gradients summed once a step.

FSDP2's own hooks exchange data inside forward and backward, so every rank has to run the same
modules the same number of times. Here all exchanges happen in `gather` and `reduce_gradients`, in
an order that depends on the module tree only: a rank may have any number of micro-batches, a batch
without a scored token may skip modules, and a module that is called once per TTT step costs one
exchange. The price is that the whole draft stays gathered during a step (ZeRO-2), and that the sum
does not overlap backward; drafts are small beside their activations.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from specforge_ext.trainer.distributed import World


class Shards:
    """A draft whose parameters are spread over the ranks of a world.

    draft: on the world's device, equal on every rank; changed in place. units: submodules that
    become FSDP units before the root does. precision: "float32" or "bfloat16", see TrainerConfig.
    Raises ValueError if the draft differs between ranks or has nothing to train.
    """

    def __init__(
        self, draft: nn.Module, units: Sequence[nn.Module], *, world: World, precision: str
    ) -> None:
        if not any(p.requires_grad for p in draft.parameters()):
            raise ValueError("draft: wanted a parameter that requires a gradient, got none")
        _check_equal_on_ranks(draft, world)
        self.draft = draft
        self._world = world
        self._modules = _fully_shard(draft, units, world=world, precision=precision)
        self._anchor = torch.zeros((), device=world.device, requires_grad=True)
        draft.sum_gradients = _identity  # type: ignore[assignment]
        register_fsdp_forward_method(draft, "sum_gradients")

    def parameters(self) -> dict[str, DTensor]:
        """The trained parameters under their names, sharded, float32."""
        out: dict[str, DTensor] = {}
        for name, parameter in self.draft.named_parameters():
            if parameter.requires_grad:
                assert isinstance(parameter, DTensor)
                out[name] = parameter
        return out

    def gather(self) -> None:
        """All ranks: hold every parameter whole, until the next `reduce_gradients`."""
        self._set_sync(False)
        with self._world.collective("all-gather of the parameters"):
            for module in self._modules:
                module.unshard()

    def reduce_gradients(self) -> None:
        """All ranks: sum the gradients over ranks into the shards and let go of whole parameters.

        A parameter without a gradient on this rank counts as zero.
        """
        for parameter in self.draft.parameters():
            if parameter.requires_grad and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        self._set_sync(True)
        with self._world.collective("sum of the gradients"):
            # An empty pass through the root's hooks makes FSDP2 reduce what has been accumulated.
            out = self.draft.sum_gradients(self._anchor)  # type: ignore[operator]
            out.backward()
        self._anchor.grad = None

    def full_state_dict(self) -> dict[str, Tensor]:
        """All ranks: the draft's state dict with whole, detached tensors on the CPU."""
        out: dict[str, Tensor] = {}
        with self._world.collective("gather of the whole draft"):
            for name, tensor in self.draft.state_dict().items():
                whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
                out[name] = whole.detach().cpu().clone()
        return out

    def _set_sync(self, sync: bool) -> None:
        root = self._modules[0]
        root.set_requires_gradient_sync(sync)
        root.set_reshard_after_backward(sync)


def _identity(anchor: Tensor) -> Tensor:
    return anchor * 1.0


def _fully_shard(
    draft: nn.Module, units: Sequence[nn.Module], *, world: World, precision: str
) -> list[FSDPModule]:
    """The FSDP modules, the root first."""
    policy = MixedPrecisionPolicy()
    if precision == "bfloat16":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    modules: list[FSDPModule] = []
    for module in [*(unit for unit in units if unit is not draft), draft]:
        sharded = fully_shard(
            module, mesh=world.mesh, reshard_after_forward=False, mp_policy=policy
        )
        # A sum over ranks, not FSDP2's mean: only step.py divides. Spelled as a plain SUM, because
        # gloo has no scaled one.
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)
        modules.insert(0, sharded)
    return modules


def _check_equal_on_ranks(draft: nn.Module, world: World) -> None:
    if world.size == 1:
        return
    digests = {name: _digest(tensor) for name, tensor in draft.state_dict().items()}
    for rank, other in enumerate(world.gather(digests, "digests of the initial draft")):
        names = sorted({*digests, *other})
        differing = [name for name in names if digests.get(name) != other.get(name)]
        if differing:
            raise ValueError(
                f"draft: wanted the same tensors on every rank, but {differing[0]!r} of rank "
                f"{rank} is not that of rank {world.rank} ({len(differing)} differ in all)"
            )


def _digest(tensor: Tensor) -> tuple[tuple[int, ...], str, int]:
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return tuple(tensor.shape), str(tensor.dtype), zlib.crc32(flat.numpy().data)


def checkpoint_activations(units: Sequence[nn.Module]) -> None:
    """Let each unit keep its inputs only and compute its forward again in backward.

    The forward of a unit must have no effect but its result, or it would have it twice.
    Raises ValueError without units.
    """
    if not units:
        raise ValueError(
            "trainer.activation_checkpointing: wanted a method with recompute units, got none"
        )
    for unit in units:
        unit.forward = _recomputed(unit.forward)


def _recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return wrapper


def compile_units(draft: nn.Module, units: Sequence[nn.Module]) -> None:
    """torch.compile the forward of the units, or of the draft where there are none, in place.

    Not the modules: FSDP2's hooks around `forward` would be traced too, and end in no graph at all.
    """
    for module in units or [draft]:
        module.forward = torch.compile(module.forward)
