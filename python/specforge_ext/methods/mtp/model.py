"""The layer for multi-token prediction, applied again and again (DeepSeek-V3, arXiv 2412.19437).

Row t pairs the target's hidden state of position t, after its final norm, with the token at t + 1.
Both are normed, put side by side and projected to H; one decoder layer of the target's own kind
and a norm follow, and the target's head. Step i + 1 reads token t + 2 + i and, in place of the
target's hidden state, the normed output of step i at row t, at position t + i: what servers do. At
step i the row is scored against the target's distribution of token t + 2 + i.

Legend of shapes: T tokens of a packed batch, n_i rows of step i, L steps, H hidden size, V
vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from specforge_ext.methods._teacher import labelled_rows, tokens_at
from specforge_ext.methods._ttt_plan import TttPlan, build_plan, select
from specforge_ext.methods.mtp.config import MtpConfig
from specforge_ext.methods.mtp.forms import Form, LayerKind
from specforge_ext.methods.mtp.layer import MtpLayer
from specforge_ext.methods.mtp.objective import scorable, step_loss
from specforge_ext.nn.attention import OwnKeys, split_attention
from specforge_ext.nn.layer import LayerShape
from specforge_ext.nn.norm import RMSNorm, ZeroCentredRMSNorm
from specforge_ext.nn.rope import Rope
from specforge_ext.ops import DraftLoss
from specforge_ext.records import TargetWeights


@dataclass(frozen=True)
class MtpShape:
    """Sizes and conventions. rotary_dim: columns of a head that turn. rope_scaling: as in HF
    configs. target_layers: of the target, for the names in checkpoints.
    """

    layer: LayerShape
    kind: LayerKind
    form: Form
    vocab_size: int
    target_layers: int
    rotary_dim: int
    rope_theta: float
    rope_scaling: Mapping[str, object] | None


class MtpDraft(nn.Module):
    """What is trained are the parts of the form; embed_tokens and target_head [V, H] are the
    target's own, buffers.
    """

    embed_tokens: Tensor
    target_head: Tensor

    def __init__(self, config: MtpConfig, shape: MtpShape, weights: TargetWeights) -> None:
        super().__init__()
        self.config, self.shape = config, shape
        width, eps = shape.layer.hidden_size, shape.layer.rms_norm_eps
        norm = ZeroCentredRMSNorm if shape.form.zero_centred else RMSNorm
        self.embedding_norm = norm(width, eps=eps)
        self.hidden_norm = norm(width, eps=eps)
        self.fuse = nn.Linear(2 * width, width, bias=False)
        self.layer = MtpLayer(shape.layer, shape.kind, norm=norm)
        self.output_norm = norm(width, eps=eps)
        self.rope = Rope(shape.rotary_dim, theta=shape.rope_theta, scaling=shape.rope_scaling)
        self.register_buffer("embed_tokens", weights.embed_tokens.detach(), persistent=False)
        self.register_buffer("target_head", weights.lm_head.detach(), persistent=False)

    def forward(
        self,
        input_ids: Tensor,
        loss_mask: Tensor,
        positions: Tensor,
        last: Tensor,
        lengths: Sequence[int],
    ) -> DraftLoss:
        """input_ids, positions [T] int64, loss_mask [T] uint8, last [T, H] (final norm applied)."""
        mask = scorable(self.config, labelled_rows(loss_mask, lengths), lengths)
        plan = build_plan(
            mask,
            lengths,
            ttt_length=self.config.num_steps,
            compaction=self.config.compaction,
            device=last.device,
        )
        normed = torch.cat(self.backbone(plan, input_ids, positions, last))
        student = normed.index_select(0, plan.pair_source).to(self.target_head.dtype)
        return step_loss(self.config, student, self.target_head, plan, last, input_ids)

    def backbone(
        self, plan: TttPlan, input_ids: Tensor, positions: Tensor, last: Tensor
    ) -> list[Tensor]:
        """Each step's normed output, [n_i, H]."""
        layer, attention = self.layer, self.layer.self_attn
        step, place = plan.steps[0], positions[plan.context]
        stream = self.stream(
            tokens_at(input_ids, plan.context, 1), last.index_select(0, plan.context), place
        )
        x = layer.input_layernorm(stream)
        context = attention.key_value(x, self.rope.tables(place))
        stream, x = select(stream, step.parent), select(x, step.parent)
        query = attention.query(x, self.rope.tables(positions[step.rows]))
        out = layer.finish(stream, split_attention(query, context, step.queries, ()))
        states, own = [self.output_norm(out)], []
        for i, step in enumerate(plan.steps[1:], 1):
            place = positions[step.rows] + i
            hidden = select(states[-1], step.parent)
            stream = self.stream(tokens_at(input_ids, step.rows, 1 + i), hidden, place)
            x, tables = layer.input_layernorm(stream), self.rope.tables(place)
            own.append(attention.key_value(x, tables))
            keys = [OwnKeys(k, v, r) for (k, v), r in zip(own, step.ancestors, strict=True)]
            query = attention.query(x, tables)
            out = layer.finish(stream, split_attention(query, context, step.queries, keys))
            states.append(self.output_norm(out))
        return states

    @property
    def stack(self) -> tuple[MtpLayer]:
        """The only layer."""
        return (self.layer,)

    def first_hidden(self, features: Tensor) -> Tensor:
        """The target's hidden states [..., H] are read as they are."""
        return features

    def stack_inputs(
        self, tokens: Tensor, hidden: Tensor, positions: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See `StackDraft`. The layer reads one stream."""
        stream = self.stream(tokens, hidden, positions)
        return stream, stream

    def read_out(self, out: Tensor) -> tuple[Tensor, Tensor]:
        """See `ChainDraft`."""
        normed = self.output_norm(out)
        return self.logits(normed), normed

    def stream(self, tokens: Tensor, hidden: Tensor, positions: Tensor) -> Tensor:
        """Token ids [n], hidden states [n, H], positions [n] -> the layer's input [n, H]."""
        weight = self.fuse.weight
        embedding = F.embedding(tokens, self.embed_tokens).to(weight.dtype)
        if self.config.zero_first_embedding:
            embedding = embedding * (positions != 0)[:, None]
        parts = (self.embedding_norm(embedding), self.hidden_norm(hidden.to(weight.dtype)))
        out: Tensor = self.fuse(torch.cat(parts, dim=-1))
        return out

    def logits(self, normed: Tensor) -> Tensor:
        """Normed outputs [..., H] -> [..., V], the target's head."""
        return F.linear(normed.to(self.target_head.dtype), self.target_head)
