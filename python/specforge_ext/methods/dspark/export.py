"""Checkpoints of DSpark drafts: a block draft's, and the heads at the top level of config.json.

SGLang takes all three Markov heads, vLLM 0.32 the vanilla one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import get_args

import torch

from specforge_ext.methods._block.export import backbone_config, backbone_schema, stored_shape
from specforge_ext.methods._export import (
    Schema,
    Shapes,
    count,
    flag,
    free_dtype,
    load_parameters,
    parameters_of,
)
from specforge_ext.methods.dspark.config import DSparkConfig, MarkovKind
from specforge_ext.methods.dspark.model import DSparkDraft, HeadShape
from specforge_ext.records import DraftCheckpoint, TargetSpec, TargetWeights

ARCHITECTURE = "Qwen3DSparkModel"


def to_checkpoint(
    draft: DSparkDraft, config: DSparkConfig, target: TargetSpec, *, dtype: torch.dtype
) -> DraftCheckpoint:
    """The parameters under their own names, in dtype, on the CPU."""
    stored = backbone_config(
        draft.block_shape,
        config,
        target,
        method="dspark",
        architecture=ARCHITECTURE,
        dtype=dtype,
    )
    return DraftCheckpoint(parameters_of(draft, dtype), stored | _head_config(draft.head_shape))


def from_checkpoint(
    checkpoint: DraftCheckpoint, weights: TargetWeights, config: DSparkConfig
) -> DSparkDraft:
    """The draft in float32 on the target's device; sizes come from the checkpoint's config.json.

    ValueError if it was made for another target or for other options than `config` asks for.
    """
    shape = stored_shape(checkpoint.config, weights, config)
    draft = DSparkDraft(shape, _asked_heads(checkpoint.config, config), weights)
    load_parameters(draft, checkpoint.tensors)
    return draft.to(weights.embed_tokens.device)


def _head_config(heads: HeadShape) -> dict[str, object]:
    """Keys of config.json. Every one is written: engines differ in what they take for granted."""
    return {
        "markov_rank": heads.rank,
        "markov_head_type": heads.kind,
        "enable_confidence_head": heads.confidence,
        "confidence_head_with_markov": heads.confidence,
        "sample_from_anchor": True,
    }


def schema(config: Mapping[str, object]) -> Schema:
    """Every key of a draft with this config.json. ValueError names a key that is missing or of the
    wrong kind.
    """
    hidden, vocab = count(config, "hidden_size"), count(config, "vocab_size")
    heads = _heads(config)
    shapes: Shapes = {
        "markov_head.markov_w1.weight": (vocab, heads.rank),
        "markov_head.markov_w2.weight": (vocab, heads.rank),
    }
    if heads.kind == "gated":
        shapes["markov_head.gate_proj.weight"] = (heads.rank, hidden + heads.rank)
        shapes["markov_head.gate_proj.bias"] = (heads.rank,)
    if heads.kind == "rnn":
        shapes["markov_head.joint_proj.weight"] = (3 * heads.rank, 2 * heads.rank + hidden)
        shapes["markov_head.joint_proj.bias"] = (3 * heads.rank,)
    if heads.confidence:
        shapes["confidence_head.proj.weight"] = (1, hidden + heads.rank)
        shapes["confidence_head.proj.bias"] = (1,)
    return backbone_schema(config) | free_dtype(shapes)


def _asked_heads(stored: Mapping[str, object], config: DSparkConfig) -> HeadShape:
    """Of a checkpoint's config.json. ValueError if `config` asks for others."""
    heads, wanted = _heads(stored), HeadShape.of(config)
    for key, ours, theirs in (
        ("markov_rank", wanted.rank, heads.rank),
        ("markov_head_type", wanted.kind, heads.kind),
        ("enable_confidence_head", wanted.confidence, heads.confidence),
    ):
        if ours != theirs:
            raise ValueError(f"config.json {key}: wanted {ours!r}, got {theirs!r}")
    return heads


def _heads(config: Mapping[str, object]) -> HeadShape:
    kind = next((k for k in get_args(MarkovKind) if k == config.get("markov_head_type")), None)
    if kind is None:
        raise ValueError(
            f"config.json markov_head_type: wanted one of {get_args(MarkovKind)}, "
            f"got {config.get('markov_head_type')!r}"
        )
    confidence = flag(config, "enable_confidence_head")
    if confidence and not flag(config, "confidence_head_with_markov"):
        raise ValueError(
            "config.json confidence_head_with_markov: wanted true (the head reads the token "
            "before), got False"
        )
    if not flag(config, "sample_from_anchor"):
        raise ValueError("config.json sample_from_anchor: wanted true (slot 0 predicts), got False")
    return HeadShape(kind, count(config, "markov_rank"), confidence)
