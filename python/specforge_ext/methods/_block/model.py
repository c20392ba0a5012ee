"""The backbone of block drafts (DFlash, arXiv 2602.06036): what the target saw, read by blocks.

Features of the context become one stream, ctx = hidden_norm(fc(features)), from which every layer
makes keys and values. A block's rows are the last known token and masked ones; they attend to the
context before the block's anchor and to their block.

Legend of shapes: T tokens of a packed batch, C context rows, A blocks, B rows of a block, P rows
that are predicted, F features' width, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from specforge_ext.methods._block.config import BlockConfig, layer_ids, mask_token_id
from specforge_ext.methods._block.plan import Blocks
from specforge_ext.methods._common import layer_shape
from specforge_ext.nn.block_attention import block_attention
from specforge_ext.nn.block_plan import BlockPlan
from specforge_ext.nn.layer import Attention, LayerShape, SwiGLU, Tables
from specforge_ext.nn.norm import RMSNorm
from specforge_ext.nn.rope import Rope
from specforge_ext.records import TargetWeights


@dataclass(frozen=True)
class BlockShape:
    """Sizes of a backbone. windows: of each layer, None where it sees all. features_width: F.

    rope_scaling: as in HF configs.
    """

    layer: LayerShape
    windows: tuple[int | None, ...]
    features_width: int
    vocab_size: int
    block_size: int
    mask_token_id: int
    rope_theta: float
    rope_scaling: Mapping[str, object] | None

    @classmethod
    def of(cls, config: BlockConfig, weights: TargetWeights) -> BlockShape:
        """What the config asks for on this target."""
        target = weights.spec
        return cls(
            layer=layer_shape(config, target),
            windows=config.windows,
            features_width=target.hidden_size * len(layer_ids(config, target)),
            vocab_size=target.vocab_size,
            block_size=config.block_size,
            mask_token_id=mask_token_id(config, weights.embed_tokens),
            rope_theta=target.rope_theta,
            rope_scaling=target.rope_scaling,
        )


class BlockView:
    """What all layers share: where the rows see, and the RoPE tables of context and block.

    Not a dataclass: FSDP2, which casts what a layer is given to bfloat16, looks into those, as into
    tuples, and would cast the tables.
    """

    def __init__(self, *, plan: BlockPlan, context: Tables, block: Tables) -> None:
        self.plan = plan
        self.context = context
        self.block = block


class BlockLayer(nn.Module):
    """One pre-norm decoder layer with q_norm and k_norm (Qwen 3). window: None sees all."""

    def __init__(self, shape: LayerShape, *, window: int | None) -> None:
        super().__init__()
        width, eps = shape.hidden_size, shape.rms_norm_eps
        self.window = window
        self.input_layernorm = RMSNorm(width, eps=eps)
        self.self_attn = Attention(shape, input_width=width, qk_norm=True)
        self.post_attention_layernorm = RMSNorm(width, eps=eps)
        self.mlp = SwiGLU(width, shape.intermediate_size)

    def forward(
        self, x: Tensor, context: Tensor, view: BlockView, rows: Tensor | None = None
    ) -> Tensor:
        """Residual stream [A * B, H] and ctx [C, H] -> residual stream, [A * B, H].

        rows: [P] int64, the only ones wanted: [P, H].
        """
        attn, normed = self.self_attn, self.input_layernorm(x)
        attended = block_attention(
            attn.query(normed, view.block),
            attn.key_value(context, view.context),
            attn.key_value(normed, view.block),
            view.plan,
            self.window,
        )
        if rows is not None:
            x, attended = x.index_select(0, rows), attended.index_select(0, rows)
        return self.finish(x, attended)

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """Residual stream [n, H] and attention output [n, Hq, D] -> the layer's output [n, H]."""
        x = x + self.self_attn.o_proj(attended.flatten(-2))
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class BlockBackbone(nn.Module):
    """Parameters carry the names that engines load; what belongs to the target is in buffers.

    embed_tokens, target_head: [V, H], frozen.
    """

    embed_tokens: Tensor
    target_head: Tensor

    def __init__(self, shape: BlockShape, weights: TargetWeights) -> None:
        super().__init__()
        self.block_shape = shape
        hidden, eps = shape.layer.hidden_size, shape.layer.rms_norm_eps
        self.fc = nn.Linear(shape.features_width, hidden, bias=False)
        self.hidden_norm = RMSNorm(hidden, eps=eps)
        self.layers = nn.ModuleList(BlockLayer(shape.layer, window=w) for w in shape.windows)
        self.norm = RMSNorm(hidden, eps=eps)
        self.rope = Rope(shape.layer.head_dim, theta=shape.rope_theta, scaling=shape.rope_scaling)
        self.register_buffer("embed_tokens", weights.embed_tokens.detach(), persistent=False)
        self.register_buffer("target_head", weights.lm_head.detach(), persistent=False)

    def predicted(self, features: Tensor, input_ids: Tensor, blocks: Blocks) -> Tensor:
        """Normed hidden states of `blocks.rows`, [P, H], of a batch's features [T, F], ids [T]."""
        context = self.context(features.index_select(0, blocks.context))
        view = BlockView(
            plan=blocks.attention,
            context=self.rope.tables(blocks.context_positions),
            block=self.rope.tables(blocks.positions.flatten()),
        )
        x = self.noise(input_ids.index_select(0, blocks.anchors)).flatten(0, 1)
        for layer in self.layers[:-1]:
            x = layer(x, context, view)
        return self.normed(self.layers[-1](x, context, view, blocks.rows))

    def context(self, features: Tensor) -> Tensor:
        """Features [..., F] -> the stream that gives keys and values, [..., H]."""
        out: Tensor = self.hidden_norm(self.fc(features.to(self.fc.weight.dtype)))
        return out

    def noise(self, tokens: Tensor) -> Tensor:
        """Last known tokens [A] -> the rows of their blocks, [A, B, H], in the draft's dtype."""
        shape = (tokens.shape[0], self.block_shape.block_size)
        ids = tokens.new_full(shape, self.block_shape.mask_token_id)
        ids[:, 0] = tokens
        return self.embed(ids)

    def embed(self, token_ids: Tensor) -> Tensor:
        """Target ids [...] -> [..., H], the target's embedding, in the draft's dtype."""
        return F.embedding(token_ids, self.embed_tokens).to(self.fc.weight.dtype)

    def normed(self, x: Tensor) -> Tensor:
        """The last layer's output [..., H] -> what the head multiplies, in the head's dtype."""
        out: Tensor = self.norm(x)
        return out.to(self.target_head.dtype)

    def logits(self, normed: Tensor) -> Tensor:
        """[..., H] -> [..., V], the target's head."""
        return F.linear(normed, self.target_head)
