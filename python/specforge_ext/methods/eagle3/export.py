"""EAGLE-3 checkpoints as SGLang (`LlamaForCausalLMEagle3`) and vLLM load them.

Tensors carry the parameters' own names, so writing and reading are one table, `schema`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from specforge_ext.methods.eagle3.config import (
    Eagle3Config,
    aux_layer_ids,
    engine_default_layer_ids,
)
from specforge_ext.methods.eagle3.model import DraftShape, Eagle3Draft
from specforge_ext.nn.layer import LayerShape
from specforge_ext.records import (
    DTYPE_NAMES,
    DraftCheckpoint,
    DraftVocab,
    TargetSpec,
    TargetWeights,
)

OWN_KEY = "specforge_ext"
"""Section of config.json that engines ignore: what the engines' keys leave out or disagree
about.
"""
LAYER_IDS_KEY = "eagle_aux_hidden_state_layer_ids"
"""Means the outputs of 0-based layers in SGLang, HF `hidden_states` indices (one more) in vLLM."""
EAGLE_KEY = "eagle_config"
"""The section in which SGLang (0.5.23) looks for LAYER_IDS_KEY. At the top level, where vLLM wants
it, SGLang does not see it and takes its default layers without a word.
"""
FURTHER_NORM_NAMES = ("input_layernorm", "hidden_norm")
"""The norm before the attention of layers after the first: in vLLM (0.32), in SGLang (0.5.23). The
other engine's key is there in both, and not used, so a checkpoint holds the norm under both names.
"""

Schema = dict[str, tuple[tuple[int, ...], torch.dtype | None]]


def to_checkpoint(
    draft: Eagle3Draft, target: TargetSpec, *, aux_layer_ids: tuple[int, ...], dtype: torch.dtype
) -> DraftCheckpoint:
    """Floating tensors in dtype on the CPU, d2t and t2d unless the vocabulary is the full one."""
    tensors = {
        name: parameter.detach().to("cpu", dtype, copy=True).contiguous()
        for name, parameter in draft.named_parameters()
    }
    for name, alias in _norm_aliases(draft.config.num_layers).items():
        tensors[alias] = tensors[name].clone()
    if draft.shape.draft_vocab_size < draft.shape.vocab_size:
        tensors["d2t"], tensors["t2d"] = draft.d2t.cpu().clone(), draft.t2d.cpu().clone()
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
    hidden, ffn, draft_vocab = (
        count(config, key) for key in ("hidden_size", "intermediate_size", "draft_vocab_size")
    )
    vocab, head_dim = count(config, "vocab_size"), count(config, "head_dim")
    q = head_dim * count(config, "num_attention_heads")
    kv = head_dim * count(config, "num_key_value_heads")
    shapes: dict[str, tuple[int, ...]] = {
        "fc.weight": (hidden, hidden * len(own_layer_ids(config))),
        "midlayer.hidden_norm.weight": (hidden,),
        "midlayer.input_layernorm.weight": (hidden,),
        "midlayer.post_attention_layernorm.weight": (hidden,),
        "midlayer.self_attn.q_proj.weight": (q, 2 * hidden),
        "midlayer.self_attn.k_proj.weight": (kv, 2 * hidden),
        "midlayer.self_attn.v_proj.weight": (kv, 2 * hidden),
        "midlayer.self_attn.o_proj.weight": (hidden, q),
        "midlayer.mlp.gate_proj.weight": (ffn, hidden),
        "midlayer.mlp.up_proj.weight": (ffn, hidden),
        "midlayer.mlp.down_proj.weight": (hidden, ffn),
        "norm.weight": (hidden,),
        "lm_head.weight": (draft_vocab, hidden),
    }
    for i in range(1, count(config, "num_hidden_layers")):
        shapes |= plain_layer_shapes(f"layers.{i}", hidden=hidden, ffn=ffn, q=q, kv=kv)
    aliases = _norm_aliases(count(config, "num_hidden_layers"))
    shapes |= dict.fromkeys(aliases.values(), (hidden,))
    if _flag(config, "fc_norm"):
        names = (f"fc_norm.{i}.weight" for i in range(len(own_layer_ids(config))))
        shapes |= dict.fromkeys(names, (hidden,))
    keys: Schema = {name: (shape, None) for name, shape in shapes.items()}
    if draft_vocab < vocab:
        keys["d2t"], keys["t2d"] = ((draft_vocab,), torch.int64), ((vocab,), torch.bool)
    return keys


def _norm_aliases(num_layers: int) -> dict[str, str]:
    """Keys of our norms -> the other names that they are exported under."""
    ours, theirs = FURTHER_NORM_NAMES
    layers = range(1, num_layers)
    return {f"layers.{i}.{ours}.weight": f"layers.{i}.{theirs}.weight" for i in layers}


def plain_layer_shapes(
    prefix: str, *, hidden: int, ffn: int, q: int, kv: int
) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
        "self_attn.q_proj": (q, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, q),
        "mlp.gate_proj": (ffn, hidden),
        "mlp.up_proj": (ffn, hidden),
        "mlp.down_proj": (hidden, ffn),
    }
    return {f"{prefix}.{name}.weight": shape for name, shape in shapes.items()}


def from_checkpoint(
    checkpoint: DraftCheckpoint, weights: TargetWeights, config: Eagle3Config
) -> Eagle3Draft:
    """The draft in float32 on the target's device; sizes come from the checkpoint's config.json.

    ValueError if it was made for another target or for other layers than `config` asks for.
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
    for key, asked, came in (
        ("num_hidden_layers", config.num_layers, count(stored, "num_hidden_layers")),
        ("fc_norm", config.fc_norm, _flag(stored, "fc_norm")),
        ("norm_output", config.norm_output, _flag(stored, "norm_output")),
        ("norm_before_residual", False, _flag(stored, "norm_before_residual")),
    ):
        if came != asked:
            raise ValueError(f"config.json {key}: wanted {asked}, got {came}")
    for name, alias in _norm_aliases(config.num_layers).items():
        if not torch.equal(checkpoint.tensors[name], checkpoint.tensors[alias]):
            raise ValueError(f"{alias}: wanted the values of {name}, got others")
    vocab = stored_vocab(checkpoint)
    draft = Eagle3Draft(config, stored_shape(stored), weights, vocab)
    names = [name for name, _ in draft.named_parameters()]
    draft.load_state_dict({name: checkpoint.tensors[name].float() for name in names})
    return draft.to(weights.embed_tokens.device)


