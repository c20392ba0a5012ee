"""A lean cached forward of the Llama and Qwen3 families over the model's own modules.

Linear layers, norms and MLPs are the transformers modules themselves; what is replaced is what lies
around them: no mask building, no wrappers, a preallocated cache, and queries of one key/value head
folded into rows, so that no key is ever repeated. On a small model that is most of the time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from specforge_ext.engines.columns import ColumnOutput

if TYPE_CHECKING:
    from specforge_ext.engines.hf_model import TargetModel

MODEL_TYPES = ("llama", "qwen3")
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
"""Kinds whose angles are position times a constant `inv_freq`."""


def why_not_lean(target: TargetModel) -> str | None:
    """The reason why a model needs transformers' own forward; None if it does not."""
    config = target.config
    if config.model_type not in MODEL_TYPES:
        return f"model_type {config.model_type!r} is none of {', '.join(MODEL_TYPES)}"
    scaling = target.spec.rope_scaling or {}
    if scaling.get("rope_type", "default") not in ROPE_TYPES:
        return f"rope_type {scaling['rope_type']!r} is none of {', '.join(ROPE_TYPES)}"
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    if kinds:
        return f"layer types {sorted(kinds)}"
    return None


class LeanModel:
    """ColumnModel over the modules of a transformers model. One at a time: it holds the cache."""

    def __init__(self, target: TargetModel) -> None:
        self._target = target
        self._spec = target.spec
        self._num_groups = target.spec.num_heads // target.spec.num_kv_heads
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []
        self._length = 0

    def start(self, num_rows: int, capacity: int) -> None:
        spec = self._spec
        shape = (num_rows, spec.num_kv_heads, max(capacity, 1), spec.head_dim)
        weight: Tensor = self._target.embed_tokens.weight
        self._keys = [weight.new_empty(shape) for _ in range(spec.num_layers)]
        self._values = [weight.new_empty(shape) for _ in range(spec.num_layers)]
        self._length = 0

    def append(
        self,
        input_ids: Tensor,
        positions: Tensor,
        *,
        mask: Tensor | None,
        stream_ids: tuple[int, ...] = (),
    ) -> ColumnOutput:
        if mask is None and input_ids.shape[1] > 1 and self._length:
            raise ValueError("mask: wanted one for several columns after the first ones, got None")
        self._reserve(self._length + input_ids.shape[1])
        hidden = self._target.embed_tokens(input_ids)
        cos, sin = self._angles(positions, hidden.dtype)
        mask = None if mask is None else self._fold_mask(mask)
        streams = {0: hidden} if 0 in stream_ids else {}
        for index, layer in enumerate(self._target.layers):
            normed = layer.input_layernorm(hidden)
            hidden = hidden + self._attend(index, layer.self_attn, normed, cos, sin, mask)
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
            if index + 1 in stream_ids:
                streams[index + 1] = hidden
        self._length += input_ids.shape[1]
        return ColumnOutput(self._target.norm(hidden), streams)

    def select(self, rows: Tensor) -> None:
        self._keys = [keys[rows] for keys in self._keys]
        self._values = [values[rows] for values in self._values]

    def _reserve(self, columns: int) -> None:
        capacity = self._keys[0].shape[2]
        if columns <= capacity:
            return
        extra = max(columns, 2 * capacity) - capacity
        self._keys = [F.pad(keys, (0, 0, 0, extra)) for keys in self._keys]
        self._values = [F.pad(values, (0, 0, 0, extra)) for values in self._values]

    def _angles(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin [B, n, 1, head_dim], computed in float32; scaled as the RoPE kind wants."""
        rotary = self._target.base.rotary_emb
        half = positions[..., None].float() * rotary.inv_freq
        angles = torch.cat((half, half), dim=-1).unsqueeze(2)
        scale = rotary.attention_scaling
        return (angles.cos() * scale).to(dtype), (angles.sin() * scale).to(dtype)

    def _fold_mask(self, mask: Tensor) -> Tensor:
        """[B, n, C] bool -> [B, 1, groups * n, C] additive, rows in the order of folded queries."""
        added = torch.zeros(mask.shape, dtype=self._target.dtype, device=mask.device)
        added.masked_fill_(~mask, -torch.inf)
        return added[:, None].repeat(1, 1, self._num_groups, 1)

    def _attend(
        self,
        index: int,
        attention: Any,
        hidden: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor | None,
    ) -> Tensor:
        spec = self._spec
        batch, num_new, _ = hidden.shape
        heads = (batch, num_new, -1, spec.head_dim)
        query = attention.q_proj(hidden).view(heads)
        key = attention.k_proj(hidden).view(heads)
        if hasattr(attention, "q_norm"):
            query = attention.q_norm(query)
            key = attention.k_norm(key)
        value = attention.v_proj(hidden).view(heads)
        keys, values = self._store(index, _rotate(key, cos, sin), value)
        mixed = self._mix(_rotate(query, cos, sin), keys, values, mask)
        out: Tensor = attention.o_proj(mixed)
        return out

    def _store(self, index: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Append [B, n, kv heads, D]; all keys and values so far, [B, kv heads, C, D]."""
        start, end = self._length, self._length + key.shape[1]
        self._keys[index][:, :, start:end] = key.transpose(1, 2)
        self._values[index][:, :, start:end] = value.transpose(1, 2)
        return self._keys[index][:, :, :end], self._values[index][:, :, :end]

    def _mix(self, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        """Attention of query [B, n, heads, D]; [B, n, heads * D]."""
        batch, num_new, _, head_dim = query.shape
        if mask is None and num_new > 1:
            out = F.scaled_dot_product_attention(
                query.transpose(1, 2), keys, values, is_causal=True, enable_gqa=True
            )
            return out.transpose(1, 2).reshape(batch, num_new, -1)
        grouped = query.view(batch, num_new, -1, self._num_groups, head_dim)
        folded = grouped.permute(0, 2, 3, 1, 4).reshape(batch, keys.shape[1], -1, head_dim)
        out = F.scaled_dot_product_attention(folded, keys, values, attn_mask=mask)
        out = out.view(batch, keys.shape[1], self._num_groups, num_new, head_dim)
        return out.permute(0, 3, 1, 2, 4).reshape(batch, num_new, -1)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE in the half-split layout of transformers checkpoints; x [B, n, heads, D]."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin
