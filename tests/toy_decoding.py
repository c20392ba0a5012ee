"""Targets and drafts of which everything is known exactly, for the tests of decoding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from specforge_ext.engines.base import TargetOutput
from specforge_ext.records import FeatureLayout, FeatureSpec, Proposal

LAYOUT = FeatureLayout((FeatureSpec(name="aux", layer_ids=(0, 1), width=2, dtype="float32"),))
"""Feature of a token in `TableTarget`: (the token, its position)."""


class TableTarget:
    """Logits are looked up by the token, and a checksum of its position and of all it sees.

    table: [M, V, V]. With M > 1 a column that should have been dropped, or a wrong position,
    changes what follows; with M = 1 it is a Markov chain.
    """

    def __init__(self, table: Tensor) -> None:
        self.table = table
        self.columns = 0

    def start(self, num_sequences: int, layout: FeatureLayout) -> None:
        self.layout = layout
        self.seen = torch.zeros(num_sequences, dtype=torch.int64)
        self.last = torch.zeros(num_sequences, 0, dtype=torch.int64)

    def forward(self, input_ids: Tensor, positions: Tensor, valid: Tensor) -> TargetOutput:
        self.columns += input_ids.shape[1]
        self.last = (input_ids + 1) * valid
        before = self.seen[:, None] + self.last.cumsum(1) - self.last
        context = (before + input_ids + 1 + positions) % len(self.table)
        self.seen = self.seen + self.last.sum(1)
        features = {
            spec.name: torch.stack([input_ids, positions], 2).float()
            for spec in self.layout.features
        }
        return TargetOutput(self.table[context, input_ids], features)

    def drop(self, keep: Tensor) -> None:
        self.seen = self.seen - (self.last * ~keep).sum(1)

    def select(self, rows: Tensor) -> None:
        self.seen, self.last = self.seen[rows], self.last[rows]

    def greedy(self, prompt: Sequence[int], max_new: int, eos: Sequence[int] = ()) -> list[int]:
        """The definition: one token at a time, no cache, no batch."""
        text = list(prompt)
        for _ in range(max_new):
            checksum = sum(token + 1 for token in text) + len(text) - 1
            text.append(int(self.table[checksum % len(self.table), text[-1]].argmax()))
            if text[-1] in eos:
                break
        return text[len(prompt) :]


class TableDrafter:
    """Proposes from q[k, last token] at depth k, [K, V, V]; keeps what it observed, by sequence."""

    def __init__(self, q: Tensor) -> None:
        self.q = q

    def start(self, num_sequences: int, capacity: int) -> None:
        self.capacity = capacity
        self.given = 0
        self.here = list(range(num_sequences))
        self.rows: list[list[tuple[int, int, list[float]]]] = [[] for _ in range(num_sequences)]
        self.last = torch.zeros(num_sequences, dtype=torch.int64)

    def observe(
        self,
        next_tokens: Tensor,
        features: Mapping[str, Tensor],
        positions: Tensor,
        valid: Tensor,
    ) -> None:
        self.given += valid.shape[1]
        for column in range(valid.shape[1]):
            self.last = torch.where(valid[:, column], next_tokens[:, column], self.last)
        self.record(next_tokens, features, positions, valid)

    def record(
        self, next_tokens: Tensor, features: Mapping[str, Tensor], positions: Tensor, valid: Tensor
    ) -> None:
        for b, column in valid.nonzero().tolist():
            feature = [float(x) for f in features.values() for x in f[b, column]]
            row = (int(positions[b, column]), int(next_tokens[b, column]), feature)
            self.rows[self.here[b]].append(row)

    def select(self, rows: Tensor) -> None:
        self.here = [self.here[row] for row in rows.tolist()]
        self.last = self.last[rows]

    def propose(
        self, depth: int, *, temperature: float, generator: torch.Generator | None
    ) -> Proposal:
        tokens, probs, last = [], [], self.last
        for k in range(depth):
            q = self.q[k % len(self.q)][last]
            if temperature > 0:
                last = torch.multinomial(q, 1, generator=generator).squeeze(1)
            else:
                last = q.argmax(1)
            tokens.append(last)
            probs.append(q)
        sampled = torch.stack(probs, 1).float() if temperature > 0 else None
        return Proposal(torch.stack(tokens, 1), sampled)


class QuietTableDrafter(TableDrafter):
    """Without the record, for many thousands of sequences."""

    def record(
        self, next_tokens: Tensor, features: Mapping[str, Tensor], positions: Tensor, valid: Tensor
    ) -> None:
        pass


def random_table(contexts: int, vocab: int, seed: int, scale: float = 2.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(contexts, vocab, vocab, generator=generator) * scale


def half_right(table: Tensor, seed: int) -> Tensor:
    """[4, V, V]: the target's answers averaged over contexts, a quarter of them random."""
    generator = torch.Generator().manual_seed(seed)
    shape = (4, *table.shape[1:])
    noise = torch.randn(shape, generator=generator)
    random = torch.rand(*shape[:2], 1, generator=generator) < 0.25
    return torch.where(random, noise, table.mean(0)).softmax(2)


def ragged_prompts(count: int, vocab: int, seed: int, longest: int = 9) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(1, longest + 1, (count,), generator=generator).tolist()
    return [torch.randint(vocab, (n,), generator=generator, dtype=torch.int32) for n in sizes]
