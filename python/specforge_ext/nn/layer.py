"""Parts of decoder layers, and the layers of EAGLE-3 drafts (arXiv 2503.01840): the first reads a
pair of streams, 2H wide, any further one is a plain pre-norm layer.

Legend of shapes: n rows, H hidden, D head dimension, Hq / Hkv heads of queries / keys and values.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from specforge_ext.nn.norm import RMSNorm
from specforge_ext.nn.rope import rotate

Tables = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class LayerShape:
    """Sizes of a decoder layer, all counts."""

    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float

    def __post_init__(self) -> None:
        if self.num_kv_heads <= 0 or self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads: wanted a multiple of num_kv_heads {self.num_kv_heads}, "
                f"got {self.num_heads}"
            )


class Attention(nn.Module):
    """Projections of grouped-query attention; what attends to what is the caller's business.

    qk_norm: a norm over each head of queries and keys before they are rotated, as in Qwen 3.
    qkv_bias: biases of the three projections, as in Qwen 2.
    """

    def __init__(
        self,
        shape: LayerShape,
        *,
        input_width: int,
        qk_norm: bool = False,
        qkv_bias: bool = False,
        norm: type[RMSNorm] = RMSNorm,
    ) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads = shape.num_heads, shape.num_kv_heads
        self.head_dim = shape.head_dim
        q_width, kv_width = shape.num_heads * self.head_dim, shape.num_kv_heads * self.head_dim
        self.q_proj = nn.Linear(input_width, q_width, bias=qkv_bias)
        self.k_proj = nn.Linear(input_width, kv_width, bias=qkv_bias)
        self.v_proj = nn.Linear(input_width, kv_width, bias=qkv_bias)
        self.o_proj = nn.Linear(q_width, shape.hidden_size, bias=False)
        eps = shape.rms_norm_eps
        self.q_norm = norm(self.head_dim, eps=eps) if qk_norm else None
        self.k_norm = norm(self.head_dim, eps=eps) if qk_norm else None

    def query(self, x: Tensor, tables: Tables) -> Tensor:
        """x [n, input_width] -> rotated queries [n, Hq, D]."""
        queries = torch.unflatten(self.q_proj(x), -1, (self.num_heads, self.head_dim))
        return rotate(queries if self.q_norm is None else self.q_norm(queries), tables)

    def key_value(self, x: Tensor, tables: Tables) -> tuple[Tensor, Tensor]:
        """x [n, input_width] -> rotated keys and values, [n, Hkv, D] each."""
        heads = (self.num_kv_heads, self.head_dim)
        keys = torch.unflatten(self.k_proj(x), -1, heads)
        keys = rotate(keys if self.k_norm is None else self.k_norm(keys), tables)
        return keys, torch.unflatten(self.v_proj(x), -1, heads)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)), arXiv 2002.05202."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class FusedInputLayer(nn.Module):
    """One pre-norm decoder layer that reads concat(norm(embedding), norm(hidden)).

    The residual stream is the hidden state as it came (`norm_before_residual: false` in exports).
    Submodules carry the names that engines load.
    """

    def __init__(self, shape: LayerShape) -> None:
        super().__init__()
        width, eps = shape.hidden_size, shape.rms_norm_eps
        self.input_layernorm = RMSNorm(width, eps=eps)
        self.hidden_norm = RMSNorm(width, eps=eps)
        self.self_attn = Attention(shape, input_width=2 * width)
        self.post_attention_layernorm = RMSNorm(width, eps=eps)
        self.mlp = SwiGLU(width, shape.intermediate_size)

    def inputs(self, embedding: Tensor, hidden: Tensor) -> Tensor:
        """[n, H], [n, H] -> the attention's input [n, 2H]."""
        return torch.cat((self.input_layernorm(embedding), self.hidden_norm(hidden)), dim=-1)

    def finish(self, hidden: Tensor, attended: Tensor) -> Tensor:
        """Residual stream [n, H] and attention output [n, Hq, D] -> the layer's output [n, H]."""
        return _finish(self, hidden, attended)


class PlainLayer(nn.Module):
    """One pre-norm decoder layer, as in Llama, that can stand behind a `FusedInputLayer`.

    qk_norm, qkv_bias, norm: see `Attention`; the norm is that of the layer's input and MLP too.
    """

    def __init__(
        self,
        shape: LayerShape,
        *,
        qk_norm: bool = False,
        qkv_bias: bool = False,
        norm: type[RMSNorm] = RMSNorm,
    ) -> None:
        super().__init__()
        width, eps = shape.hidden_size, shape.rms_norm_eps
        self.input_layernorm = norm(width, eps=eps)
        self.self_attn = Attention(
            shape, input_width=width, qk_norm=qk_norm, qkv_bias=qkv_bias, norm=norm
        )
        self.post_attention_layernorm = norm(width, eps=eps)
        self.mlp = SwiGLU(width, shape.intermediate_size)

    def inputs(self, embedding: Tensor, hidden: Tensor) -> Tensor:
        """The attention's input [n, H]. Only the first layer of a draft reads the embedding."""
        out: Tensor = self.input_layernorm(hidden)
        return out

    def finish(self, hidden: Tensor, attended: Tensor) -> Tensor:
        """As `FusedInputLayer.finish`."""
        return _finish(self, hidden, attended)


DraftLayer = FusedInputLayer | PlainLayer


def _finish(layer: DraftLayer, hidden: Tensor, attended: Tensor) -> Tensor:
    hidden = hidden + layer.self_attn.o_proj(attended.flatten(-2))
    out: Tensor = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return out
