"""EAGLE-3 checkpoints as SGLang (`LlamaForCausalLMEagle3`) and vLLM load them.

Tensors carry the parameters' own names, so writing and reading are one table, `schema`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from specforge_ext.methods._export import (
    OWN_KEY,
    Schema,
    Shapes,
    count,
    flag,
    layer_tensors,
    load_parameters,
    stored_layer_shape,
)
from specforge_ext.methods._fused.export import (
    LAYER_IDS_KEY,
    base_config,
    check_stored,
    fused_layer_tensors,
    fused_schema,
    own_layer_ids,
    stored_shape,
    stored_vocab,
    tensors_of,
)
from specforge_ext.methods._fused.shape import engine_default_layer_ids
from specforge_ext.methods.eagle3.config import Eagle3Config
from specforge_ext.methods.eagle3.model import Eagle3Draft
from specforge_ext.records import DraftCheckpoint, TargetSpec, TargetWeights

EAGLE_KEY = "eagle_config"
"""The section in which SGLang (0.5.23) looks for LAYER_IDS_KEY. At the top level, where vLLM wants
it, SGLang does not see it and takes its default layers without a word.
"""
FURTHER_NORM_NAMES = ("input_layernorm", "hidden_norm")
"""The norm before the attention of layers after the first: in vLLM (0.32), in SGLang (0.5.23). The
other engine's key is there in both, and not used, so a checkpoint holds the norm under both names.
"""


def to_checkpoint(
    draft: Eagle3Draft, target: TargetSpec, *, aux_layer_ids: tuple[int, ...], dtype: torch.dtype
) -> DraftCheckpoint:
    """Floating tensors in dtype on the CPU, d2t and t2d unless the vocabulary is the full one."""
    tensors = tensors_of(draft, draft.vocab, dtype)
    for name, alias in _norm_aliases(draft.config.num_layers).items():
        tensors[alias] = tensors[name].clone()
    config = base_config(draft.shape, target, dtype)
    config["num_hidden_layers"] = draft.config.num_layers
    options = {
        "fc_norm": (draft.config.fc_norm, False),
        "norm_output": (draft.config.norm_output, False),
        "num_aux_hidden_states": (draft.shape.num_features, 3),
    }
    # Servers' defaults are left out, as in drafts that are older than these keys.
    config |= {key: value for key, (value, default) in options.items() if value != default}
    config[OWN_KEY] = {
        "method": "eagle3",
        "aux_layer_ids": list(aux_layer_ids),
        "ttt_length": draft.config.ttt_length,
    }
    return DraftCheckpoint(tensors=tensors, config=config)


def engine_configs(
    config: Mapping[str, object], *, num_target_layers: int
) -> dict[str, dict[str, object]]:
    """config.json of each directory that an exported draft needs, by the directory's name.

    {"": config} serves every engine when the draft uses the layers that engines take by default;
    otherwise {"sglang": ..., "vllm": ...}, because they read the key's ids differently.
    """
    ids = own_layer_ids(config)
    if ids == engine_default_layer_ids(num_target_layers):
        return {"": dict(config)}
    if ids[0] == 0:
        raise ValueError(
            f"aux_layer_ids: SGLang cannot capture the embedding (index 0), got {list(ids)}"
        )
    return {
        "sglang": {
            **config,
            EAGLE_KEY: {"use_aux_hidden_state": True, LAYER_IDS_KEY: [i - 1 for i in ids]},
        },
        "vllm": {**config, LAYER_IDS_KEY: list(ids)},
    }


def schema(config: Mapping[str, object]) -> Schema:
    """Every key of a checkpoint with this config.json: shape, and dtype where it is fixed.

    ValueError names a key of the config that is missing or of the wrong kind.
    """
    layer, num_features = stored_layer_shape(config), len(own_layer_ids(config))
    hidden, num_layers = layer.hidden_size, count(config, "num_hidden_layers")
    shapes: Shapes = {
        "fc.weight": (hidden, hidden * num_features),
        **{f"midlayer.{name}": shape for name, shape in fused_layer_tensors(layer).items()},
        "norm.weight": (hidden,),
        "lm_head.weight": (count(config, "draft_vocab_size"), hidden),
    }
    for i in range(1, num_layers):
        shapes |= {f"layers.{i}.{name}": shape for name, shape in layer_tensors(layer).items()}
    shapes |= dict.fromkeys(_norm_aliases(num_layers).values(), (hidden,))
    if flag(config, "fc_norm", missing=False):
        names = (f"fc_norm.{i}.weight" for i in range(num_features))
        shapes |= dict.fromkeys(names, (hidden,))
    return fused_schema(config, shapes)


def _norm_aliases(num_layers: int) -> dict[str, str]:
    """Keys of our norms -> the other names that they are exported under."""
    ours, theirs = FURTHER_NORM_NAMES
    layers = range(1, num_layers)
    return {f"layers.{i}.{ours}.weight": f"layers.{i}.{theirs}.weight" for i in layers}


def from_checkpoint(
    checkpoint: DraftCheckpoint, weights: TargetWeights, config: Eagle3Config
) -> Eagle3Draft:
    """The draft in float32 on the target's device; sizes come from the checkpoint's config.json.

    ValueError if it was made for another target or for other layers than `config` asks for.
    """
    stored = checkpoint.config
    check_stored(stored, weights.spec, config)
    for key, asked, came in (
        ("num_hidden_layers", config.num_layers, count(stored, "num_hidden_layers")),
        ("fc_norm", config.fc_norm, flag(stored, "fc_norm", missing=False)),
        ("norm_output", config.norm_output, flag(stored, "norm_output", missing=False)),
        ("norm_before_residual", False, flag(stored, "norm_before_residual", missing=False)),
    ):
        if came != asked:
            raise ValueError(f"config.json {key}: wanted {asked}, got {came}")
    for name, alias in _norm_aliases(config.num_layers).items():
        if not torch.equal(checkpoint.tensors[name], checkpoint.tensors[alias]):
            raise ValueError(f"{alias}: wanted the values of {name}, got others")
    vocab = stored_vocab(checkpoint)
    draft = Eagle3Draft(config, stored_shape(stored), weights, vocab)
    load_parameters(draft, checkpoint.tensors)
    return draft.to(weights.embed_tokens.device)
