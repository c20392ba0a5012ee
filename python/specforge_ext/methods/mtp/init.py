"""First weights of the layer for multi-token prediction, and its tensors in a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from specforge_ext.methods.mtp.forms import (
    Form,
    check_shapes,
    checkpoint_shapes,
    next_prefix_of,
    prefix_of,
    refuse_others,
)
from specforge_ext.methods.mtp.model import MtpDraft, MtpShape
from specforge_ext.nn.norm import RMSNorm, ZeroCentredRMSNorm

_STD = 0.02
"""Of every matrix; HF's `initializer_range`."""


@torch.no_grad()
def init_random(draft: MtpDraft, *, seed: int) -> None:
    """Matrices from N(0, 0.02), biases zero, norms the identity. One seed, one set of weights."""
    generator = torch.Generator().manual_seed(seed)
    for module in draft.modules():
        if isinstance(module, RMSNorm):
            nn.init.constant_(module.weight, 0 if isinstance(module, ZeroCentredRMSNorm) else 1)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=_STD, generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def read_layer(
    checkpoint: Mapping[str, Tensor], form: Form, target_layers: int
) -> dict[str, Tensor]:
    """The form's tensors of a checkpoint, public names, without copies of embedding and head.

    ValueError if there are more such layers than one, or parts that no layer here has: by name,
    before anything is read.
    """
    where = f"the {form.name} layer of the checkpoint"
    prefix, following = prefix_of(form, target_layers), next_prefix_of(form, target_layers)
    if any(name.startswith(following) for name in checkpoint):
        raise ValueError(
            f"mtp: the checkpoint has a second layer ({following}*), which servers take for the "
            "second token; wanted one that is applied again"
        )
    copies = {f"{prefix}{name}" for name in form.copies}
    names = [name for name in checkpoint if name.startswith(prefix) and name not in copies]
    refuse_others(names, where=where)
    return {name: checkpoint[name] for name in names}


@torch.no_grad()
def load(draft: MtpDraft, tensors: Mapping[str, Tensor], *, where: str) -> None:
    """Public names -> the draft's parameters. ValueError lists what does not fit."""
    shape = draft.shape
    wanted = checkpoint_shapes(shape.form, shape.kind, shape.target_layers, shape.layer)
    check_shapes(tensors, wanted, where=where)
    prefix = prefix_of(shape.form, shape.target_layers)
    state = {}
    for public, own in public_names(shape).items():
        tensor = tensors[f"{prefix}{public}"].float()
        if shape.kind.output_gate and ".q_proj." in f".{public}":
            query, gate = _gate_apart(tensor, shape.layer.num_heads)
            state[own], state[own.replace("self_attn.q_proj", "gate_proj")] = query, gate
        else:
            state[own] = tensor
    draft.load_state_dict(state)


def public_tensors(draft: MtpDraft) -> dict[str, Tensor]:
    """The draft's parameters under their public names, as `load` takes them."""
    shape, state = draft.shape, dict(draft.named_parameters())
    prefix, out = prefix_of(shape.form, shape.target_layers), {}
    for public, own in public_names(shape).items():
        tensor = state[own].detach()
        if shape.kind.output_gate and ".q_proj." in f".{public}":
            gate = state[own.replace("self_attn.q_proj", "gate_proj")].detach()
            tensor = _gate_beside(tensor, gate, shape.layer.num_heads)
        out[f"{prefix}{public}"] = tensor
    return out


def public_names(shape: MtpShape) -> dict[str, str]:
    """Names in a checkpoint, after the prefix -> the draft's parameters."""
    names = {f"{name}.weight": f"{part}.weight" for part, name in shape.form.parts().items()}
    layer = shape.kind.shapes(shape.layer)
    return names | {f"{shape.form.layer}{name}": f"layer.{name}" for name in layer}


def _gate_apart(tensor: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """[heads * 2D, ...], of each head the query's rows and then the gate's -> both, [heads * D]."""
    query, gate = torch.unflatten(tensor, 0, (heads, 2, -1)).unbind(1)
    return query.flatten(0, 1), gate.flatten(0, 1)


def _gate_beside(query: Tensor, gate: Tensor, heads: int) -> Tensor:
    both = torch.stack([torch.unflatten(x, 0, (heads, -1)) for x in (query, gate)], 1)
    return both.flatten(0, 2)
