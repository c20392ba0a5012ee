"""What checkpoints of drafts that fuse layers have in common, for SGLang and vLLM."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

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
    parameters_of,
    stored_layer_shape,
)
from specforge_ext.methods._fused.shape import DraftShape, FusesLayers, aux_layer_ids
from specforge_ext.nn.layer import LayerShape
from specforge_ext.records import DTYPE_NAMES, DraftCheckpoint, DraftVocab, TargetSpec

LAYER_IDS_KEY = "eagle_aux_hidden_state_layer_ids"
"""Means the outputs of 0-based layers in SGLang, HF `hidden_states` indices (one more) in vLLM."""


def tensors_of(draft: nn.Module, vocab: DraftVocab, dtype: torch.dtype) -> dict[str, Tensor]:
    """Parameters in dtype, d2t and t2d unless the vocabulary is the full one; on the CPU."""
    tensors = parameters_of(draft, dtype)
    if not vocab.is_full:
        tensors["d2t"], tensors["t2d"] = vocab.d2t.cpu().clone(), vocab.t2d.cpu().clone()
    return tensors


def base_config(shape: DraftShape, target: TargetSpec, dtype: torch.dtype) -> dict[str, object]:
    """config.json of a draft with one layer; methods add keys and change some."""
    layer = shape.layer
    scaling = dict(shape.rope_scaling) if shape.rope_scaling else None
    rope_parameters = {"rope_type": "default", **(scaling or {}), "rope_theta": shape.rope_theta}
    return {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "vocab_size": shape.vocab_size,
        "draft_vocab_size": shape.draft_vocab_size,
        "hidden_size": layer.hidden_size,
        "intermediate_size": layer.intermediate_size,
        "num_attention_heads": layer.num_heads,
        "num_key_value_heads": layer.num_kv_heads,
        "head_dim": layer.head_dim,
        "num_hidden_layers": 1,
        "hidden_act": "silu",
        "rms_norm_eps": layer.rms_norm_eps,
        "rope_theta": shape.rope_theta,
        "rope_scaling": scaling,
        "rope_parameters": rope_parameters,
        "max_position_embeddings": target.max_position_embeddings,
        "attention_bias": False,
        "mlp_bias": False,
        "norm_before_residual": False,
        "tie_word_embeddings": False,
        "bos_token_id": target.bos_token_id,
        "eos_token_id": list(target.eos_token_ids) or None,
        "torch_dtype": DTYPE_NAMES[dtype],
    }


def fused_layer_tensors(shape: LayerShape) -> Shapes:
    """Of the first layer, which reads two streams."""
    wide = {
        f"self_attn.{part}_proj.weight": (heads * shape.head_dim, 2 * shape.hidden_size)
        for part, heads in (
            ("q", shape.num_heads),
            ("k", shape.num_kv_heads),
            ("v", shape.num_kv_heads),
        )
    }
    return layer_tensors(shape) | wide | {"hidden_norm.weight": (shape.hidden_size,)}


def fused_schema(config: Mapping[str, object], shapes: Shapes) -> Schema:
    """shapes: of all parameters."""
    schema, vocab = free_dtype(shapes), count(config, "vocab_size")
    draft_vocab = count(config, "draft_vocab_size")
    if draft_vocab < vocab:
        schema |= {"d2t": ((draft_vocab,), torch.int64), "t2d": ((vocab,), torch.bool)}
    return schema


def check_stored(config: Mapping[str, object], target: TargetSpec, asked: FusesLayers) -> None:
    """ValueError if a draft with this config.json was made for another target or other layers."""
    check_target(config, target)
    wanted, came = aux_layer_ids(asked, target), own_layer_ids(config)
    if came != wanted:
        raise ValueError(
            f"config.json {OWN_KEY}.aux_layer_ids: wanted {list(wanted)}, got {list(came)}"
        )


def stored_shape(config: Mapping[str, object]) -> DraftShape:
    """Sizes from a checkpoint's config.json. ValueError names a key that is missing or wrong."""
    parameters = config.get("rope_parameters")
    if not isinstance(parameters, Mapping):
        raise ValueError(f"config.json rope_parameters: wanted a mapping, got {parameters!r}")
    layer, num_features = stored_layer_shape(config), len(own_layer_ids(config))
    return DraftShape(
        layer=layer,
        features_width=layer.hidden_size * num_features,
        num_features=num_features,
        vocab_size=count(config, "vocab_size"),
        draft_vocab_size=count(config, "draft_vocab_size"),
        rope_theta=number(parameters, "rope_theta"),
        rope_scaling={k: v for k, v in parameters.items() if k != "rope_theta"},
    )


def stored_vocab(checkpoint: DraftCheckpoint) -> DraftVocab:
    """The draft's vocabulary; the whole one if the checkpoint has no tables. ValueError if these
    contradict each other.
    """
    if "d2t" in checkpoint.tensors:
        vocab = DraftVocab(t2d=checkpoint.tensors["t2d"], d2t=checkpoint.tensors["d2t"])
        if not torch.equal(vocab.t2d.nonzero()[:, 0], vocab.target_ids):
            raise ValueError("d2t: wanted i + d2t[i] to be the ids where t2d is True, ascending")
        return vocab
    return DraftVocab.full(count(checkpoint.config, "vocab_size"))


def own_layer_ids(config: Mapping[str, object]) -> tuple[int, ...]:
    """HF `hidden_states` indices of the features. ValueError if they are missing."""
    own = config.get(OWN_KEY)
    section = own if isinstance(own, Mapping) else {}
    return ids(section, "aux_layer_ids", section=f"{OWN_KEY}.")
