"""Initial weights of drafts that fuse layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from specforge_ext.methods._fused.shape import DraftShape
from specforge_ext.nn.layer import DraftLayer, FusedInputLayer
from specforge_ext.nn.norm import RMSNorm
from specforge_ext.records import DraftVocab, TargetWeights

_STD = 0.02
"""Of every matrix that does not come from the target; HF's `initializer_range`."""
_SMALL_STD = 1e-3
"""Of the part of fc that a warm start wants near zero."""


class Draft(Protocol):
    """What drafts of this kind have in common."""

    shape: DraftShape
    fc: nn.Linear
    norm: RMSNorm
    lm_head: nn.Linear

    @property
    def stack(self) -> tuple[DraftLayer, ...]: ...

    def parameters(self) -> Iterator[nn.Parameter]: ...


@torch.no_grad()
def init_random(draft: Draft, *, seed: int) -> None:
    """Matrices from N(0, 0.02), norms one. The same seed gives the same weights."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in draft.parameters():
        if parameter.dim() == 1:
            nn.init.ones_(parameter)
        else:
            nn.init.normal_(parameter, std=_STD, generator=generator)


@torch.no_grad()
def init_from_target(draft: Draft, weights: TargetWeights, vocab: DraftVocab, *, seed: int) -> None:
    """Start as the target's last layer run on the last of the features, under the target's head.

    Layers after the first add nothing to the residual stream at the start. The projections'
    embedding half starts at zero. A target's biases are left behind, and its norms of queries and
    keys (Qwen 3) become row scales, right on average over directions of the input.
    ValueError if `weights.last_layer` lacks a tensor or one has another shape than the draft's.
    """
    layer, hidden = draft.stack[0], draft.shape.layer.hidden_size
    assert isinstance(layer, FusedInputLayer)
    init_random(draft, seed=seed)
    draft.fc.weight.mul_(_SMALL_STD / _STD)
    draft.fc.weight[:, -hidden:] = torch.eye(hidden)
    source = _LastLayer(weights.last_layer)
    source.copy(layer.hidden_norm.weight, "input_layernorm.weight")
    source.copy(layer.post_attention_layernorm.weight, "post_attention_layernorm.weight")
    source.copy(layer.self_attn.o_proj.weight, "self_attn.o_proj.weight")
    for name, linear in layer.mlp.named_children():
        source.copy(linear.weight, f"mlp.{name}.weight")  # type: ignore[arg-type]
    for name in "qkv":
        projection: Tensor = getattr(layer.self_attn, f"{name}_proj").weight
        projection[:, :hidden] = 0
        source.copy(projection[:, hidden:], f"self_attn.{name}_proj.weight")
        source.fold_norm(projection[:, hidden:], name, head_dim=draft.shape.layer.head_dim)
    for further in draft.stack[1:]:
        further.self_attn.o_proj.weight.zero_()
        further.mlp.down_proj.weight.zero_()
    draft.norm.weight.copy_(weights.final_norm)
    draft.lm_head.weight.copy_(weights.lm_head[vocab.target_ids.to(weights.lm_head.device)])


class _LastLayer:
    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors

    def copy(self, into: Tensor, name: str) -> None:
        if name not in self.tensors:
            raise ValueError(
                f"warm_start 'target': wanted {name!r} of the target's last layer, "
                f"got {sorted(self.tensors)}"
            )
        tensor = self.tensors[name]
        if tensor.shape != into.shape:
            raise ValueError(
                f"warm_start 'target': {name!r} has shape {list(tensor.shape)}, "
                f"the draft's layer wants {list(into.shape)}"
            )
        into.copy_(tensor)

    def fold_norm(self, projection: Tensor, name: str, *, head_dim: int) -> None:
        """Scale rows as an RMSNorm over each head would, for inputs norm.weight * (isotropic, RMS
        1).
        """
        weight = self.tensors.get(f"self_attn.{name}_norm.weight")
        if weight is None:
            return
        gain = self.tensors["input_layernorm.weight"].float().to(projection.device)
        heads = torch.unflatten(projection, 0, (-1, head_dim))
        rms = (heads * gain).square().sum(-1, keepdim=True).mean(1, keepdim=True).sqrt()
        heads.mul_(weight.float().to(projection.device)[:, None] / rms.clamp_min(1e-12))
