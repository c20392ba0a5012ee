"""RMSNorm (arXiv 1910.07467)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """Normalised in float32 (or wider), cast back, then scaled: the order of HF's Llama."""

    def __init__(self, width: int, *, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x [..., width]; the result has the dtype of `weight * x`."""
        wide = x if x.dtype == torch.float64 else x.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * (wide * scale).to(x.dtype)


class ZeroCentredRMSNorm(RMSNorm):
    """Scaled by 1 + weight in float32 (or wider), then cast back: HF's Qwen 3-Next."""

    def __init__(self, width: int, *, eps: float) -> None:
        super().__init__(width, eps=eps)
        nn.init.zeros_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., width]; the result has the dtype of `weight * x`."""
        wide = x if x.dtype == torch.float64 else x.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        out: Tensor = wide * scale * (1 + self.weight.to(wide.dtype))
        return out.to(torch.promote_types(x.dtype, self.weight.dtype))
