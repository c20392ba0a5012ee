"""DFlash checkpoints in every format.

The tensors have one set of names, and `dflash_config.target_layer_ids` are 0-based outputs of
layers everywhere but in speculators. What differs is in config.json.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from specforge_ext.export.formats import settings, speculators
from specforge_ext.export.formats.portable import (
    Portable,
    Target,
    check_embedding_is_targets,
    ids,
    mapping,
    wanted_target,
)
from specforge_ext.methods._export import OWN_KEY, count

ARCHITECTURES = ("DFlashDraftModel",)
SECTION = "dflash_config"
_SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads",
    "head_dim", "num_hidden_layers", "rms_norm_eps", "max_position_embeddings", "bos_token_id",
    "eos_token_id", "rope_theta", "rope_scaling", "rope_parameters", "num_target_layers",
    "block_size", "layer_types", "sliding_window", "use_sliding_window",
)  # fmt: skip
_FIXED = {
    "model_type": "qwen3",
    "hidden_act": "silu",
    "attention_bias": False,
    "tie_word_embeddings": False,
}


def read(
    config: Mapping[str, object],
    tensors: Mapping[str, Tensor],
    form: str,
    target: Target | None,
    ignored: tuple[str, ...],
) -> Portable:
    """ValueError names what is unknown, contradicts itself, or cannot be carried over."""
    depth = None
    if form == "speculators":
        depth = speculators.depth(config)
        config = speculators.flat_dflash(config, ignored)
    known = {*_SIZES, *_FIXED, "architectures", SECTION, OWN_KEY}
    settings.refuse_unknown(config, known, ignored, where="config.json")
    settings.refuse_other(config, _FIXED, where="config.json")
    tensors = dict(tensors)
    embedding = tensors.pop("embed_tokens.weight", None)
    num_layers = count(config, "num_hidden_layers")
    types, window = _layer_types(config, num_layers)
    outputs, mask_token_id = _section(config, types, ignored)
    num_target_layers = config.get("num_target_layers")
    if num_target_layers is None:
        num_target_layers = wanted_target(
            target, "since the draft does not say its depth"
        ).num_layers
    portable: dict[str, object] = {
        "architectures": list(ARCHITECTURES),
        **settings.sizes(config),
        **_FIXED,
        **settings.rope(config),
        "num_target_layers": num_target_layers,
        "block_size": _block_size(config),
        "layer_types": types,
        "use_sliding_window": window is not None,
        "sliding_window": window,
        "max_window_layers": num_layers,
        SECTION: {
            "mask_token_id": mask_token_id,
            "target_layer_ids": list(outputs),
            **({"causal": False} if window is None else {}),
        },
        "attention_dropout": 0.0,
        "torch_dtype": settings.dtype_name(tensors),
        OWN_KEY: {**mapping(config, OWN_KEY), "method": "dflash"},
    }
    layers = tuple(i + 1 for i in outputs)
    return Portable("dflash", layers, tensors, portable, embedding, depth)


def write(
    draft: Portable, form: str, target: Target | None, depth: int | None
) -> tuple[Portable, dict[str, Tensor], dict[str, object]]:
    """What the checkpoint holds; its tensors; its config.json.

    No format holds an embedding. ValueError if a depth other than the block's is asked for.
    """
    check_embedding_is_targets(draft, target, form=form)
    draft = replace(draft, embedding=None)
    most = count(draft.config, "block_size") - 1
    if depth not in (None, most):
        raise ValueError(f"--depth: wanted {most}, the block's, or none, got {depth}")
    if form == "speculators":
        return draft, dict(draft.tensors), speculators.nested_dflash(draft, target)
    return draft, dict(draft.tensors), dict(draft.config)


def _section(
    config: Mapping[str, object], types: list[str], ignored: tuple[str, ...]
) -> tuple[tuple[int, ...], int]:
    """Layers' outputs and the mask token of `dflash_config`; ValueError for anything else in it."""
    section, where = mapping(config, SECTION), f"config.json {SECTION}."
    known = {"mask_token_id", "target_layer_ids", "causal", "block_size"}
    settings.refuse_unknown(section, known, ignored, where=where)
    causal = section.get("causal")
    if causal is not None and "sliding_attention" in types:
        raise ValueError(
            f"{where}causal: wanted no such key beside sliding layers, which are causal in their "
            f"blocks: vLLM takes it for all layers, got {causal!r}"
        )
    settings.refuse_other(section, {"causal": False}, where=where)
    mask = section.get("mask_token_id")
    if type(mask) is not int or not 0 <= mask < count(config, "vocab_size"):
        raise ValueError(
            f"{where}mask_token_id: wanted an id below {config['vocab_size']}, got {mask!r}"
        )
    return ids(section.get("target_layer_ids"), f"{SECTION}.target_layer_ids"), mask


def _block_size(config: Mapping[str, object]) -> int:
    inner = mapping(config, SECTION).get("block_size")
    sizes = {value for value in (config.get("block_size"), inner) if value is not None}
    if len(sizes) != 1:
        raise ValueError(f"config.json block_size: wanted one, got {sorted(map(str, sizes))}")
    return count({"block_size": sizes.pop()}, "block_size")


def _layer_types(config: Mapping[str, object], num_layers: int) -> tuple[list[str], int | None]:
    """All full where none are named. The window of the sliding ones."""
    types = config.get("layer_types")
    if types is None:
        types = ["full_attention"] * num_layers
    known = ("full_attention", "sliding_attention")
    if (
        not isinstance(types, list)
        or len(types) != num_layers
        or any(t not in known for t in types)
    ):
        raise ValueError(
            f"config.json layer_types: wanted {num_layers} of {' and '.join(known)}, got {types!r}"
        )
    if "sliding_attention" in types:
        return types, count(config, "sliding_window")
    if config.get("sliding_window") is not None:
        raise ValueError(
            "config.json sliding_window: wanted none, since no layer of layer_types slides, "
            f"got {config['sliding_window']!r}"
        )
    return types, None
