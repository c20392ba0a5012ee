"""EAGLE-3 checkpoints in every format.

Layers are named in three ways: `hidden_states` indices of Hugging Face (vLLM at the top level,
speculators), or one less, 0-based outputs of layers (SGLang, SpecForge and Model-Optimizer, in
`eagle_config`). Portable drafts have the first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from specforge_ext.export.formats import settings, speculators
from specforge_ext.export.formats.portable import (
    Portable,
    Target,
    check_embedding_is_targets,
    embedding_to_add,
    ids,
    mapping,
    wanted_target,
)
from specforge_ext.export.formats.vocab import draft_vocab, whole_vocab
from specforge_ext.methods._export import OWN_KEY, count
from specforge_ext.methods._fused.export import LAYER_IDS_KEY
from specforge_ext.methods._fused.shape import engine_default_layer_ids
from specforge_ext.methods.eagle3.export import EAGLE_KEY, FURTHER_NORM_NAMES

ARCHITECTURES = ("LlamaForCausalLMEagle3", "Eagle3LlamaForCausalLM")
EMBEDDING = "embed_tokens.weight"
ONE_LESS = ("sglang", "specforge", "modelopt")
"""Formats that count layers' outputs from 0, in EAGLE_KEY."""

_SIZES = (
    "vocab_size", "draft_vocab_size", "hidden_size", "intermediate_size", "num_attention_heads",
    "num_key_value_heads", "head_dim", "num_hidden_layers", "rms_norm_eps",
    "max_position_embeddings", "bos_token_id", "eos_token_id", "rope_theta", "rope_scaling",
    "rope_parameters",
)  # fmt: skip
_FIXED = {
    "model_type": "llama",
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
}
_FLAGS = ("norm_before_residual", "fc_norm", "norm_output")
_MODELOPT = {
    "use_aux_hidden_state": True,
    "use_input_layernorm_in_first_layer": True,
    "use_last_layernorm": True,
    "use_mtp_layernorm": False,
    "next_layer_regular": True,
    "parallel_draft_step": 1,
    "parallel_draft_heads_num_layers": 1,
}
MODELOPT_MARKS = frozenset(_MODELOPT) - {"use_aux_hidden_state"}
_CANNOT = {
    "sglang": {"norm_before_residual", "embedding as a feature"},
    "vllm": set[str](),
    "speculators": set[str](),
    "specforge": {
        "norm_before_residual", "norm_output", "several layers", "other than three features",
        "embedding as a feature",
    },
    "modelopt": {"norm_before_residual", "norm_output", "fc_norm", "embedding as a feature"},
}  # fmt: skip
"""What no loader of a format does: it would skip the key or the tensors, and draft badly."""


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
        config = speculators.flat_eagle3(config, ignored)
    _refuse(config, form, ignored)
    tensors = {_our_name(name): tensor for name, tensor in tensors.items()}
    embedding = tensors.pop(EMBEDDING, None)
    layers = _layer_ids(config, form, target)
    sizes = settings.sizes(config)
    vocab_size = count(config, "vocab_size")
    given = config.get("draft_vocab_size")
    sizes["draft_vocab_size"] = vocab_size if given is None else count(config, "draft_vocab_size")
    tensors |= draft_vocab(
        tensors.pop("t2d", None),
        tensors.pop("d2t", None),
        vocab_size=vocab_size,
        size=count(sizes, "draft_vocab_size"),
    )
    _name_norms_twice(tensors, count(config, "num_hidden_layers"))
    portable: dict[str, object] = {
        "architectures": ["LlamaForCausalLMEagle3"],
        **sizes,
        **_FIXED,
        **settings.rope(config),
        **_options(config, form, layers),
        "torch_dtype": settings.dtype_name(tensors),
        OWN_KEY: {**_own(config), "method": "eagle3", "aux_layer_ids": list(layers)},
    }
    return Portable("eagle3", layers, tensors, portable, embedding, depth)


def write(
    draft: Portable, form: str, target: Target | None, depth: int | None
) -> tuple[Portable, dict[str, Tensor], dict[str, object]]:
    """What the checkpoint holds, with the embedding that it has; its tensors; its config.json."""
    for what in sorted(_asks(draft) & _CANNOT[form]):
        raise ValueError(f"{what}: wanted a draft without it, since {form} has no such thing")
    tensors = dict(draft.tensors)
    if form in ("specforge", "speculators"):
        draft = replace(draft, embedding=embedding_to_add(draft, target, form=form))
    elif form in ("sglang", "modelopt"):
        check_embedding_is_targets(draft, target, form=form)
        draft = replace(draft, embedding=None)
    if draft.embedding is not None:
        tensors[EMBEDDING] = draft.embedding
    config = {**draft.config}
    if form == "specforge":
        tensors |= whole_vocab(draft)
    if form == "modelopt":
        tensors.pop("t2d", None)
    if form in ("modelopt", "speculators"):
        tensors = {_plain_name(name): tensor for name, tensor in tensors.items()}
    if form == "speculators":
        _, alias = FURTHER_NORM_NAMES
        for i in range(1, count(config, "num_hidden_layers")):
            del tensors[f"layers.{i}.{alias}.weight"]
        tokens = depth or draft.depth
        return draft, tensors, speculators.nested_eagle3(draft, target, depth=tokens)
    if form in ("specforge", "modelopt"):
        config[OWN_KEY] = {**mapping(config, OWN_KEY), "format": form}
    return draft, tensors, config | _layer_keys(draft, form, target)


