"""Domino checkpoints as SGLang loads them: as DFlash's, with a projector of the type domino.

vLLM 0.32 has no such projector and refuses the tensors it does not know.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from specforge_ext.methods._block.export import (
    backbone_config,
    backbone_schema,
    method_section,
    stored_shape,
)
from specforge_ext.methods._export import (
    Schema,
    Shapes,
    count,
    free_dtype,
    load_parameters,
    parameters_of,
)
from specforge_ext.methods.domino.config import DominoConfig
from specforge_ext.methods.domino.model import DominoDraft, DominoShape
from specforge_ext.records import DraftCheckpoint, TargetSpec, TargetWeights

ARCHITECTURE = "DFlashDraftModel"
_SECTION = "dflash_config"


def to_checkpoint(
    draft: DominoDraft, config: DominoConfig, target: TargetSpec, *, dtype: torch.dtype
) -> DraftCheckpoint:
    """The parameters under their own names, in dtype, on the CPU."""
    stored = backbone_config(
        draft.block_shape,
        config,
        target,
        method="domino",
        architecture=ARCHITECTURE,
        dtype=dtype,
    )
    stored[_SECTION] = {**method_section(stored), **_asked(config), **vars(draft.own_shape)}
    return DraftCheckpoint(parameters_of(draft, dtype), stored)


def engine_configs(config: Mapping[str, object]) -> dict[str, dict[str, object]]:
    """For SGLang alone."""
    return {"sglang": dict(config)}


def schema(config: Mapping[str, object]) -> Schema:
    """Every key of a checkpoint with this config.json.

    ValueError names a key of the config that is missing or of the wrong kind.
    """
    own = _stored_own_shape(config)
    hidden, vocab = count(config, "hidden_size"), count(config, "vocab_size")
    state, width = own.gru_hidden_dim, own.emb_dim
    shapes: Shapes = {
        "prefix_gru.weight_ih_l0": (3 * state, hidden),
        "prefix_gru.weight_hh_l0": (3 * state, state),
        "embed_proj.0.weight": (width, hidden + state),
        "embed_proj.2.weight": (vocab, width),
    }
    return backbone_schema(config) | free_dtype(shapes)


def from_checkpoint(
    checkpoint: DraftCheckpoint, weights: TargetWeights, config: DominoConfig
) -> DominoDraft:
    """The draft in float32 on the target's device; sizes come from the checkpoint's config.json.

    ValueError if it was made for another target or for other options than `config` asks for.
    """
    section = method_section(checkpoint.config)
    for key, wanted in _asked(config).items():
        if section.get(key) != wanted:
            raise ValueError(
                f"config.json {_SECTION}.{key}: wanted {wanted!r}, got {section.get(key)!r}"
            )
    shape = stored_shape(checkpoint.config, weights, config)
    draft = DominoDraft(shape, _stored_own_shape(checkpoint.config), weights)
    load_parameters(draft, checkpoint.tensors)
    return draft.to(weights.embed_tokens.device)


def _asked(config: DominoConfig) -> dict[str, object]:
    """pure_draft_prefix_len: predicted slots that are not corrected; SGLang wants this value."""
    return {
        "projector_type": "domino",
        "pure_draft_prefix_len": 1,
        "shift_label": config.shift_label,
    }


def _stored_own_shape(config: Mapping[str, object]) -> DominoShape:
    section = method_section(config)
    keys = ("gru_hidden_dim", "emb_dim")
    return DominoShape(**{key: count(section, key, section=f"{_SECTION}.") for key in keys})
