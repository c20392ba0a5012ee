"""Initial weights of block drafts."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from specforge_ext.methods._block.config import BlockConfig
from specforge_ext.methods._block.model import BlockBackbone
from specforge_ext.records import TargetWeights

_STD = 0.02
"""Of every matrix that does not come from the target; HF's `initializer_range`."""
_SMALL_STD = 1e-3
"""Of the part of fc that a warm start wants near zero."""
_HEAD_NORMS = ("self_attn.q_norm.weight", "self_attn.k_norm.weight")


def init_block(
    draft: BlockBackbone, config: BlockConfig, weights: TargetWeights, *, seed: int
) -> None:
    """As the config's `warm_start` says. The same seed gives the same weights. ValueError if the
    target's last layer is to be copied and does not fit.
    """
    init_random(draft, seed=seed)
    if config.warm_start == "target":
        init_from_target(draft, weights)


@torch.no_grad()
def init_random(draft: nn.Module, *, seed: int) -> None:
    """Matrices from N(0, 0.02), norms one, biases zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in draft.named_parameters():
        if name.endswith(".bias"):
            nn.init.zeros_(parameter)
        elif parameter.dim() == 1:
            nn.init.ones_(parameter)
        else:
            nn.init.normal_(parameter, std=_STD, generator=generator)


@torch.no_grad()
def init_from_target(draft: BlockBackbone, weights: TargetWeights) -> None:
    """Start every layer as the target's last one, reading the last of the features, under the
    target's final norm. What the target's layer lacks, norms of queries and keys, stays as it is.

    ValueError if `weights.last_layer` lacks another tensor or one has another shape than the
    draft's.
    """
    hidden = draft.block_shape.layer.hidden_size
    draft.fc.weight.mul_(_SMALL_STD / _STD)
    draft.fc.weight[:, -hidden:] = torch.eye(hidden)
    _copy(draft.hidden_norm.weight, weights.last_layer, "input_layernorm.weight")
    for layer in draft.layers:
        for name, parameter in layer.named_parameters():
            if name in weights.last_layer or name not in _HEAD_NORMS:
                _copy(parameter, weights.last_layer, name)
    draft.norm.weight.copy_(weights.final_norm)


def _copy(into: Tensor, tensors: Mapping[str, Tensor], name: str) -> None:
    if name not in tensors:
        raise ValueError(
            f"warm_start 'target': wanted {name!r} of the target's last layer, "
            f"got {sorted(tensors)}"
        )
    if tensors[name].shape != into.shape:
        raise ValueError(
            f"warm_start 'target': {name!r} has shape {list(tensors[name].shape)}, "
            f"the draft's layers want {list(into.shape)}"
        )
    into.copy_(tensors[name])
