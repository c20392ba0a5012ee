"""The decoder layer of multi-token prediction.

Legend of shapes: n rows, H hidden size, Hq heads of queries, D head dimension.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from specforge_ext.methods.mtp.forms import LayerKind
from specforge_ext.nn.layer import LayerShape, PlainLayer
from specforge_ext.nn.norm import RMSNorm


class MtpLayer(PlainLayer):
    """A plain layer, whose attention may pass a gate.

    gate_proj: half of a checkpoint's q_proj, see `LayerKind`; apart here, so that queries are what
    `Attention` makes everywhere.
    """

    def __init__(self, shape: LayerShape, kind: LayerKind, *, norm: type[RMSNorm]) -> None:
        super().__init__(shape, qk_norm=kind.qk_norm, qkv_bias=kind.qkv_bias, norm=norm)
        width = shape.num_heads * shape.head_dim
        self.gate_proj = (
            nn.Linear(shape.hidden_size, width, bias=kind.qkv_bias) if kind.output_gate else None
        )

    def finish(self, hidden: Tensor, attended: Tensor) -> Tensor:
        """As `PlainLayer.finish`: residual stream [n, H], attention output [n, Hq, D] -> [n, H]."""
        if self.gate_proj is not None:
            gate = torch.sigmoid(self.gate_proj(self.input_layernorm(hidden)))
            attended = attended * torch.unflatten(gate, -1, attended.shape[-2:])
        return super().finish(hidden, attended)
