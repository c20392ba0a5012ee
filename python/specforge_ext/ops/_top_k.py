"""Top-k distillation (HASS, arXiv 2408.15766) by way of the plain soft cross entropy.

With p and q the rows' distributions, K the teacher's largest words and P their share of p,

    -sum_v p_v log q_v - w sum_(v in K) p_v log q_v = -(1 + w P) sum_v p'_v log q_v,

where p'_v is p_v (1 + w [v in K]) / (1 + w P): the softmax of the teacher's logits with
temperature * log(1 + w) added to the words in K. So the row kernel needs no further case: the
logits are raised, and the row's loss and weight are multiplied by 1 + w P.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def raise_top_k(logits_RV: Tensor, *, top_k: int, weight: float, temperature: float) -> Tensor:
    """Adds temperature * log(1 + weight) to each row's words of K, in place.

    Returns 1 + w P, [R] float32. K: the words whose logit is at least the row's top_k-th largest,
    so that equals are in or out together; top_k beyond V takes all.
    """
    before = torch.logsumexp(logits_RV.float() / temperature, dim=-1)
    least_R1 = logits_RV.topk(min(top_k, logits_RV.shape[-1]), dim=-1).values[:, -1:]
    raised = temperature * math.log1p(weight)
    logits_RV.add_((logits_RV >= least_R1).to(logits_RV.dtype), alpha=raised)
    return (torch.logsumexp(logits_RV.float() / temperature, dim=-1) - before).exp()
