"""The P-EAGLE draft and its loss over all depths in one pass (arXiv 2602.01469).

Row (a, 0) is EAGLE-3's: the target's features of position a beside the token at a + 1. Row (a, d),
d >= 1, has neither: the mask token and a learned vector stand in for them. Row (a, d) is scored
against the target's distribution of token u + 2, u = a + d, which the target's hidden row u + 1
gives, if the loss mask of u is 1 and the target's most likely token is in the draft's vocabulary.

Legend of shapes: T tokens of a packed batch, n rows (peagle/plan.py), P scored rows, K depths, H
hidden size, F features' width, V target vocabulary, Vd draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import cast

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
from specforge_ext.methods.peagle.config import PEagleConfig, mask_token_id
from specforge_ext.methods.peagle.plan import ChainPlan, DepthQueries, plan_chains
from specforge_ext.nn.attention import OwnKeys, split_attention
from specforge_ext.nn.layer import DraftLayer, FusedInputLayer, PlainLayer, Tables
from specforge_ext.nn.norm import RMSNorm
from specforge_ext.nn.rope import Rope
from specforge_ext.ops import DraftLoss, RowLoss, draft_loss
from specforge_ext.records import DraftVocab, TargetWeights


class PEagleDraft(nn.Module):
    """Parameters carry the names that vLLM loads; what belongs to the target is in buffers.

    mask_hidden: [1, 1, F]. target_head: [V, Ht], the target's head with the draft's tokens first.
    t2d: [V] bool; d2t: [Vd] int64 offsets.
    """

    target_head: Tensor
    t2d: Tensor
    d2t: Tensor

    def __init__(
        self, config: PEagleConfig, shape: DraftShape, weights: TargetWeights, vocab: DraftVocab
    ) -> None:
        super().__init__()
        self.config, self.shape = config, shape
        self.mask_token_id = mask_token_id(config, shape.vocab_size)
        hidden = shape.layer.hidden_size
        self.embed_tokens = nn.Embedding(shape.vocab_size, hidden)
        self.fc = nn.Linear(shape.features_width, hidden, bias=False)
        self.mask_hidden = nn.Parameter(torch.zeros(1, 1, shape.features_width))
        further = (PlainLayer(shape.layer) for _ in range(1, config.num_layers))
        self.layers = nn.ModuleList([FusedInputLayer(shape.layer), *further])
        self.norm = RMSNorm(hidden, eps=shape.layer.rms_norm_eps)
        self.lm_head = nn.Linear(hidden, shape.draft_vocab_size, bias=False)
        self.rope = Rope(shape.layer.head_dim, theta=shape.rope_theta, scaling=shape.rope_scaling)
        self.register_buffer("target_head", draft_first(weights.lm_head, vocab), persistent=False)
        self.register_buffer("t2d", vocab.t2d, persistent=False)
        self.register_buffer("d2t", vocab.d2t, persistent=False)

    @property
    def vocab(self) -> DraftVocab:
        """That of the logits."""
        return DraftVocab(t2d=self.t2d, d2t=self.d2t)

    @property
    def stack(self) -> tuple[DraftLayer, ...]:
        """The layers, first to last."""
        return tuple(cast("Iterable[DraftLayer]", self.layers))

    def forward(
        self,
        input_ids: Tensor,
        loss_mask: Tensor,
        positions: Tensor,
        aux: Tensor,
        last: Tensor,
        lengths: Sequence[int],
        chains: Sequence[Tensor],
    ) -> ScoredSums:
        """input_ids, positions [T] int64, loss_mask [T] uint8, aux [T, F], last [T, Ht] (final norm
        applied); chains: `plan.draw_chains`.
        """
        teacher = teacher_of(
            loss_mask,
            last,
            lengths,
            head=self.target_head,
            draft_vocab_size=self.shape.draft_vocab_size,
            temperature=self.config.temperature,
        )
        plan = plan_chains(
            teacher.mask,
            teacher.labelled,
            lengths,
            chains,
            compaction=self.config.compaction,
            device=aux.device,
        )
        hidden = self.backbone(plan, input_ids, positions, aux)
        return ScoredSums(self.score(plan, hidden, teacher, last), plan.labelled.to(aux.device))

    def backbone(
        self, plan: ChainPlan, input_ids: Tensor, positions: Tensor, aux: Tensor
    ) -> Tensor:
        """The last layer's output, not normed, of the rows of `plan.last_rows`."""
        context = plan.anchors[: plan.sizes[0]]
        masked = plan.anchors.numel() - plan.sizes[0]
        tokens = tokens_at(input_ids, context, 1)
        embedding = torch.cat((self.embed(tokens), self.mask_embedding().expand(masked, -1)))
        fused = self.first_hidden(aux.index_select(0, context))
        hidden = torch.cat((fused, self.mask_state().expand(masked, -1)))
        tables = self.rope.tables(positions[plan.anchors] + plan.depths)
        for layer in self.stack[:-1]:
            x = layer.inputs(embedding, hidden)
            hidden = layer.finish(hidden, _attend(layer, x, x, (tables, tables), plan, plan.every))
        layer, rows = self.stack[-1], plan.last_rows
        x = layer.inputs(embedding, hidden)
        asking = self.rope.tables(positions[plan.anchors[rows]] + plan.depths[rows])
        attended = _attend(layer, x.index_select(0, rows), x, (asking, tables), plan, plan.last)
        return layer.finish(hidden.index_select(0, rows), attended)

    def score(self, plan: ChainPlan, hidden: Tensor, teacher: Teacher, last: Tensor) -> DraftLoss:
        """hidden: of `plan.last_rows`."""
        head, teachers = self.lm_head.weight, plan.teacher_rows
        return draft_loss(
            self.norm(hidden.index_select(0, plan.order)).to(head.dtype),
            head,
            last.index_select(0, teachers + 1).to(self.target_head.dtype),
            self.target_head[: self.shape.draft_vocab_size],
            teacher.lse.index_select(0, teachers),
            loss=RowLoss("soft_ce", temperature=self.config.temperature),
            row_to_teacher=plan.row_teacher,
            row_weight=torch.ones(plan.order.numel(), device=hidden.device),
            row_step=plan.row_depth,
            num_steps=len(plan.sizes),
        )

    def embed(self, token_ids: Tensor) -> Tensor:
        """Target ids [...] -> [..., H]."""
        return F.embedding(token_ids, self.embed_tokens.weight)

    def first_hidden(self, features: Tensor) -> Tensor:
        """Features [..., F] -> the hidden state [..., H] that enters the first layer."""
        out: Tensor = self.fc(features.to(self.fc.weight.dtype))
        return out

    def stack_inputs(
        self, tokens: Tensor, hidden: Tensor, positions: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See `StackDraft`."""
        return self.embed(tokens), hidden

    def mask_embedding(self) -> Tensor:
        """[1, H]: what stands for the tokens past depth 0."""
        return self.embed_tokens.weight[self.mask_token_id][None].to(self.fc.weight.dtype)

    def mask_state(self) -> Tensor:
        """[1, H]: what stands for the fused features past depth 0."""
        return self.first_hidden(self.mask_hidden[0])

    def logits(self, hidden: Tensor) -> Tensor:
        """The last layer's output [..., H] -> [..., Vd]."""
        normed = self.norm(hidden)
        return F.linear(normed.to(self.lm_head.weight.dtype), self.lm_head.weight)


def _attend(
    layer: DraftLayer,
    asking: Tensor,
    rows: Tensor,
    tables: tuple[Tables, Tables],
    plan: ChainPlan,
    queries: tuple[DepthQueries, ...],
) -> Tensor:
    """asking: inputs of the rows that ask, by depth; rows [n, ...]: of those that are keys; tables
    of both. Returns [asking, Hq, D].
    """
    sizes = list(plan.sizes)
    keys, values = (torch.split(x, sizes) for x in layer.self_attn.key_value(rows, tables[1]))
    own = list(zip(keys[1:], values[1:], strict=True))
    asked = [depth.context.index.numel() for depth in queries]
    of_depth = torch.split(layer.self_attn.query(asking, tables[0]), asked)
    return torch.cat(
        [
            split_attention(
                query,
                (keys[0], values[0]),
                depth.context,
                [OwnKeys(k, v, r) for (k, v), r in zip(own, depth.own, strict=False)],
            )
            for query, depth in zip(of_depth, queries, strict=True)
        ]
    )
