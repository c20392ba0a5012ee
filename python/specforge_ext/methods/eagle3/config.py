"""Settings of EAGLE-3."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from specforge_ext.config import Config

Positive = Annotated[int, Field(gt=0)]


class Eagle3Config(Config):
    """EAGLE-3 (arXiv 2503.01840). Sizes left out are the target's.

    ttt_length: steps of training-time test, 1..64. step_decay: step i weighs step_decay ** i.
    draft_vocab_size: tokens that the draft can say; None for the whole vocabulary.
    aux_layer_ids: HF `hidden_states` indices of the features, ascending, at least one; None for
        [2, L / 2, L - 3] of a target with L layers, the default of SGLang and vLLM.
    compaction: compute only rows whose result can reach the loss. Off is the same result, slower.
    loss: of a draft row against the target's. "soft_ce" (forward KL up to a constant),
        "reverse_kl", "jsd", "l1" (twice the total variation), or of acceptance: "lk_alpha", -log of
        the chance that the draft's token is accepted, and "lk_lambda", which goes from KL to
        acceptance as the mean acceptance A of a micro-batch's step grows (arXiv 2602.23881).
    top_k, top_k_weight: with "soft_ce", add top_k_weight times the part of the cross entropy that
        the target's top_k most likely words of the draft's vocabulary make (HASS, arXiv
        2408.15766: 10 and 1). None: not added.
    temperature: divides the logits of draft and target in the loss.
    kl_scale, kl_decay: of lk_lambda; KL weighs kl_scale * exp(-kl_decay * A).
    denominator: what a micro-batch's loss sum is divided by (after summing over micro-batches).
        "scored": the rows scored at step 0. "all_positions_mean": samples times the longest sample,
        which is SpecForge's padded batch; acceptance then is, as there, a mean over the step's own
        rows, which depends on what is packed together.
    warm_start: "none", or "target": the first layer starts as the target's last decoder layer, any
        further one as the identity, the head as the rows of the target's head, and the first hidden
        state as the last of the features (with fc_norm: normalised).
    num_layers: decoder layers of the draft; the second and later ones are plain Llama layers.
    fc_norm: normalise the features of each captured layer before they are fused. norm_output: the
        next step starts from the normalised hidden state. Both together are EAGLE-3.1 (arXiv
        2605.09992).
    intermediate_size, num_heads, num_kv_heads, head_dim: of the draft's layers, counts.
    rope_scaling: "target" scales the draft's RoPE as the target's; "none" does not, as published
        drafts of targets with YaRN, which engines do not all read alike.
    """

    ttt_length: Annotated[int, Field(ge=1, le=64)] = 7
    step_decay: Annotated[float, Field(gt=0, le=1)] = 0.8
    draft_vocab_size: Positive | None = None
    aux_layer_ids: tuple[int, ...] | None = None
    compaction: bool = True
    loss: Literal["soft_ce", "reverse_kl", "jsd", "l1", "lk_alpha", "lk_lambda"] = "soft_ce"
    temperature: Annotated[float, Field(gt=0)] = 1.0
    kl_scale: Annotated[float, Field(gt=0, le=1)] = 1.0
    kl_decay: Annotated[float, Field(ge=0)] = 1.0
    top_k: Positive | None = None
    top_k_weight: Annotated[float, Field(gt=0)] = 1.0
    denominator: Literal["scored", "all_positions_mean"] = "scored"
    warm_start: Literal["none", "target"] = "none"
    intermediate_size: Positive | None = None
    num_heads: Positive | None = None
    num_kv_heads: Positive | None = None
    head_dim: Positive | None = None
    num_layers: Positive = 1
    fc_norm: bool = False
    norm_output: bool = False
    rope_scaling: Literal["target", "none"] = "target"

    @model_validator(mode="after")
    def _top_k_fits(self) -> Self:
        if self.top_k is not None and self.loss != "soft_ce":
            raise ValueError(f"top_k: wanted loss 'soft_ce' beside it, got {self.loss!r}")
        return self
