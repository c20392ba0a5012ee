"""Settings of P-EAGLE."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from specforge_ext.config import Config

Positive = Annotated[int, Field(gt=0)]


class PEagleConfig(Config):
    """P-EAGLE (arXiv 2602.01469). Sizes left out are the target's.

    num_depths: tokens that the draft learns to say in one pass, 1..64; servers may ask for fewer.
    num_layers: decoder layers; the first is EAGLE-3's, further ones are plain Llama layers.
    down_sample_ratio, down_sample_ratio_min: depth d trains on the share
        max(down_sample_ratio ** d, down_sample_ratio_min) of a sample's scored positions, drawn
        anew every step from the run's seed, the step and the sample's id.
    mask_token_id: the token that stands at the depths past the first; None: the last one of the
        target's vocabulary. The draft's own embedding of it is trained.
    draft_vocab_size: tokens that the draft can say; None for the whole vocabulary.
    aux_layer_ids: as EAGLE-3's: HF `hidden_states` indices of the features, ascending; None for
        [2, L / 2, L - 3].
    temperature: divides the logits of draft and target in the loss.
    compaction: compute only rows whose result can reach the loss. Off is the same result, slower.
    warm_start: "none", or "target": as EAGLE-3's; further layers start as the identity.
    intermediate_size, num_heads, num_kv_heads, head_dim: of the draft's layers, counts.
    """

    num_depths: Annotated[int, Field(ge=1, le=64)] = 8
    num_layers: Positive = 2
    down_sample_ratio: Annotated[float, Field(gt=0, le=1)] = 0.8
    down_sample_ratio_min: Annotated[float, Field(ge=0, le=1)] = 0.2
    mask_token_id: Annotated[int, Field(ge=0)] | None = None
    draft_vocab_size: Positive | None = None
    aux_layer_ids: tuple[int, ...] | None = None
    temperature: Annotated[float, Field(gt=0)] = 1.0
    compaction: bool = True
    warm_start: Literal["none", "target"] = "none"
    intermediate_size: Positive | None = None
    num_heads: Positive | None = None
    num_kv_heads: Positive | None = None
    head_dim: Positive | None = None


def mask_token_id(config: PEagleConfig, vocab_size: int) -> int:
    """ValueError if the config names one that is not in the vocabulary."""
    if config.mask_token_id is None:
        return vocab_size - 1
    if config.mask_token_id >= vocab_size:
        raise ValueError(
            f"mask_token_id: wanted less than {vocab_size}, got {config.mask_token_id}"
        )
    return config.mask_token_id