def _name_norms_twice(tensors: dict[str, Tensor], num_layers: int) -> None:
    """Of layers after the first: vLLM reads one name, SGLang the other, which both load.

    ValueError if the source has both with other values.
    """
    for i in range(1, num_layers):
        names = [f"layers.{i}.{name}.weight" for name in FURTHER_NORM_NAMES]
        held = [tensors[name] for name in names if name in tensors]
        if len(held) == 2 and not torch.equal(*held):
            raise ValueError(
                f"{names[1]}: wanted the values of {names[0]}, since vLLM reads this one and "
                "SGLang that one, got others"
            )
        if held:
            tensors |= {name: held[0].clone() for name in names if name not in tensors}


def _layer_keys(draft: Portable, form: str, target: Target | None) -> dict[str, object]:
    """None where the layers are the default of both servers and the target's depth is known."""
    if form in ("vllm", "sglang"):
        if target and draft.layer_ids == engine_default_layer_ids(target.num_layers):
            return {}
        if form == "vllm":
            return {LAYER_IDS_KEY: list(draft.layer_ids)}
    section: dict[str, object] = dict(_MODELOPT) if form == "modelopt" else {}
    section |= {
        "use_aux_hidden_state": True,
        LAYER_IDS_KEY: [i - 1 for i in draft.layer_ids],
    }
    return {EAGLE_KEY: section}


def _layer_ids(config: Mapping[str, object], form: str, target: Target | None) -> tuple[int, ...]:
    """HF indices. ValueError where the places that name layers disagree."""
    found: dict[str, tuple[int, ...]] = {}
    own = mapping(config, OWN_KEY)
    if own.get("aux_layer_ids") is not None:
        key = f"{OWN_KEY}.aux_layer_ids"
        found[key] = ids(own["aux_layer_ids"], key)
    nested = mapping(config, EAGLE_KEY).get(LAYER_IDS_KEY)
    if nested is not None:
        shift = 1 if form in ONE_LESS else 0
        key = f"{EAGLE_KEY}.{LAYER_IDS_KEY}"
        found[key] = tuple(i + shift for i in ids(nested, key))
    if config.get(LAYER_IDS_KEY) is not None:
        # SGLang does not look here, so what stands here was written for vLLM.
        found[LAYER_IDS_KEY] = ids(config[LAYER_IDS_KEY], LAYER_IDS_KEY)
    if len(set(found.values())) > 1:
        said = ", ".join(f"{key} {list(value)}" for key, value in found.items())
        raise ValueError(
            f"config.json: wanted one set of layers, got (as hidden_states indices, read as "
            f"{form}) {said}"
        )
    if found:
        return next(iter(found.values()))
    target = wanted_target(
        target, "since the draft names no layers: the default hangs on its depth"
    )
    return engine_default_layer_ids(target.num_layers)


def _refuse(config: Mapping[str, object], form: str, ignored: tuple[str, ...]) -> None:
    where = "config.json"
    known = {*_SIZES, *_FIXED, *_FLAGS, "architectures", LAYER_IDS_KEY, EAGLE_KEY, OWN_KEY}
    known |= {"num_aux_hidden_states", "target_hidden_size", "norm_before_fc"}
    settings.refuse_unknown(config, known, ignored, where=where)
    settings.refuse_other(config, _FIXED, where=where)
    off = {"target_hidden_size": config.get("hidden_size"), "norm_before_fc": False}
    settings.refuse_other(config, off, where=where)
    section = mapping(config, EAGLE_KEY)
    settings.refuse_unknown(
        section, {LAYER_IDS_KEY, *_MODELOPT}, ignored, where=f"{where} {EAGLE_KEY}."
    )
    settings.refuse_other(section, _MODELOPT, where=f"{where} {EAGLE_KEY}.")
    if form == "specforge" and config.get("norm_output") is False:
        raise ValueError(
            "config.json norm_output: wanted true or no such key, got false, which in SpecForge "
            "means a head without the norm before it: no server has that"
        )


def _options(config: Mapping[str, object], form: str, layers: tuple[int, ...]) -> dict[str, object]:
    """Flags as our exports write them: servers' defaults are left out.

    `norm_output` of SpecForge only says that the head reads normalised states, which is so in every
    server; theirs says that the next step does.
    """
    options: dict[str, object] = {
        "norm_before_residual": settings.flag(config, "norm_before_residual")
    }
    if settings.flag(config, "fc_norm"):
        options["fc_norm"] = True
    if settings.flag(config, "norm_output") and form != "specforge":
        options["norm_output"] = True
    if len(layers) != 3:
        options["num_aux_hidden_states"] = len(layers)
    given = config.get("num_aux_hidden_states")
    if given is not None and given != len(layers):
        raise ValueError(
            f"config.json num_aux_hidden_states: wanted {len(layers)}, one for each of the layers "
            f"{list(layers)}, got {given}"
        )
    return options


def _asks(draft: Portable) -> set[str]:
    config = draft.config
    asked = {name for name in _FLAGS if config.get(name)}
    if count(config, "num_hidden_layers") > 1:
        asked.add("several layers")
    if len(draft.layer_ids) != 3:
        asked.add("other than three features")
    if draft.layer_ids[0] == 0:
        asked.add("embedding as a feature")
    return asked


def _own(config: Mapping[str, object]) -> dict[str, object]:
    return {k: v for k, v in mapping(config, OWN_KEY).items() if k != "format"}


def _our_name(name: str) -> str:
    return name.replace("layers.0.", "midlayer.", 1) if name.startswith("layers.0.") else name


def _plain_name(name: str) -> str:
    return name.replace("midlayer.", "layers.0.", 1) if name.startswith("midlayer.") else name
