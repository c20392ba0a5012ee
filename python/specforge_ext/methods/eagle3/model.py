"""The EAGLE-3 draft and its loss over all steps of training-time test (arXiv 2503.01840, section
3).

Row t pairs the target's features of position t with the token at t + 1. At step i it sees token t +
1 + i and the hidden state that step i - 1 left at row t, and is scored against the target's
distribution of token t + 2 + i, which the target's hidden row u + 1, u = t + i, gives; u counts if
its loss mask is 1 and the target's most likely token is in the draft's vocabulary.

Legend of shapes: T tokens of a packed batch, C context rows, n_i rows of step i, L steps, H hidden
size, F features' width, V target vocabulary, Vd draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from specforge_ext.methods._fused.shape import DraftShape
from specforge_ext.methods._teacher import (
    ScoredSums,
    Teacher,
    draft_first,
    teacher_of,
    tokens_at,
)
from specforge_ext.methods._ttt_plan import TttPlan, build_plan, labelled_per_step, select
from specforge_ext.methods.eagle3.config import Eagle3Config
from specforge_ext.methods.eagle3.objective import ScoredRows, step_loss
from specforge_ext.nn.attention import OwnKeys, split_attention
from specforge_ext.nn.layer import DraftLayer, FusedInputLayer, PlainLayer
from specforge_ext.nn.norm import RMSNorm
from specforge_ext.nn.rope import Rope
from specforge_ext.ops import DraftLoss
from specforge_ext.records import DraftVocab, TargetWeights


class FeatureNorm(nn.ModuleList):
    """An RMSNorm of its own for the features of each captured layer (EAGLE-3.1, 2605.09992)."""

    def __init__(self, shape: DraftShape) -> None:
        eps = shape.layer.rms_norm_eps
        widths = [shape.features_width // shape.num_features] * shape.num_features
        super().__init__(RMSNorm(width, eps=eps) for width in widths)

    def forward(self, aux: Tensor) -> Tensor:
        """[..., F] -> [..., F]."""
        chunks = aux.chunk(len(self), dim=-1)
        return torch.cat([norm(chunk) for norm, chunk in zip(self, chunks, strict=True)], dim=-1)


class _LayerKeys(NamedTuple):
    """What a layer's rows attend to: step-0 keys and values, and those of each later step."""

    context: tuple[Tensor, Tensor]
    own: list[tuple[Tensor, Tensor]]


