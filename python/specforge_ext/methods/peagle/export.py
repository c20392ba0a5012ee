"""P-EAGLE checkpoints as vLLM (0.16 and later) loads them, under SpecForge's names.

`vllm serve` wants `"parallel_drafting": true` beside `"method": "eagle3"` in its speculative
config. SGLang 0.5.23 has no parallel drafting: see `ARCHITECTURE`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from specforge_ext.methods.eagle3.config import aux_layer_ids
from specforge_ext.methods.eagle3.export import (
    LAYER_IDS_KEY,
    OWN_KEY,
    Schema,
    base_config,
    count,
    own_layer_ids,
    plain_layer_shapes,
    stored_shape,
    stored_vocab,
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
    tensors = {
        name: parameter.detach().to("cpu", dtype, copy=True).contiguous()
        for name, parameter in draft.named_parameters()
    }
    if draft.shape.draft_vocab_size < draft.shape.vocab_size:
        tensors["d2t"], tensors["t2d"] = draft.d2t.cpu().clone(), draft.t2d.cpu().clone()
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
    hidden, ffn, draft_vocab = (
        count(config, key) for key in ("hidden_size", "intermediate_size", "draft_vocab_size")
    )
    vocab, head_dim = count(config, "vocab_size"), count(config, "head_dim")
    q = head_dim * count(config, "num_attention_heads")
    kv = head_dim * count(config, "num_key_value_heads")
    width = hidden * len(own_layer_ids(config))
    shapes: dict[str, tuple[int, ...]] = {
        "embed_tokens.weight": (vocab, hidden),
        "fc.weight": (hidden, width),
        "mask_hidden": (1, 1, width),
        "norm.weight": (hidden,),
        "lm_head.weight": (draft_vocab, hidden),
    }
    for i in range(count(config, "num_hidden_layers")):
        shapes |= plain_layer_shapes(f"layers.{i}", hidden=hidden, ffn=ffn, q=q, kv=kv)
    for name in "qkv":
        shapes[f"layers.0.self_attn.{name}_proj.weight"] = (q if name == "q" else kv, 2 * hidden)
    shapes["layers.0.hidden_norm.weight"] = (hidden,)
    keys: Schema = {name: (shape, None) for name, shape in shapes.items()}
    if draft_vocab < vocab:
        keys["d2t"], keys["t2d"] = ((draft_vocab,), torch.int64), ((vocab,), torch.bool)
    return keys


def from_checkpoint(
    checkpoint: DraftCheckpoint, weights: TargetWeights, config: PEagleConfig
) -> PEagleDraft:
    """The draft in float32 on the target's device; sizes come from the checkpoint's config.json.

    ValueError if it was made for another target or for other options than `config` asks for.
    """
    stored, spec = checkpoint.config, weights.spec
    for key, wanted in (("vocab_size", spec.vocab_size), ("hidden_size", spec.hidden_size)):
        if count(stored, key) != wanted:
            raise ValueError(f"config.json {key}: wanted the target's {wanted}, got {stored[key]}")
    wanted_ids, ids = aux_layer_ids(config, spec), own_layer_ids(stored)
    if ids != wanted_ids:
        raise ValueError(
            f"config.json {OWN_KEY}.aux_layer_ids: wanted {list(wanted_ids)}, got {list(ids)}"
        )
    draft = PEagleDraft(config, stored_shape(stored), weights, stored_vocab(checkpoint))
    for key, asked in (
        ("num_hidden_layers", config.num_layers),
        *((key, draft.mask_token_id) for key in MASK_KEYS),
    ):
        if stored.get(key) != asked:
            raise ValueError(f"config.json {key}: wanted {asked}, got {stored.get(key)!r}")
    names = [name for name, _ in draft.named_parameters()]
    draft.load_state_dict({name: checkpoint.tensors[name].float() for name in names})
    return draft.to(weights.embed_tokens.device)
