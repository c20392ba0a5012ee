"""config.json of the speculators package (0.9): layers' sizes in a section of their own.

vLLM (0.32) reads the same files, with other defaults for keys that are missing, so all are written.
"""

from __future__ import annotations

from collections.abc import Mapping

from specforge_ext.export.formats import settings
from specforge_ext.export.formats.portable import (
    Portable,
    Target,
    mapping,
    wanted_target,
)
from specforge_ext.methods._export import OWN_KEY, count

KIND = "speculators_model_type"
LAYER = "transformer_layer_config"
EAGLE3_IDS = "eagle_aux_hidden_state_layer_ids"
DFLASH_IDS = "aux_hidden_state_layer_ids"
"""Both are HF `hidden_states` indices."""
_TOP = ("speculators_config", "speculators_version", KIND, LAYER, OWN_KEY, "architectures")
_FLAGS = ("norm_before_residual", "fc_norm", "norm_output", "norm_before_fc")


def depth(config: Mapping[str, object]) -> int | None:
    """Tokens a step of the first proposal method."""
    methods = mapping(config, "speculators_config").get("proposal_methods")
    if not isinstance(methods, list) or not methods or not isinstance(methods[0], Mapping):
        return None
    tokens = methods[0].get("speculative_tokens")
    return tokens if type(tokens) is int else None


def flat_eagle3(config: Mapping[str, object], ignored: tuple[str, ...]) -> dict[str, object]:
    """One level, as in other formats.

    ValueError for unknown keys at the top, and without norm_before_residual: then speculators takes
    false and vLLM true.
    """
    known = {*_TOP, *_FLAGS, EAGLE3_IDS, "draft_vocab_size", "tie_word_embeddings"}
    known |= {"target_hidden_size", "embed_requires_grad"}
    settings.refuse_unknown(config, known, ignored, where="config.json")
    if not isinstance(config.get("norm_before_residual"), bool):
        raise ValueError(
            "config.json norm_before_residual: wanted it said, since speculators takes false and "
            "vLLM true where it is not, got none"
        )
    carried = (*_FLAGS, EAGLE3_IDS, "draft_vocab_size", "target_hidden_size", OWN_KEY)
    return {**_layer(config), **{key: config[key] for key in carried if key in config}}


def nested_eagle3(
    draft: Portable, target: Target | None, *, depth: int | None
) -> dict[str, object]:
    """ValueError if nobody has said how many tokens a step it is to draft."""
    if depth is None:
        raise ValueError(
            "--depth: wanted the tokens to draft a step, which speculators checkpoints name, "
            "got none"
        )
    config = dict(draft.config)
    flags = {key: bool(config.pop(key, False)) for key in _FLAGS}
    top = {
        **flags,
        "architectures": ["Eagle3DraftModel"],
        "draft_vocab_size": config.pop("draft_vocab_size"),
        "target_hidden_size": None,
        EAGLE3_IDS: list(draft.layer_ids),
        "embed_requires_grad": False,
        "tie_word_embeddings": False,
        "torch_dtype": config["torch_dtype"],
        OWN_KEY: config.pop(OWN_KEY),
    }
    config["architectures"] = ["LlamaForCausalLM"]
    return {**top, **_speculators("eagle3", target, depth), LAYER: config}


def flat_dflash(config: Mapping[str, object], ignored: tuple[str, ...]) -> dict[str, object]:
    """One level, `dflash_config` inside, as in other formats.

    ValueError for sliding layers: speculators counts their window from the block's anchor, servers
    from each slot. Nor can other formats hold a part of the vocabulary.
    """
    known = {*_TOP, DFLASH_IDS, "draft_vocab_size", "tie_word_embeddings", "block_size"}
    known |= {"target_hidden_size", "mask_token_id", "sliding_window_non_causal"}
    settings.refuse_unknown(config, known, ignored, where="config.json")
    layer = _layer(config)
    wanted = {
        "draft_vocab_size": layer.get("vocab_size"),
        "target_hidden_size": layer.get("hidden_size"),
        "sample_from_anchor": False,
    }
    settings.refuse_other(config, wanted, where="config.json")
    refuse_sliding(layer)
    outputs = config.get(DFLASH_IDS)
    if not isinstance(outputs, list) or not outputs or min(outputs) < 1:
        raise ValueError(f"config.json {DFLASH_IDS}: wanted indices from 1 on, got {outputs!r}")
    own = dict(mapping(config, OWN_KEY))
    return {
        **layer,
        "block_size": config.get("block_size"),
        "num_target_layers": own.pop("num_target_layers", None),
        "dflash_config": {
            "mask_token_id": config.get("mask_token_id"),
            "target_layer_ids": [i - 1 for i in outputs],
        },
        OWN_KEY: own,
    }


def nested_dflash(draft: Portable, target: Target | None) -> dict[str, object]:
    """`sliding_window_non_causal` is said to be true although no layer slides: where it is false,
    vLLM makes all layers causal in their blocks.
    """
    config = dict(draft.config)
    refuse_sliding(config)
    block_size = count(config, "block_size")
    own = {**mapping(config, OWN_KEY), "num_target_layers": config.pop("num_target_layers")}
    section = mapping(config, "dflash_config")
    for key in (OWN_KEY, "dflash_config", "block_size"):
        del config[key]
    top = {
        "architectures": ["DFlashDraftModel"],
        "draft_vocab_size": config["vocab_size"],
        "block_size": block_size,
        "target_hidden_size": None,
        DFLASH_IDS: list(draft.layer_ids),
        "mask_token_id": section["mask_token_id"],
        "sliding_window_non_causal": True,
        "sample_from_anchor": False,
        "tie_word_embeddings": False,
        "torch_dtype": config["torch_dtype"],
        OWN_KEY: own,
    }
    config["architectures"] = ["Qwen3ForCausalLM"]
    return {**top, **_speculators("dflash", target, block_size - 1), LAYER: config}


def refuse_sliding(config: Mapping[str, object]) -> None:
    types = config.get("layer_types")
    if isinstance(types, list) and "sliding_attention" in types:
        raise ValueError(
            "config.json layer_types: wanted full_attention only, since speculators counts a "
            f"sliding window from the block's anchor and servers from each slot, got {types}"
        )


def _speculators(kind: str, target: Target | None, depth: int) -> dict[str, object]:
    target = wanted_target(target, "which speculators checkpoints name")
    verifier = {"name_or_path": target.name, "architectures": list(target.architectures)}
    proposal = {
        "proposal_type": "greedy",
        "speculative_tokens": depth,
        "verifier_accept_k": 1,
        "accept_tolerance": 0.0,
    }
    return {
        KIND: kind,
        "speculators_config": {
            "algorithm": kind,
            "default_proposal_method": "greedy",
            "proposal_methods": [proposal],
            "verifier": verifier,
        },
    }


def _layer(config: Mapping[str, object]) -> dict[str, object]:
    if not mapping(config, LAYER):
        raise ValueError(f"config.json {LAYER}: wanted a mapping, got {config.get(LAYER)!r}")
    return {key: value for key, value in mapping(config, LAYER).items() if key != "architectures"}
