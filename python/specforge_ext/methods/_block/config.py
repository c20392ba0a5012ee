"""Settings that all block drafts share, and what of a target they depend on."""

from __future__ import annotations

from typing import Annotated, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from specforge_ext.config import Config
from specforge_ext.records import FeatureLayout, FeatureSpec, TargetSpec

Positive = Annotated[int, Field(gt=0)]
LayerType = Literal["full_attention", "sliding_attention"]

FEATURE = "hidden"
"""Name of the features in samples and batches."""


class BlockConfig(Config):
    """What every block draft (DFlash, arXiv 2602.06036) is told. Sizes left out are the target's.

    block_size: rows of a block: the last known token and block_size - 1 masked ones.
    num_anchors: most blocks of a sample in one step; they are drawn anew at every step.
    num_layers: decoder layers of the draft.
    layer_ids: HF `hidden_states` indices of the features, ascending, at least one (index k is the
        output of 0-based layer k - 1); None for as many as the draft has layers, spread evenly
        from the second layer to the fourth last.
    layer_types: "full_attention" or "sliding_attention" of each layer of the draft; None: all full.
        A sliding layer sees, from slot j of the block at anchor a, the context from position
        a + j - (sliding_window - 1) on, and its own block up to itself.
    sliding_window: positions that a sliding layer sees, the row's own included; at least
        block_size, because engines apply it to the block too.
    mask_token_id: the token that stands at the masked slots; None: see `mask_token_id`.
    gamma: slots weigh exp(-distance / gamma) in the loss, the first predicted one 1; None: all 1.
    warm_start: "none", or "target": every layer starts as the target's last decoder layer, reading
        the last of the features.
    intermediate_size, num_heads, num_kv_heads, head_dim: of the draft's layers, counts.
    """

    block_size: Annotated[int, Field(ge=2, le=256)] = 16
    num_anchors: Positive = 512
    num_layers: Positive = 5
    layer_ids: tuple[int, ...] | None = None
    layer_types: tuple[LayerType, ...] | None = None
    sliding_window: Positive | None = None
    mask_token_id: Annotated[int, Field(ge=0)] | None = None
    gamma: Annotated[float, Field(gt=0)] | None = None
    warm_start: Literal["none", "target"] = "none"
    intermediate_size: Positive | None = None
    num_heads: Positive | None = None
    num_kv_heads: Positive | None = None
    head_dim: Positive | None = None

    @model_validator(mode="after")
    def _layers_fit(self) -> Self:
        types = self.layer_types or ()
        if self.layer_types is not None and len(types) != self.num_layers:
            raise ValueError(
                f"layer_types: wanted one of each of the {self.num_layers} layers (num_layers), "
                f"got {len(types)}"
            )
        if ("sliding_attention" in types) != (self.sliding_window is not None):
            raise ValueError(
                "sliding_window: wanted together with a sliding_attention layer in layer_types, "
                f"got {self.sliding_window} with {list(types)}"
            )
        if self.sliding_window is not None and self.sliding_window < self.block_size:
            raise ValueError(
                f"sliding_window: wanted at least block_size {self.block_size}, "
                f"got {self.sliding_window}"
            )
        return self

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The window of each layer, None where it sees all."""
        types = self.layer_types or ("full_attention",) * self.num_layers
        return tuple(self.sliding_window if t == "sliding_attention" else None for t in types)


def default_layer_ids(num_target_layers: int, num_layers: int) -> tuple[int, ...]:
    """HF `hidden_states` indices of the features when the config names none.

    The rule of the published drafts, in 0-based layer outputs: T / 2 for one layer, else n of them
    evenly from 1 to T - 3. ValueError if that gives no ascending ids of the target's layers.
    """
    if num_layers == 1:
        outputs = [num_target_layers // 2]
    else:
        span = num_target_layers - 4
        outputs = [round(1 + i * span / (num_layers - 1)) for i in range(num_layers)]
    ids = tuple(i + 1 for i in outputs)
    if list(ids) != sorted(set(ids)) or ids[-1] > num_target_layers:
        raise ValueError(
            f"layer_ids: the default for {num_layers} draft layers on a target with "
            f"{num_target_layers} is {list(ids)}; wanted ascending ids up to {num_target_layers}, "
            "so name them"
        )
    return ids


def layer_ids(config: BlockConfig, target: TargetSpec) -> tuple[int, ...]:
    """The features' layers, HF `hidden_states` indices. ValueError if they are not of the target.

    Index 0, the embedding, is none: engines name the outputs of layers.
    """
    if config.layer_ids is None:
        return default_layer_ids(target.num_layers, config.num_layers)
    ids = config.layer_ids
    if not ids or list(ids) != sorted(set(ids)) or ids[0] < 1 or ids[-1] > target.num_layers:
        raise ValueError(
            f"layer_ids: wanted ascending ids from 1 to {target.num_layers}, got {list(ids)}"
        )
    return ids


def feature_layout(config: BlockConfig, target: TargetSpec) -> FeatureLayout:
    """`hidden`: the residual streams that the draft reads."""
    ids = layer_ids(config, target)
    spec = FeatureSpec(FEATURE, ids, target.hidden_size * len(ids), target.dtype)
    return FeatureLayout((spec,))


def mask_token_id(config: BlockConfig, embed_tokens: Tensor) -> int:
    """The token that stands at the masked slots, of embed_tokens [V, H].

    Unless named it is the last one whose embedding is not all zeros. In targets with a padded
    vocabulary (Qwen 3) no text holds that row; elsewhere it is the tokenizer's last merge,
    about its rarest. Text may hold it: slot 0 always is a known token, so nothing is ambiguous.
    A row of zeros would make the masked slots of the first layer alike. ValueError for one, and for
    an id outside the vocabulary. Of an embedding without values (meta) nothing is looked at.
    """
    vocab_size, named = embed_tokens.shape[0], config.mask_token_id
    if named is not None:
        if named >= vocab_size:
            raise ValueError(f"mask_token_id: wanted less than {vocab_size}, got {named}")
        if not embed_tokens.is_meta and not bool(embed_tokens[named].any()):
            raise ValueError(
                f"mask_token_id: wanted a token whose embedding is not all zeros, got {named}"
            )
        return named
    if embed_tokens.is_meta:
        return vocab_size - 1
    usable = (embed_tokens != 0).any(1).nonzero()[:, 0]
    if not usable.numel():
        raise ValueError("mask_token_id: wanted an embedding that is not all zeros, found none")
    return int(torch.max(usable))