def base_config(shape: DraftShape, target: TargetSpec, dtype: torch.dtype) -> dict[str, object]:
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


def stored_shape(config: Mapping[str, object]) -> DraftShape:
    parameters = config.get("rope_parameters")
    if not isinstance(parameters, Mapping):
        raise ValueError(f"config.json rope_parameters: wanted a mapping, got {parameters!r}")
    hidden = count(config, "hidden_size")
    return DraftShape(
        layer=LayerShape(
            hidden_size=hidden,
            intermediate_size=count(config, "intermediate_size"),
            num_heads=count(config, "num_attention_heads"),
            num_kv_heads=count(config, "num_key_value_heads"),
            head_dim=count(config, "head_dim"),
            rms_norm_eps=_number(config, "rms_norm_eps"),
        ),
        features_width=hidden * len(own_layer_ids(config)),
        num_features=len(own_layer_ids(config)),
        vocab_size=count(config, "vocab_size"),
        draft_vocab_size=count(config, "draft_vocab_size"),
        rope_theta=_number(parameters, "rope_theta"),
        rope_scaling={k: v for k, v in parameters.items() if k != "rope_theta"},
    )


def stored_vocab(checkpoint: DraftCheckpoint) -> DraftVocab:
    if "d2t" in checkpoint.tensors:
        vocab = DraftVocab(t2d=checkpoint.tensors["t2d"], d2t=checkpoint.tensors["d2t"])
        if not torch.equal(vocab.t2d.nonzero()[:, 0], vocab.target_ids):
            raise ValueError("d2t: wanted i + d2t[i] to be the ids where t2d is True, ascending")
        return vocab
    size = count(checkpoint.config, "vocab_size")
    return DraftVocab(
        t2d=torch.ones(size, dtype=torch.bool), d2t=torch.zeros(size, dtype=torch.int64)
    )


def own_layer_ids(config: Mapping[str, object]) -> tuple[int, ...]:
    own = config.get(OWN_KEY)
    ids = own.get("aux_layer_ids") if isinstance(own, Mapping) else None
    if not isinstance(ids, (list, tuple)) or not ids or not all(type(i) is int for i in ids):
        raise ValueError(f"config.json {OWN_KEY}.aux_layer_ids: wanted a list of ids, got {ids!r}")
    return tuple(ids)


def count(config: Mapping[str, object], key: str) -> int:
    value = config.get(key)
    if type(value) is not int or value <= 0:
        raise ValueError(f"config.json {key}: wanted a positive count, got {value!r}")
    return value


def _flag(config: Mapping[str, object], key: str) -> bool:
    value = config.get(key, False)
    if not isinstance(value, bool):
        raise ValueError(f"config.json {key}: wanted true or false, got {value!r}")
    return value


def _number(config: Mapping[str, object], key: str) -> float:
    value = config.get(key)
    if not isinstance(value, (int, float)) or isinstance(value, bool) or value <= 0:
        raise ValueError(f"config.json {key}: wanted a positive number, got {value!r}")
    return float(value)
