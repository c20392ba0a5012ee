"""The layer of multi-token prediction as a checkpoint.

Servers read it from the target's own files, under names that only their code of that target knows,
so an export holds those tensors alone and `export.merge` puts them into a copy of the target.
config.json describes the layer; no server reads it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from specforge_ext.methods._export import (
    OWN_KEY,
    Schema,
    count,
    flag,
    free_dtype,
    stored_layer_shape,
)
from specforge_ext.methods.mtp.forms import FORMS, Form, LayerKind, checkpoint_shapes
from specforge_ext.methods.mtp.init import public_tensors
from specforge_ext.methods.mtp.model import MtpDraft
from specforge_ext.records import DTYPE_NAMES, DraftCheckpoint, TargetSpec

_FLAGS = ("qk_norm", "qkv_bias", "output_gate")


def to_checkpoint(draft: MtpDraft, target: TargetSpec, *, dtype: torch.dtype) -> DraftCheckpoint:
    """Tensors in dtype on the CPU."""
    shape, layer = draft.shape, draft.shape.layer
    tensors = {
        name: tensor.to("cpu", dtype, copy=True).contiguous()
        for name, tensor in public_tensors(draft).items()
    }
    config: dict[str, object] = {
        "architectures": [],
        "target": target.name,
        "target_model_type": target.model_type,
        "vocab_size": shape.vocab_size,
        "hidden_size": layer.hidden_size,
        "intermediate_size": layer.intermediate_size,
        "num_attention_heads": layer.num_heads,
        "num_key_value_heads": layer.num_kv_heads,
        "head_dim": layer.head_dim,
        "num_target_layers": shape.target_layers,
        "rms_norm_eps": layer.rms_norm_eps,
        "torch_dtype": DTYPE_NAMES[dtype],
        OWN_KEY: {
            "method": "mtp",
            "form": shape.form.name,
            **{key: getattr(shape.kind, key) for key in _FLAGS},
        },
    }
    return DraftCheckpoint(tensors=tensors, config=config)


def schema(config: Mapping[str, object]) -> Schema:
    """Every key of a checkpoint with this config.json. ValueError names a key of the config that is
    missing or of the wrong kind.
    """
    form, kind = _own(config)
    layers, layer = count(config, "num_target_layers"), stored_layer_shape(config)
    return free_dtype(checkpoint_shapes(form, kind, layers, layer))


def stored_form(config: Mapping[str, object], target: TargetSpec) -> tuple[Form, LayerKind]:
    """What a config.json describes. ValueError if it was made for another target."""
    for key, wanted in (
        ("vocab_size", target.vocab_size),
        ("hidden_size", target.hidden_size),
        ("intermediate_size", target.intermediate_size),
        ("num_attention_heads", target.num_heads),
        ("num_key_value_heads", target.num_kv_heads),
        ("head_dim", target.head_dim),
        ("num_target_layers", target.num_layers),
    ):
        if count(config, key) != wanted:
            raise ValueError(f"config.json {key}: wanted the target's {wanted}, got {config[key]}")
    return _own(config)


def _own(config: Mapping[str, object]) -> tuple[Form, LayerKind]:
    own = config.get(OWN_KEY)
    own = own if isinstance(own, Mapping) else {}
    form = own.get("form")
    if form not in FORMS:
        raise ValueError(
            f"config.json {OWN_KEY}.form: wanted one of {', '.join(FORMS)}, got {form!r}"
        )
    return FORMS[form], LayerKind(**{key: flag(own, key, section=f"{OWN_KEY}.") for key in _FLAGS})
