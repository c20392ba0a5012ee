"""What the checkpoints of all methods share: config.json read with care, tables of tensors.

Tensors carry the parameters' own names wherever engines allow, so that writing and reading are one
table.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from specforge_ext.nn.layer import LayerShape
from specforge_ext.records import TargetSpec

OWN_KEY = "specforge_ext"
"""Section of config.json that engines ignore: what their keys leave out or disagree about."""

Shapes = dict[str, tuple[int, ...]]
Schema = dict[str, tuple[tuple[int, ...], torch.dtype | None]]
"""Every key of a checkpoint: shape, and dtype where it is fixed."""


def free_dtype(shapes: Shapes) -> Schema:
    """As a schema, whose tensors may have any dtype."""
    return {name: (shape, None) for name, shape in shapes.items()}


def parameters_of(draft: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """The parameters under their own names, in dtype, on the CPU."""
    return {
        name: parameter.detach().to("cpu", dtype, copy=True).contiguous()
        for name, parameter in draft.named_parameters()
    }


def load_parameters(draft: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """float32 parameters from tensors that have passed the schema; others are not looked at."""
    names = [name for name, _ in draft.named_parameters()]
    draft.load_state_dict({name: tensors[name].float() for name in names})


def layer_tensors(
    shape: LayerShape, *, qk_norm: bool = False, qkv_bias: bool = False, output_gate: bool = False
) -> Shapes:
    """Of a decoder layer of the Llama family, names and shapes.

    output_gate: q_proj has the rows of a gate too (Qwen 3-Next).
    """
    hidden, ffn, head_dim = shape.hidden_size, shape.intermediate_size, shape.head_dim
    q, kv = shape.num_heads * head_dim, shape.num_kv_heads * head_dim
    rows = {"q": q * (2 if output_gate else 1), "k": kv, "v": kv}
    out: Shapes = {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
        **{f"self_attn.{part}_proj.weight": (rows[part], hidden) for part in "qkv"},
        "self_attn.o_proj.weight": (hidden, q),
        "mlp.gate_proj.weight": (ffn, hidden),
        "mlp.up_proj.weight": (ffn, hidden),
        "mlp.down_proj.weight": (hidden, ffn),
    }
    if qk_norm:
        out |= {f"self_attn.{part}_norm.weight": (head_dim,) for part in "qk"}
    if qkv_bias:
        out |= {f"self_attn.{part}_proj.bias": (rows[part],) for part in "qkv"}
    return out


def stored_layer_shape(config: Mapping[str, object]) -> LayerShape:
    """Sizes of the layers. ValueError names a key that is missing or no positive number."""
    return LayerShape(
        hidden_size=count(config, "hidden_size"),
        intermediate_size=count(config, "intermediate_size"),
        num_heads=count(config, "num_attention_heads"),
        num_kv_heads=count(config, "num_key_value_heads"),
        head_dim=count(config, "head_dim"),
        rms_norm_eps=number(config, "rms_norm_eps"),
    )


def check_target(config: Mapping[str, object], target: TargetSpec) -> None:
    """ValueError if a draft with this config.json was made for another target."""
    for key in ("vocab_size", "hidden_size"):
        wanted = getattr(target, key)
        if count(config, key) != wanted:
            raise ValueError(f"config.json {key}: wanted the target's {wanted}, got {config[key]}")


def count(config: Mapping[str, object], key: str, *, section: str = "") -> int:
    """section: that the key is in, for the error."""
    value = config.get(key)
    if type(value) is not int or value <= 0:
        raise ValueError(f"config.json {section}{key}: wanted a positive count, got {value!r}")
    return value


def number(config: Mapping[str, object], key: str) -> float:
    value = config.get(key)
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < math.inf:
        raise ValueError(f"config.json {key}: wanted a positive number, got {value!r}")
    return float(value)


def flag(
    config: Mapping[str, object], key: str, *, missing: bool | None = None, section: str = ""
) -> bool:
    """missing: what a key that is not there means; None: it must be there."""
    value = config.get(key, missing)
    if not isinstance(value, bool):
        raise ValueError(f"config.json {section}{key}: wanted true or false, got {value!r}")
    return value


def ids(config: Mapping[str, object], key: str, *, section: str) -> tuple[int, ...]:
    """A list of layers that is not empty."""
    value = config.get(key)
    if not isinstance(value, (list, tuple)) or not value or not all(type(i) is int for i in value):
        raise ValueError(f"config.json {section}{key}: wanted a list of ids, got {value!r}")
    return tuple(value)
