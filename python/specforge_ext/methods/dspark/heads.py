"""The two heads of DSpark (arXiv 2607.05147) over a block's hidden states.

Legend of shapes: P predicted rows, A blocks, B rows of a block, S sequences, H hidden size, E rank,
V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from specforge_ext.methods._block.plan import Blocks
from specforge_ext.methods.dspark.config import MarkovKind


class MarkovHead(nn.Module):
    """From the token before to a correction of the logits, markov_w2 latent. Parameters carry the
    names that engines load.
    """

    def __init__(self, kind: MarkovKind, *, vocab_size: int, hidden_size: int, rank: int) -> None:
        super().__init__()
        self.kind = kind
        self.rank = rank
        self.markov_w1 = nn.Embedding(vocab_size, rank)
        self.markov_w2 = nn.Linear(rank, vocab_size, bias=False)
        if kind == "gated":
            self.gate_proj = nn.Linear(hidden_size + rank, rank)
        elif kind == "rnn":
            self.joint_proj = nn.Linear(2 * rank + hidden_size, 3 * rank)

    def embed(self, previous: Tensor) -> Tensor:
        """Token ids [...] -> [..., E]."""
        out: Tensor = self.markov_w1(previous)
        return out

    def first_state(self, num_sequences: int) -> Tensor:
        """[S, E] float32, that of the slot before a block."""
        weight = self.markov_w1.weight
        return weight.new_zeros((num_sequences, self.rank), dtype=torch.float32)

    def step(self, hidden: Tensor, embedding: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """One slot: hidden [S, H], embedding and state [S, E] -> latent and next state [S, E]."""
        if self.kind == "rnn":
            raw = F.linear(state.to(embedding.dtype), self._recurrent)
            return _advance(state, self._own(hidden, embedding) + raw.float())
        return self._rowwise(hidden, embedding), state

    def latents(self, hidden: Tensor, embedding: Tensor, blocks: Blocks) -> Tensor:
        """All rows at once: hidden [P, H], embedding [P, E] of `blocks.rows` -> [P, E].

        A block's rows are its first slots, without a gap: a state goes from one to the next.
        """
        if self.kind != "rnn":
            return self._rowwise(hidden, embedding)
        own = self._own(hidden, embedding)
        by_slot = own.new_zeros((blocks.supervised.numel(), own.shape[1]))
        by_slot = by_slot.index_copy(0, blocks.rows, own)
        state, latents = self.first_state(blocks.num_blocks), []
        for slot in by_slot.view(*blocks.supervised.shape, own.shape[1]).unbind(1):
            raw = F.linear(state.to(embedding.dtype), self._recurrent)
            latent, state = _advance(state, slot + raw.float())
            latents.append(latent)
        return torch.stack(latents, 1).flatten(0, 1).index_select(0, blocks.rows)

    def _rowwise(self, hidden: Tensor, embedding: Tensor) -> Tensor:
        if self.kind == "vanilla":
            return embedding
        gate: Tensor = self.gate_proj(torch.cat((hidden.to(embedding.dtype), embedding), -1))
        return torch.sigmoid(gate).to(embedding.dtype) * embedding

    @property
    def _recurrent(self) -> Tensor:
        """[3 E, E], the columns of joint_proj that read the state."""
        return self.joint_proj.weight[:, : self.rank]

    def _own(self, hidden: Tensor, embedding: Tensor) -> Tensor:
        """[..., 3 E] float32: what joint_proj makes of a row without the state."""
        row = torch.cat((embedding, hidden.to(embedding.dtype)), -1)
        return F.linear(row, self.joint_proj.weight[:, self.rank :], self.joint_proj.bias).float()


def _advance(state: Tensor, raw: Tensor) -> tuple[Tensor, Tensor]:
    """State [.., E] and raw [.., 3 E] (gate, candidate, output) -> latent and next state."""
    gate, candidate, output = raw.chunk(3, -1)
    gate = torch.sigmoid(gate)
    return torch.tanh(output), gate * state + (1 - gate) * torch.tanh(candidate)


class ConfidenceHead(nn.Module):
    """How likely the target accepts what a slot proposes. It reads the token before, not the one
    proposed: only therefore may decoding stop by it and stay exact.
    """

    def __init__(self, *, hidden_size: int, rank: int) -> None:
        super().__init__()
        self.proj = nn.Linear(hidden_size + rank, 1)

    def forward(self, hidden: Tensor, embedding: Tensor) -> Tensor:
        """hidden [..., H], embedding of the token before [..., E] -> logits [...] float32."""
        row = torch.cat((hidden.to(embedding.dtype), embedding), -1)
        out: Tensor = self.proj(row)
        return out.squeeze(-1).float()