class Eagle3Draft(nn.Module):
    """Parameters carry the names that engines load; what belongs to the target is in buffers.

    embed_tokens: [V, H]. target_head: [V, Ht], the target's head with the draft's tokens first, so
    that the teacher's logits over the draft's vocabulary are a slice. t2d: [V] bool; d2t: [Vd]
    int64 offsets.
    """

    embed_tokens: Tensor
    target_head: Tensor
    t2d: Tensor
    d2t: Tensor

    def __init__(
        self, config: Eagle3Config, shape: DraftShape, weights: TargetWeights, vocab: DraftVocab
    ) -> None:
        super().__init__()
        self.config, self.shape = config, shape
        hidden = shape.layer.hidden_size
        self.fc_norm = FeatureNorm(shape) if config.fc_norm else None
        self.fc = nn.Linear(shape.features_width, hidden, bias=False)
        self.midlayer = FusedInputLayer(shape.layer)
        # Named as vLLM numbers them: the first layer is `midlayer`, alias `layers.0`.
        self.layers = nn.ModuleDict(
            {str(i): PlainLayer(shape.layer) for i in range(1, config.num_layers)}
        )
        self.norm = RMSNorm(hidden, eps=shape.layer.rms_norm_eps)
        self.lm_head = nn.Linear(hidden, shape.draft_vocab_size, bias=False)
        self.rope = Rope(shape.layer.head_dim, theta=shape.rope_theta, scaling=shape.rope_scaling)
        self.register_buffer("embed_tokens", weights.embed_tokens.detach(), persistent=False)
        self.register_buffer("target_head", draft_first(weights.lm_head, vocab), persistent=False)
        self.register_buffer("t2d", vocab.t2d, persistent=False)
        self.register_buffer("d2t", vocab.d2t, persistent=False)

    def forward(
        self,
        input_ids: Tensor,
        loss_mask: Tensor,
        positions: Tensor,
        aux: Tensor,
        last: Tensor,
        lengths: Sequence[int],
    ) -> ScoredSums:
        """input_ids, positions [T] int64, loss_mask [T] uint8, aux [T, F], last [T, Ht] (final norm
        applied).
        """
        teacher = self.teacher(loss_mask, last, lengths)
        plan = build_plan(
            teacher.mask,
            lengths,
            ttt_length=self.config.ttt_length,
            compaction=self.config.compaction,
            device=aux.device,
        )
        hidden = self.backbone(plan, input_ids, positions, aux)
        loss = self.score(plan, torch.cat(hidden), teacher, last, lengths)
        labelled = labelled_per_step(teacher.labelled, lengths, self.config.ttt_length)
        return ScoredSums(loss, labelled.to(aux.device))

    def teacher(self, loss_mask: Tensor, last: Tensor, lengths: Sequence[int]) -> Teacher:
        """Reads `last` only where the loss mask of the position before is 1."""
        return teacher_of(
            loss_mask,
            last,
            lengths,
            head=self.target_head,
            draft_vocab_size=self.shape.draft_vocab_size,
            temperature=self.config.temperature,
        )

    @property
    def vocab(self) -> DraftVocab:
        """That of the logits."""
        return DraftVocab(t2d=self.t2d, d2t=self.d2t)

    @property
    def stack(self) -> tuple[DraftLayer, ...]:
        """The layers, first to last."""
        return self.midlayer, *cast("Iterable[PlainLayer]", self.layers.values())

    def backbone(
        self, plan: TttPlan, input_ids: Tensor, positions: Tensor, aux: Tensor
    ) -> list[Tensor]:
        """The last layer's output at each step, [n_i, H], not normed."""
        hidden, keys = self._first_step(plan, input_ids, positions, aux)
        states = [hidden]
        for i, step in enumerate(plan.steps[1:], 1):
            hidden = select(self.carry(hidden), step.parent)
            embedding = self.embed(tokens_at(input_ids, step.rows, 1 + i))
            tables = self.rope.tables(positions[step.rows] + i)
            for layer, (context, own) in zip(self.stack, keys, strict=True):
                x = layer.inputs(embedding, hidden)
                own.append(layer.self_attn.key_value(x, tables))
                own_keys = [OwnKeys(k, v, r) for (k, v), r in zip(own, step.ancestors, strict=True)]
                query = layer.self_attn.query(x, tables)
                attended = split_attention(query, context, step.queries, own_keys)
                hidden = layer.finish(hidden, attended)
            states.append(hidden)
        return states

    def _first_step(
        self, plan: TttPlan, input_ids: Tensor, positions: Tensor, aux: Tensor
    ) -> tuple[Tensor, list[_LayerKeys]]:
        """Every context row but in the last layer, there the step's rows. Output [n_0, H]."""
        step = plan.steps[0]
        hidden = self.first_hidden(aux.index_select(0, plan.context))
        embedding = self.embed(tokens_at(input_ids, plan.context, 1))
        tables = self.rope.tables(positions[plan.context])
        keys: list[_LayerKeys] = []
        for layer in self.stack:
            x = layer.inputs(embedding, hidden)
            keys.append(_LayerKeys(layer.self_attn.key_value(x, tables), []))
            queries = plan.whole
            if layer is self.stack[-1]:
                hidden, x, queries = (
                    select(hidden, step.parent), select(x, step.parent), step.queries
                )  # fmt: skip
                tables = self.rope.tables(positions[step.rows])
            query = layer.self_attn.query(x, tables)
            hidden = layer.finish(hidden, split_attention(query, keys[-1].context, queries, ()))
        return hidden, keys

    def score(
        self,
        plan: TttPlan,
        hidden: Tensor,
        teacher: Teacher,
        last: Tensor,
        lengths: Sequence[int],
    ) -> DraftLoss:
        """hidden: the rows of all steps end to end, [sum n_i, H]."""
        head, teachers = self.lm_head.weight, plan.teacher_rows
        rows = ScoredRows(
            student=self.norm(hidden.index_select(0, plan.pair_source)).to(head.dtype),
            head=head,
            teacher_hidden=last.index_select(0, teachers + 1).to(self.target_head.dtype),
            teacher_head=self.target_head[: self.shape.draft_vocab_size],
            teacher_lse=teacher.lse.index_select(0, teachers),
        )
        return step_loss(self.config, rows, plan, lengths)

    def embed(self, token_ids: Tensor) -> Tensor:
        """Target ids [...] -> [..., H], the target's embedding, in the draft's dtype."""
        return F.embedding(token_ids, self.embed_tokens).to(self.fc.weight.dtype)

    def first_hidden(self, features: Tensor) -> Tensor:
        """Features [..., F] -> the first hidden state [..., H]."""
        aux = features.to(self.fc.weight.dtype)
        out: Tensor = self.fc(aux if self.fc_norm is None else self.fc_norm(aux))
        return out

    def stack_inputs(
        self, tokens: Tensor, hidden: Tensor, positions: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See `StackDraft`."""
        return self.embed(tokens), hidden

    def carry(self, hidden: Tensor) -> Tensor:
        """A step's output [..., H] as the next step's input."""
        return self.norm(hidden) if self.config.norm_output else hidden

    def read_out(self, out: Tensor) -> tuple[Tensor, Tensor]:
        """See `ChainDraft`."""
        return self.logits(out), self.carry(out)

    def logits(self, hidden: Tensor) -> Tensor:
        """Un-normed hidden states [..., H] -> [..., Vd]."""
        normed = self.norm(hidden)
        return F.linear(normed.to(self.lm_head.weight.dtype), self.lm_head.weight)
