"""Settings of multi-token prediction."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from specforge_ext.config import Config
from specforge_ext.methods.mtp.forms import FormName

MtpLoss = Literal["soft_ce", "reverse_kl", "jsd", "l1", "lk_alpha", "lk_lambda", "labels"]


class MtpConfig(Config):
    """The layer for multi-token prediction of a target (DeepSeek-V3, arXiv 2412.19437, 2.2).

    num_steps: times that the layer is applied, each on the output of the one before, as servers do
        it; 1..64. step_decay: step i weighs step_decay ** i.
    form: whose names and conventions the layer has. "auto": the one that the target's checkpoint
        holds; where it holds none, that of the target's architecture, else "deepseek".
    start: "checkpoint", from the target's own layer; "fresh", random; "auto", the first where there
        is one (the log says which).
    zero_first_embedding: the token that the row at position 0 reads counts as zeros: what vLLM 0.32
        does for "deepseek" and SGLang 0.5.23 does not.
    loss: of a row against the target's distribution: "soft_ce" (forward KL up to a constant),
        "reverse_kl", "jsd", "l1" (twice the total variation), "lk_alpha", "lk_lambda" (arXiv
        2602.23881); or "labels", against the token that the text goes on with.
    temperature: divides the logits of both in the loss. kl_scale, kl_decay: of lk_lambda; KL weighs
        kl_scale * exp(-kl_decay * A), A the mean acceptance of a micro-batch's step.
    compaction: compute only rows whose result can reach the loss. Off is the same result, slower.
    """

    num_steps: Annotated[int, Field(ge=1, le=64)] = 3
    step_decay: Annotated[float, Field(gt=0, le=1)] = 0.8
    form: FormName | Literal["auto"] = "auto"
    start: Literal["auto", "checkpoint", "fresh"] = "auto"
    zero_first_embedding: bool = False
    loss: MtpLoss = "soft_ce"
    temperature: Annotated[float, Field(gt=0)] = 1.0
    kl_scale: Annotated[float, Field(gt=0, le=1)] = 1.0
    kl_decay: Annotated[float, Field(ge=0)] = 1.0
    compaction: bool = True
