"""The draft that any trained one has to beat: counts of token pairs.

Legend of shapes: B sequences, K depth, V vocabulary, P distinct pairs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from specforge_ext.records import Proposal


class BigramDrafter:
    """A Drafter: q(b | a) = (count(a b) + alpha * unigram(b)) / (count(a) + alpha).

    unigram(b) is (count(b) + 1) / (total + V), so every token has a chance. At temperature T it
    proposes from q ** (text_temperature / T), normalised: the counts themselves where text and
    decoding share a temperature. It takes no features. Pairs are stored sparsely; a [B, V] row is
    built where it is asked for.
    """

    def __init__(
        self,
        texts: Sequence[Tensor],
        vocab_size: int,
        *,
        alpha: float = 1.0,
        text_temperature: float = 1.0,
        device: torch.device | None = None,
    ) -> None:
        """texts: [n] integer tensors; pairs never cross from one to the next.

        alpha: weight of the unigram, in counts. text_temperature: at which the texts were sampled
        (1 for written text).
        Raises ValueError for an empty collection and for tokens outside the vocabulary.
        """
        tokens = torch.cat([t.reshape(-1).long().cpu() for t in texts]) if texts else torch.empty(0)
        if not tokens.numel():
            raise ValueError("BigramDrafter.texts: wanted at least one token, got none")
        if int(tokens.min()) < 0 or int(tokens.max()) >= vocab_size:
            raise ValueError(
                f"BigramDrafter.texts: wanted tokens in [0, {vocab_size}), "
                f"got {int(tokens.min())}..{int(tokens.max())}"
            )
        if alpha <= 0 or text_temperature <= 0:
            raise ValueError(
                "BigramDrafter: alpha and text_temperature must be positive, "
                f"got {alpha} and {text_temperature}"
            )
        device = device or torch.device("cpu")
        self.alpha = alpha
        self.text_temperature = text_temperature
        self.vocab_size = vocab_size
        unigram_V = tokens.bincount(minlength=vocab_size).double() + 1.0
        self._unigram_V = (unigram_V / unigram_V.sum()).to(device)
        firsts = torch.cat([t.reshape(-1)[:-1].long().cpu() for t in texts])
        thens = torch.cat([t.reshape(-1)[1:].long().cpu() for t in texts])
        keys_P, counts_P = torch.unique(firsts * vocab_size + thens, return_counts=True)
        self._then_P = (keys_P % vocab_size).to(device)
        self._count_P = counts_P.double().to(device)
        # Keys are sorted, so the pairs that begin with token a are a range.
        starts = torch.arange(vocab_size + 1) * vocab_size
        self._range_V1 = torch.searchsorted(keys_P, starts).to(device)
        self._last_B = torch.empty(0, dtype=torch.int64)

    def start(self, num_sequences: int, capacity: int) -> None:
        self._last_B = torch.zeros(num_sequences, dtype=torch.int64, device=self._then_P.device)

    def observe(
        self,
        next_tokens: Tensor,
        features: Mapping[str, Tensor],
        positions: Tensor,
        valid: Tensor,
    ) -> None:
        column = torch.arange(1, valid.shape[1] + 1, device=valid.device)
        latest = (valid * column).argmax(1, keepdim=True)
        said = next_tokens.gather(1, latest).squeeze(1)
        self._last_B = torch.where(valid.any(1), said, self._last_B)

    def select(self, rows: Tensor) -> None:
        self._last_B = self._last_B[rows]

    def propose(
        self, depth: int, *, temperature: float, generator: torch.Generator | None
    ) -> Proposal:
        tokens: list[Tensor] = []
        probs: list[Tensor] = []
        last = self._last_B
        for _ in range(depth):
            q_BV = self.distribution(last)
            if temperature == 0:
                last = q_BV.argmax(1)
            else:
                probs.append(self._tempered(q_BV.float(), temperature))
                last = torch.multinomial(probs[-1], 1, generator=generator).squeeze(1)
            tokens.append(last)
        return Proposal(torch.stack(tokens, 1), torch.stack(probs, 1) if probs else None)

    def _tempered(self, q_BV: Tensor, temperature: float) -> Tensor:
        exponent = self.text_temperature / temperature
        if exponent == 1.0:
            return q_BV
        raised_BV = q_BV**exponent
        return raised_BV / raised_BV.sum(1, keepdim=True)

    def distribution(self, tokens: Tensor) -> Tensor:
        """q(. | tokens[b]), [B, V] float64, at the temperature of the text."""
        begin_B, end_B = self._range_V1[tokens], self._range_V1[tokens + 1]
        sizes_B = end_B - begin_B
        row = torch.repeat_interleave(torch.arange(len(tokens), device=tokens.device), sizes_B)
        skipped = (sizes_B.cumsum(0) - sizes_B)[row]
        pair = begin_B[row] + torch.arange(len(row), device=tokens.device) - skipped
        q_BV = (self.alpha * self._unigram_V).repeat(len(tokens), 1)
        q_BV[row, self._then_P[pair]] += self._count_P[pair]
        return q_BV / q_BV.sum(1, keepdim=True)
