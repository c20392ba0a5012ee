"""Checkpoints of DSpark drafts: a block draft's, and the heads at the top level of config.json.

SGLang takes all three Markov heads, vLLM 0.32 the vanilla one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import get_args

import torch

from specforge_ext.methods._block import export
from specforge_ext.methods.dspark.config import DSparkConfig, MarkovKind
from specforge_ext.methods.dspark.model import HeadShape

ARCHITECTURE = "Qwen3DSparkModel"


def head_config(heads: HeadShape) -> dict[str, object]:
    """Keys of config.json. Every one is written: engines differ in what they take for granted."""
    return {
        "markov_rank": heads.rank,
        "markov_head_type": heads.kind,
        "enable_confidence_head": heads.confidence,
        "confidence_head_with_markov": heads.confidence,
        "sample_from_anchor": True,
    }


def schema(config: Mapping[str, object]) -> export.Schema:
    """Every key of a draft with this config.json. ValueError names a key that is missing or of the
    wrong kind.
    """
    hidden, vocab = export.count(config, "hidden_size"), export.count(config, "vocab_size")
    heads = _heads(config)
    shapes: dict[str, tuple[int, ...]] = {
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
    own: dict[str, tuple[tuple[int, ...], torch.dtype | None]] = {
        name: (shape, None) for name, shape in shapes.items()
    }
    return {**export.backbone_schema(config), **own}


def stored_heads(stored: Mapping[str, object], config: DSparkConfig) -> HeadShape:
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
    confidence = _flag(config, "enable_confidence_head")
    if confidence and not _flag(config, "confidence_head_with_markov"):
        raise ValueError(
            "config.json confidence_head_with_markov: wanted true (the head reads the token "
            "before), got False"
        )
    if not _flag(config, "sample_from_anchor"):
        raise ValueError("config.json sample_from_anchor: wanted true (slot 0 predicts), got False")
    return HeadShape(kind, export.count(config, "markov_rank"), confidence)


def _flag(config: Mapping[str, object], key: str) -> bool:
    value = config.get(key)
    if not isinstance(value, bool):
        raise ValueError(f"config.json {key}: wanted true or false, got {value!r}")
    return value
