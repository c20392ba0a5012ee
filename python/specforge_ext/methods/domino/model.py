"""The Domino draft (arXiv 2605.29707): DFlash's backbone, and a correction of what it says.

A recurrent state reads the tokens of a block so far; with a row's hidden state it gives E numbers,
which a [V, E] matrix turns into what is added to the row's logits.

Legend of shapes: T tokens of a packed batch, A blocks, L tokens read of each, P predicted rows, H
hidden size, G width of the state, E of the correction, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from specforge_ext.methods._block.model import BlockBackbone, BlockShape
from specforge_ext.methods._block.plan import Blocks
from specforge_ext.methods.domino.plan import Corrections
from specforge_ext.ops import corrected_label_loss, label_loss
from specforge_ext.records import TargetWeights


@dataclass(frozen=True)
class DominoShape:
    """gru_hidden_dim: G. emb_dim: E."""

    gru_hidden_dim: int
    emb_dim: int


@dataclass(frozen=True)
class DominoLoss:
    """loss_sum: [], differentiable. Of the predicted rows, [P], detached: loss and base_loss,
    nats, not weighted, and correct and base_correct, bool, of the final and the base logits.
    """

    loss_sum: Tensor
    loss: Tensor
    correct: Tensor
    base_loss: Tensor
    base_correct: Tensor


class PrefixGru(nn.Module):
    """torch.nn.GRU without biases, under its names, one token at a time."""

    def __init__(self, width: int, state_width: int) -> None:
        super().__init__()
        self.weight_ih_l0 = nn.Parameter(torch.empty(3 * state_width, width))
        self.weight_hh_l0 = nn.Parameter(torch.empty(3 * state_width, state_width))

    def gates(self, x: Tensor) -> Tensor:
        """What tokens' embeddings [..., H] say, whatever came before: [..., 3 G]."""
        return F.linear(x, self.weight_ih_l0)

    def initial(self, count: int) -> Tensor:
        """[count, G], zeros."""
        return self.weight_hh_l0.new_zeros(count, self.weight_hh_l0.shape[1])

    def advance(self, gates: Tensor, state: Tensor) -> Tensor:
        """[..., 3 G] and state [..., G] -> the next state. Gates: reset, update, new."""
        read_r, read_z, read_n = gates.chunk(3, -1)
        kept_r, kept_z, kept_n = F.linear(state, self.weight_hh_l0).chunk(3, -1)
        update = torch.sigmoid(read_z + kept_z)
        new = torch.tanh(read_n + torch.sigmoid(read_r + kept_r) * kept_n)
        return new + update * (state - new)


class DominoDraft(BlockBackbone):
    """Parameters carry the names that engines load."""

    def __init__(self, shape: BlockShape, own: DominoShape, weights: TargetWeights) -> None:
        super().__init__(shape, weights)
        hidden = shape.layer.hidden_size
        self.own_shape = own
        self.prefix_gru = PrefixGru(hidden, own.gru_hidden_dim)
        self.embed_proj = nn.Sequential(
            nn.Linear(hidden + own.gru_hidden_dim, own.emb_dim, bias=False),
            nn.SiLU(),
            nn.Linear(own.emb_dim, shape.vocab_size, bias=False),
        )

    @property
    def project(self) -> Tensor:
        """[E, H + G], the first matrix of `embed_proj`."""
        return cast("nn.Linear", self.embed_proj[0]).weight

    @property
    def correct(self) -> Tensor:
        """[V, E], its last matrix."""
        return cast("nn.Linear", self.embed_proj[2]).weight

    def forward(
        self, features: Tensor, input_ids: Tensor, blocks: Blocks, own: Corrections
    ) -> DominoLoss:
        """Losses of `blocks.rows`. features [T, F], input_ids [T] int64."""
        hidden = self.predicted(features, input_ids, blocks)
        places = blocks.labels.flatten().index_select(0, blocks.rows)
        labels = input_ids.index_select(0, places).int()
        states = self.prefix_states(input_ids, blocks.anchors, own.num_tokens)

        plain = label_loss(
            hidden.index_select(0, own.plain),
            self.target_head,
            labels.index_select(0, own.plain),
        )
        corrected_hidden = hidden.index_select(0, own.corrected)
        act = self.activation(corrected_hidden, states.flatten(0, 1).index_select(0, own.states))
        corrected = corrected_label_loss(
            corrected_hidden,
            self.target_head,
            act.to(hidden.dtype),
            self.correct.to(hidden.dtype),
            labels.index_select(0, own.corrected),
            own.weight.index_select(0, own.corrected),
            base_share=own.base_share,
        )

        def together(of_plain: Tensor, of_corrected: Tensor) -> Tensor:
            out = of_plain.new_empty(labels.shape)
            out[own.plain] = of_plain.detach()
            out[own.corrected] = of_corrected
            return out

        plain_weight = own.weight.index_select(0, own.plain)
        return DominoLoss(
            loss_sum=(plain_weight * plain.loss).sum() + corrected.loss_sum,
            loss=together(plain.loss, corrected.loss),
            correct=together(plain.correct, corrected.correct),
            base_loss=together(plain.loss, corrected.base_loss),
            base_correct=together(plain.correct, corrected.base_correct),
        )

    def prefix_states(self, input_ids: Tensor, anchors: Tensor, num_tokens: int) -> Tensor:
        """[A, L, G]: after the j + 1 tokens from each anchor on. Of ids [T], anchors [A] int64.

        Past the batch's end the last token is read again; no row that has a label sees that.
        """
        gru = self.prefix_gru
        places = anchors[:, None] + torch.arange(num_tokens, device=anchors.device)
        places = places.clamp_max(input_ids.numel() - 1)
        if places.numel() > input_ids.numel():  # blocks overlap: what a token says, once
            gates = F.embedding(places, gru.gates(self.embed(input_ids)))
        else:
            gates = gru.gates(self.embed(input_ids[places]))
        state, states = gru.initial(len(anchors)), []
        for j in range(num_tokens):
            state = gru.advance(gates[:, j], state)
            states.append(state)
        return torch.stack(states, 1)

    def activation(self, normed: Tensor, states: Tensor) -> Tensor:
        """Normed hidden states [..., H] and states [..., G] -> [..., E], what is corrected by."""
        both = torch.cat((normed.to(self.project.dtype), states.to(self.project.dtype)), -1)
        return F.silu(F.linear(both, self.project))

    def corrected(self, logits: Tensor, normed: Tensor, states: Tensor) -> Tensor:
        """Base logits [..., V] of normed hidden states [..., H] -> final ones, float32."""
        correction = F.linear(self.activation(normed, states), self.correct)
        return logits.float() + correction.float()
