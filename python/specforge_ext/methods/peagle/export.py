"""P-EAGLE checkpoints as vLLM (0.16 and later) loads them, under SpecForge's names.

`vllm serve` wants `"parallel_drafting": true` beside `"method": "eagle3"` in its speculative
config. SGLang 0.5.23 has no parallel drafting: see `ARCHITECTURE`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from specforge_ext.methods._export import (
    OWN_KEY,
    Schema,
    Shapes,
    count,
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
from specforge_ext.methods.peagle.config import PEagleConfig
from specforge_ext.methods.peagle.model import PEagleDraft
from specforge_ext.records import DraftCheckpoint, TargetSpec, TargetWeights

ARCHITECTURE = "Eagle3LlamaForCausalLM"
"""With method "eagle3" vLLM puts "Eagle3" before other names (SpecForge's `PEagleDraftModel`), and
knows none of that kind. SGLang knows `LlamaForCausalLMEagle3` but not this one, so it cannot take
the draft for a chain draft.
"""
MASK_KEYS = ("mask_token_id", "pard_token", "ptd_token_id")
"""Of the mask token: vLLM 0.32 takes the first that is there; older versions know the others."""


def to_checkpoint(
    draft: PEagleDraft, target: TargetSpec, *, aux_layer_ids: tuple[int, ...], dtype: torch.dtype
) -> DraftCheckpoint:
    """Floating tensors in dtype on the CPU, d2t and t2d unless the vocabulary is the full one."""
    tensors = tensors_of(draft, draft.vocab, dtype)
    config = base_config(draft.shape, target, dtype)
    config["architectures"] = [ARCHITECTURE]
    config["num_hidden_layers"] = draft.config.num_layers
    config |= dict.fromkeys(MASK_KEYS, draft.mask_token_id)
    if draft.shape.num_features != 3:
        config["num_aux_hidden_states"] = draft.shape.num_features
    config[OWN_KEY] = {
        "method": "peagle",
        "aux_layer_ids": list(aux_layer_ids),
        "num_depths": draft.config.num_depths,
    }
    return DraftCheckpoint(tensors=tensors, config=config)


def engine_configs(config: Mapping[str, object]) -> dict[str, dict[str, object]]:
    """For vLLM alone."""
    return {"vllm": {**config, LAYER_IDS_KEY: list(own_layer_ids(config))}}


def schema(config: Mapping[str, object]) -> Schema:
    """Every key of a checkpoint with this config.json: shape, and dtype where it is fixed.

    ValueError names a key of the config that is missing or of the wrong kind.
    """
    layer, vocab = stored_layer_shape(config), count(config, "vocab_size")
    hidden, width = layer.hidden_size, layer.hidden_size * len(own_layer_ids(config))
    shapes: Shapes = {
        "embed_tokens.weight": (vocab, hidden),
        "fc.weight": (hidden, width),
        "mask_hidden": (1, 1, width),
        "norm.weight": (hidden,),
        "lm_head.weight": (count(config, "draft_vocab_size"), hidden),
    }
    for i in range(count(config, "num_hidden_layers")):
        tensors = layer_tensors(layer) if i else fused_layer_tensors(layer)
        shapes |= {f"layers.{i}.{name}": shape for name, shape in tensors.items()}
    return fused_schema(config, shapes)


def from_checkpoint(
    checkpoint: DraftCheckpoint, weights: TargetWeights, config: PEagleConfig
) -> PEagleDraft:
    """The draft in float32 on the target's device; sizes come from the checkpoint's config.json.

    ValueError if it was made for another target or for other options than `config` asks for.
    """
    stored = checkpoint.config
    check_stored(stored, weights.spec, config)
    draft = PEagleDraft(config, stored_shape(stored), weights, stored_vocab(checkpoint))
    for key, asked in (
        ("num_hidden_layers", config.num_layers),
        *((key, draft.mask_token_id) for key in MASK_KEYS),
    ):
        if stored.get(key) != asked:
            raise ValueError(f"config.json {key}: wanted {asked}, got {stored.get(key)!r}")
    load_parameters(draft, checkpoint.tensors)
    return draft.to(weights.embed_tokens.device)
