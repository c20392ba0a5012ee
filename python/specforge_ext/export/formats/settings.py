"""Reads config.json of foreign drafts: what is carried over, what means nothing, what is refused.

A key that is neither known nor known to mean nothing is refused by its name, because nobody can
tell whether it changes what the draft computes.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import Tensor

from specforge_ext.export.formats.portable import Target
from specforge_ext.methods._export import count, number
from specforge_ext.records import DTYPE_NAMES

MEANS_NOTHING = frozenset({
    "_name_or_path", "attention_dropout", "auto_map", "dtype", "initializer_range",
    "layer_norm_eps", "max_window_layers", "pad_token_id", "pretraining_tp", "torch_dtype",
    "transformers_version", "use_cache", "return_dict", "output_attentions",
    "output_hidden_states", "problem_type", "is_encoder_decoder", "chunk_size_feed_forward",
    "id2label", "label2id",
})  # fmt: skip
"""Of a draft that is served; dtypes are those of the tensors."""
TABLE_LENGTH_ONLY = ("default", "linear", "llama3", "yarn")
"""Kinds of RoPE in which max_position_embeddings is the length of the table and nothing else."""


def refuse_unknown(
    config: Mapping[str, object], known: Collection[str], ignored: Collection[str], *, where: str
) -> None:
    """ValueError for keys that are neither, unless their value says "off"."""
    for key in sorted(config.keys() - set(known) - MEANS_NOTHING - set(ignored)):
        if config[key] is not None and config[key] is not False:
            raise ValueError(
                f"{where} {key}: wanted no such key, since what it changes in the draft is not "
                f"known, got {config[key]!r} (--ignore {key} if it changes nothing)"
            )


def refuse_other(config: Mapping[str, object], wanted: Mapping[str, object], *, where: str) -> None:
    """ValueError unless each key is missing, null, or what is wanted."""
    for key, value in wanted.items():
        if config.get(key) is not None and config[key] != value:
            raise ValueError(f"{where} {key}: wanted {value!r}, got {config[key]!r}")


def flag(config: Mapping[str, object], key: str) -> bool:
    value = config.get(key)
    if value is not None and not isinstance(value, bool):
        raise ValueError(f"config.json {key}: wanted true or false, got {value!r}")
    return bool(value)


def sizes(config: Mapping[str, object]) -> dict[str, object]:
    """Of layers, all of them written out."""
    hidden, heads = count(config, "hidden_size"), count(config, "num_attention_heads")
    kv_heads = heads if config.get("num_key_value_heads") is None else None
    head_dim = hidden // heads if config.get("head_dim") is None else None
    return {
        "vocab_size": count(config, "vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": count(config, "intermediate_size"),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads or count(config, "num_key_value_heads"),
        "head_dim": head_dim or count(config, "head_dim"),
        "num_hidden_layers": count(config, "num_hidden_layers"),
        "rms_norm_eps": number(config, "rms_norm_eps"),
        "max_position_embeddings": count(config, "max_position_embeddings"),
        "bos_token_id": config.get("bos_token_id"),
        "eos_token_id": config.get("eos_token_id"),
    }


def rope(config: Mapping[str, object]) -> dict[str, object]:
    """rope_theta, rope_scaling and rope_parameters that say the same.

    ValueError where the source's own do not, since engines differ in which of them they read, and
    where there is no base at all, since engines differ in their default.
    """
    found: dict[str, tuple[object, dict[str, object] | None]] = {}
    for key in ("rope_parameters", "rope_scaling"):
        section = config.get(key)
        if isinstance(section, Mapping):
            found[key] = _theta_and_scaling(section)
    given = [config.get("rope_theta"), *(theta for theta, _ in found.values())]
    bases = {float(t) for t in given if isinstance(t, (int, float)) and not isinstance(t, bool)}
    if len(bases) != 1:
        raise ValueError(
            f"config.json rope_theta: wanted one base, got {sorted(bases)} at the top level, in "
            "rope_parameters and in rope_scaling"
        )
    scalings = [scaling for _, scaling in found.values()]
    if any(scaling != scalings[0] for scaling in scalings):
        raise ValueError(
            f"config.json rope_scaling: wanted what rope_parameters says, got {scalings[1]!r} "
            f"and {scalings[0]!r}"
        )
    scaling = scalings[0] if scalings else None
    base = bases.pop()
    return {
        "rope_theta": base,
        "rope_scaling": scaling,
        "rope_parameters": {"rope_type": "default", **(scaling or {}), "rope_theta": base},
    }


def _theta_and_scaling(
    section: Mapping[str, object],
) -> tuple[object, dict[str, object] | None]:
    scaling = {k: v for k, v in section.items() if k not in ("rope_theta", "type")}
    scaling.setdefault("rope_type", section.get("type", "default"))
    partial = scaling.pop("partial_rotary_factor", 1)
    if partial not in (1, None):
        raise ValueError(
            "config.json partial_rotary_factor: wanted 1 (drafts turn whole heads), "
            f"got {partial!r}"
        )
    return section.get("rope_theta"), None if scaling["rope_type"] == "default" else scaling


def dtype_name(tensors: Mapping[str, Tensor]) -> str:
    """ValueError unless all floating-point tensors have one dtype that we know."""
    found = {t.dtype for t in tensors.values() if t.is_floating_point()}
    if len(found) != 1 or not found <= DTYPE_NAMES.keys():
        names = sorted(str(d).removeprefix("torch.") for d in found)
        raise ValueError(f"tensors: wanted one of float32, bfloat16 and float16, got {names}")
    return DTYPE_NAMES[found.pop()]


def check_target(config: dict[str, object], target: Target, notes: list[str]) -> None:
    """Sizes are the target's; max_position_embeddings is made at least the target's.

    Drafts often carry the length of their training texts there, and servers make RoPE's tables as
    long as that.
    """
    for key, wanted in (("hidden_size", target.hidden_size), ("vocab_size", target.vocab_size)):
        if config[key] != wanted:
            raise ValueError(f"config.json {key}: wanted the target's {wanted}, got {config[key]}")
    length, wanted = count(config, "max_position_embeddings"), target.max_position_embeddings
    if length >= wanted:
        return
    scaling = config["rope_scaling"]
    kind = scaling["rope_type"] if isinstance(scaling, Mapping) else "default"
    if kind not in TABLE_LENGTH_ONLY:
        raise ValueError(
            f"config.json max_position_embeddings: wanted at least the target's {wanted}, got "
            f"{length}, which {kind!r} RoPE computes with"
        )
    config["max_position_embeddings"] = wanted
    notes.append(f"max_position_embeddings: raised from {length} to the target's {wanted}")
