"""What such a draft depends on: layers of the target, sizes, the part of its vocabulary."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from specforge_ext.methods._common import LayerSizes, layer_shape
from specforge_ext.nn.layer import LayerShape
from specforge_ext.records import DraftVocab, FeatureLayout, FeatureSpec, TargetSpec


class FusesLayers(LayerSizes, Protocol):
    """A config that may name the layers of its features, and the size of the draft's vocabulary."""

    @property
    def aux_layer_ids(self) -> tuple[int, ...] | None: ...
    @property
    def draft_vocab_size(self) -> int | None: ...


@dataclass(frozen=True)
class DraftShape:
    """Sizes of a draft. features_width: columns of `aux`, of num_features layers; rope_scaling: as
    in HF configs.
    """

    layer: LayerShape
    features_width: int
    num_features: int
    vocab_size: int
    draft_vocab_size: int
    rope_theta: float
    rope_scaling: Mapping[str, object] | None

    @classmethod
    def of(cls, config: FusesLayers, target: TargetSpec, vocab: DraftVocab) -> DraftShape:
        """What the config asks for on this target; RoPE as the target's.

        ValueError if the vocabulary is not of the size asked for.
        """
        wanted = config.draft_vocab_size or target.vocab_size
        if vocab.size != wanted or vocab.t2d.numel() != target.vocab_size:
            raise ValueError(
                f"draft_vocab_size: wanted {wanted} of the target's {target.vocab_size}, "
                f"got a vocabulary of {vocab.size} of {vocab.t2d.numel()}"
            )
        ids = aux_layer_ids(config, target)
        return cls(
            layer=layer_shape(config, target),
            features_width=target.hidden_size * len(ids),
            num_features=len(ids),
            vocab_size=target.vocab_size,
            draft_vocab_size=vocab.size,
            rope_theta=target.rope_theta,
            rope_scaling=target.rope_scaling,
        )


def fused_layout(config: FusesLayers, target: TargetSpec) -> FeatureLayout:
    """`aux`: the residual streams that are fused; `last`: the last one, after the final norm."""
    ids, width = aux_layer_ids(config, target), target.hidden_size
    aux = FeatureSpec("aux", ids, width * len(ids), target.dtype)
    last = FeatureSpec("last", (target.num_layers,), width, target.dtype, final_norm=True)
    return FeatureLayout((aux, last))


def engine_default_layer_ids(num_layers: int) -> tuple[int, int, int]:
    """What SGLang and vLLM take when a draft names no layers; not checked for sense."""
    return 2, num_layers // 2, num_layers - 3


def default_aux_layer_ids(num_layers: int) -> tuple[int, ...]:
    """HF `hidden_states` indices of the features when the config names none: the engines' default.

    ValueError if the target has too few layers for them to be distinct and ascending.
    """
    ids = engine_default_layer_ids(num_layers)
    if not ids[0] < ids[1] < ids[2]:
        raise ValueError(
            f"aux_layer_ids: the default [2, L/2, L-3] of a target with {num_layers} layers is "
            f"{list(ids)}; wanted ascending ids, so name them"
        )
    return ids


def aux_layer_ids(config: FusesLayers, target: TargetSpec) -> tuple[int, ...]:
    """The features' layers, HF `hidden_states` indices. ValueError if they are not of the
    target.
    """
    if config.aux_layer_ids is None:
        return default_aux_layer_ids(target.num_layers)
    ids = config.aux_layer_ids
    if not ids or list(ids) != sorted(set(ids)) or ids[0] < 0 or ids[-1] > target.num_layers:
        raise ValueError(
            f"aux_layer_ids: wanted ascending ids from 0 to {target.num_layers}, got {list(ids)}"
        )
    return ids
