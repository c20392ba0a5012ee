"""Checkpoints of block drafts as SGLang and vLLM load them: what all of them share.

There is neither an embedding nor a head: engines take the target's.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from specforge_ext.methods._block.config import BlockConfig, layer_ids
from specforge_ext.methods._block.model import BlockShape
from specforge_ext.methods._export import (
    OWN_KEY,
    Schema,
    Shapes,
    check_target,
    count,
    free_dtype,
    ids,
    layer_tensors,
    number,
    stored_layer_shape,
)
from specforge_ext.records import DTYPE_NAMES, TargetSpec, TargetWeights

_NOT_OURS = ("partial_rotary_factor", "rope_theta", "type")
"""RoPE parameters of targets that do not describe the draft: it turns all of a head."""


def backbone_config(
    shape: BlockShape,
    config: BlockConfig,
    target: TargetSpec,
    *,
    method: str,
    architecture: str,
    dtype: torch.dtype,
) -> dict[str, object]:
    """config.json of a backbone; `dflash_config` may get further keys of the method's own.

    max_position_embeddings is the target's: engines make their RoPE tables as long as that.
    target_layer_ids are 0-based layer outputs, for every engine. `causal` is for drafts without
    sliding layers: vLLM takes it for all layers, and a sliding one is causal in its block, which
    engines know by themselves.
    """
    layer = shape.layer
    scaling = _scaling(shape.rope_scaling)
    sliding = next((w for w in shape.windows if w is not None), None)
    return {
        "architectures": [architecture],
        "model_type": "qwen3",
        "vocab_size": shape.vocab_size,
        "hidden_size": layer.hidden_size,
        "intermediate_size": layer.intermediate_size,
        "num_attention_heads": layer.num_heads,
        "num_key_value_heads": layer.num_kv_heads,
        "head_dim": layer.head_dim,
        "num_hidden_layers": len(shape.windows),
        "num_target_layers": target.num_layers,
        "block_size": shape.block_size,
        "layer_types": [
            "full_attention" if w is None else "sliding_attention" for w in shape.windows
        ],
        "use_sliding_window": sliding is not None,
        "sliding_window": sliding,
        "max_window_layers": len(shape.windows),
        "dflash_config": {
            "mask_token_id": shape.mask_token_id,
            "target_layer_ids": [i - 1 for i in layer_ids(config, target)],
            **({"causal": False} if sliding is None else {}),
        },
        "hidden_act": "silu",
        "rms_norm_eps": layer.rms_norm_eps,
        "rope_theta": shape.rope_theta,
        "rope_scaling": scaling,
        "rope_parameters": {
            "rope_type": "default",
            **(scaling or {}),
            "rope_theta": shape.rope_theta,
        },
        "max_position_embeddings": target.max_position_embeddings,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
        "bos_token_id": target.bos_token_id,
        "eos_token_id": list(target.eos_token_ids) or None,
        "torch_dtype": DTYPE_NAMES[dtype],
        OWN_KEY: {"method": method},
    }


def backbone_schema(config: Mapping[str, object]) -> Schema:
    """Every key of a backbone with this config.json: shape, and dtype where it is fixed.

    ValueError names a key of the config that is missing or of the wrong kind.
    """
    layer = stored_layer_shape(config)
    hidden = layer.hidden_size
    shapes: Shapes = {
        "fc.weight": (hidden, hidden * len(output_ids(config))),
        "hidden_norm.weight": (hidden,),
        "norm.weight": (hidden,),
    }
    tensors = layer_tensors(layer, qk_norm=True)
    for i in range(count(config, "num_hidden_layers")):
        shapes |= {f"layers.{i}.{name}": shape for name, shape in tensors.items()}
    return free_dtype(shapes)


def stored_shape(
    stored: Mapping[str, object], weights: TargetWeights, config: BlockConfig
) -> BlockShape:
    """Sizes from a checkpoint's config.json.

    ValueError if it was made for another target, or with other layers, block or windows than
    `config` asks for.
    """
    spec = weights.spec
    check_target(stored, spec)
    layers = tuple(i + 1 for i in output_ids(stored))
    windows = _windows(stored)
    for key, ours, theirs in (
        ("dflash_config.target_layer_ids + 1", layer_ids(config, spec), layers),
        ("block_size", config.block_size, count(stored, "block_size")),
        ("layer_types and sliding_window", config.windows, windows),
    ):
        if ours != theirs:
            raise ValueError(f"config.json {key}: wanted {ours}, got {theirs}")
    theta, scaling = _rope(stored)
    return BlockShape(
        layer=stored_layer_shape(stored),
        windows=windows,
        features_width=spec.hidden_size * len(layers),
        vocab_size=spec.vocab_size,
        block_size=config.block_size,
        mask_token_id=_mask_token_id(stored, spec.vocab_size),
        rope_theta=theta,
        rope_scaling=scaling,
    )


def method_section(config: Mapping[str, object]) -> Mapping[str, object]:
    """`dflash_config`. ValueError if it is no mapping."""
    section = config.get("dflash_config")
    if not isinstance(section, Mapping):
        raise ValueError(f"config.json dflash_config: wanted a mapping, got {section!r}")
    return section


def output_ids(config: Mapping[str, object]) -> tuple[int, ...]:
    """0-based layer outputs that fc reads. ValueError if they are missing."""
    return ids(method_section(config), "target_layer_ids", section="dflash_config.")


def _windows(config: Mapping[str, object]) -> tuple[int | None, ...]:
    layers, types = count(config, "num_hidden_layers"), config.get("layer_types")
    known = ("full_attention", "sliding_attention")
    if not isinstance(types, list) or len(types) != layers or not all(t in known for t in types):
        raise ValueError(
            f"config.json layer_types: wanted {layers} of {' and '.join(known)}, got {types!r}"
        )
    if "sliding_attention" not in types:
        return (None,) * layers
    window = count(config, "sliding_window")
    return tuple(window if t == "sliding_attention" else None for t in types)


def _mask_token_id(config: Mapping[str, object], vocab_size: int) -> int:
    value = method_section(config).get("mask_token_id")
    if type(value) is not int or not 0 <= value < vocab_size:
        raise ValueError(
            f"config.json dflash_config.mask_token_id: wanted an id below {vocab_size}, "
            f"got {value!r}"
        )
    return value


def _rope(config: Mapping[str, object]) -> tuple[float, dict[str, object] | None]:
    parameters = config.get("rope_parameters")
    if not isinstance(parameters, Mapping):
        raise ValueError(f"config.json rope_parameters: wanted a mapping, got {parameters!r}")
    partial = parameters.get("partial_rotary_factor", 1)
    if partial != 1:
        raise ValueError(
            "config.json rope_parameters.partial_rotary_factor: wanted 1 (the draft turns whole "
            f"heads), got {partial!r}"
        )
    return number(parameters, "rope_theta"), _scaling(parameters)


def _scaling(parameters: Mapping[str, object] | None) -> dict[str, object] | None:
    """Without what is said elsewhere, None where it is plain RoPE."""
    if parameters is None:
        return None
    scaling = {key: value for key, value in parameters.items() if key not in _NOT_OURS}
    scaling.setdefault("rope_type", parameters.get("type", "default"))
    return None if scaling["rope_type"] == "default" else scaling
