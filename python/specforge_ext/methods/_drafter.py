"""What drafters share: the rows that they were given, what they draw, and chains of steps.

Legend of shapes: B sequences, n new columns, r valid rows among them, F features' width, H hidden
size, V / Vd vocabularies of target and draft, K tokens of a proposal.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from specforge_ext.nn.layer import DraftLayer
from specforge_ext.nn.rope import Rope
from specforge_ext.nn.stack_cache import StackCache
from specforge_ext.records import DraftVocab, Proposal


def draw_tokens(
    logits: Tensor,
    *,
    temperature: float,
    generator: torch.Generator | None,
    vocab: DraftVocab | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Tokens [...] of logits [..., Vd], target ids, and the float32 distributions [..., V] behind
    them, None if greedy.

    vocab: of the logits; None: the target's own, Vd = V. ValueError if the temperature is negative.
    """
    check_temperature(temperature)
    if temperature == 0:
        choice, probs = logits.argmax(-1), None
    else:
        probs = torch.softmax(logits.float() / temperature, dim=-1)
        flat = torch.multinomial(probs.flatten(0, -2), 1, generator=generator)
        choice = flat.view(probs.shape[:-1])
    if vocab is None:
        return choice, probs
    if probs is not None:
        wide = probs.new_zeros(*probs.shape[:-1], vocab.t2d.numel())
        probs = wide.index_copy_(-1, vocab.target_ids, probs)
    return choice + vocab.d2t[choice], probs


@dataclass(frozen=True)
class NewRows:
    """The valid ones of new columns, sequence by sequence, in order; [r] int64 each.

    sequences, columns: where they stand. tokens, positions: of the rows. last: [r] bool, the last
    one of each sequence.
    """

    sequences: Tensor
    columns: Tensor
    tokens: Tensor
    positions: Tensor
    last: Tensor

    @classmethod
    def of(cls, next_tokens: Tensor, positions: Tensor, valid: Tensor) -> NewRows:
        """As `Drafter.observe` is given them, [B, n]."""
        rows, columns = valid.nonzero(as_tuple=True)
        last = rows != torch.cat((rows[1:], rows.new_full((1,), -1)))[: rows.numel()]
        return cls(rows, columns, next_tokens[rows, columns], positions[rows, columns], last)


def check_temperature(temperature: float) -> None:
    """ValueError if it is negative."""
    if temperature < 0:
        raise ValueError(f"temperature: wanted 0 or more, got {temperature}")


def check_room(name: str, *, capacity: int, num_columns: int) -> None:
    """name: of the method. ValueError if there are more columns than `start` made room for."""
    if num_columns > capacity:
        raise ValueError(
            f"{name} drafter: wanted at most {capacity} columns, "
            f"the capacity given to start, got {num_columns}"
        )


def check_seen(name: str, used: Tensor) -> None:
    """used: [B, columns] bool. ValueError if a sequence has no row."""
    empty = (~used.any(1)).nonzero()[:, 0].tolist()
    if empty:
        raise ValueError(f"{name} drafter: sequences {empty} have no row to look ahead from")


def check_depth(name: str, depth: int, *, most: int, what: str) -> None:
    """what: that the limit is. ValueError if the draft cannot propose so many tokens."""
    if not 0 <= depth <= most:
        raise ValueError(f"{name} drafter: depth: wanted 0..{most} ({what}), got {depth}")


class StackDraft(Protocol):
    """A draft whose rows go through a stack of layers: a token beside a hidden state."""

    rope: Rope

    @property
    def stack(self) -> Sequence[DraftLayer]:
        """The layers, first to last."""
        ...

    def first_hidden(self, features: Tensor) -> Tensor:
        """The target's features [r, F] -> the hidden state beside the token, [r, H]."""
        ...

    def stack_inputs(
        self, tokens: Tensor, hidden: Tensor, positions: Tensor
    ) -> tuple[Tensor, Tensor]:
        """tokens, positions [r] int64, hidden [r, H] -> what `StackCache.add` runs."""
        ...


class ChainDraft(StackDraft, Protocol):
    """And whose output is the hidden state of the next step."""

    def read_out(self, out: Tensor) -> tuple[Tensor, Tensor]:
        """The last layer's output [B, H] -> logits [B, Vd] and the next hidden state [B, H]."""
        ...


@dataclass
class LastRows:
    """hidden [B, H], token [B], position [B]: the input of each sequence's last row."""

    cache: StackCache
    hidden: Tensor
    token: Tensor
    position: Tensor


class StackDecoding:
    """The part of `methods.base.Drafter` that such drafts share: all but `propose`.

    Rejected columns stay in the cache as holes.
    """

    def __init__(
        self, draft: StackDraft, *, name: str, feature: str, vocab: DraftVocab | None = None
    ) -> None:
        """name: of the method, for errors. feature: that the rows are made of. vocab: the draft's,
        None for the target's.
        """
        self._stack_draft = draft
        self._name, self._feature, self._vocab = name, feature, vocab
        self._rows: LastRows | None = None

    @torch.no_grad()
    def start(self, num_sequences: int, capacity: int) -> None:
        """Forget everything; make room for `capacity` columns a sequence."""
        stack = self._stack_draft.stack
        weight = stack[0].self_attn.o_proj.weight
        integers = torch.zeros(num_sequences, dtype=torch.int64, device=weight.device)
        self._rows = LastRows(
            cache=StackCache(stack, num_sequences, capacity),
            hidden=weight.new_zeros(num_sequences, weight.shape[0]),
            token=integers,
            position=integers.clone(),
        )

    @torch.no_grad()
    def observe(
        self,
        next_tokens: Tensor,
        features: Mapping[str, Tensor],
        positions: Tensor,
        valid: Tensor,
    ) -> None:
        """next_tokens, positions [B, n] int64, features[`feature`] [B, n, F], valid [B, n] bool.

        ValueError when the columns do not fit. What stands in columns that are not valid is not
        used.
        """
        rows, draft = self._started(), self._stack_draft
        check_room(
            self._name,
            capacity=rows.cache.used.shape[1],
            num_columns=rows.cache.num_columns + valid.shape[1],
        )
        new = NewRows.of(next_tokens, positions, valid)
        hidden = draft.first_hidden(features[self._feature][new.sequences, new.columns])
        embedding, stream = draft.stack_inputs(new.tokens, hidden, new.positions)
        rows.cache.add(valid, embedding, stream, draft.rope.tables(new.positions))
        sequences = new.sequences[new.last]
        rows.hidden[sequences] = hidden[new.last].to(rows.hidden.dtype)
        rows.token[sequences] = new.tokens[new.last]
        rows.position[sequences] = new.positions[new.last]

    def select(self, rows: Tensor) -> None:
        """Keep these sequences, [R] int64; the others are forgotten."""
        last = self._started()
        last.cache.select(rows)
        last.hidden, last.token = last.hidden[rows], last.token[rows]
        last.position = last.position[rows]

    def last_rows(self) -> LastRows:
        """ValueError if a sequence has no row."""
        rows = self._started()
        check_seen(self._name, rows.cache.used)
        return rows

    def _started(self) -> LastRows:
        if self._rows is None:
            raise ValueError(f"{self._name} drafter: wanted start() first")
        return self._rows


class ChainDrafter(StackDecoding):
    """`methods.base.Drafter`: a token after the other, the same computation as in training."""

    def __init__(
        self, draft: ChainDraft, *, name: str, feature: str, vocab: DraftVocab | None = None
    ) -> None:
        super().__init__(draft, name=name, feature=feature, vocab=vocab)
        self._draft = draft

    @torch.no_grad()
    def propose(
        self, depth: int, *, temperature: float, generator: torch.Generator | None
    ) -> Proposal:
        """`depth` tokens a sequence. ValueError if a sequence has no row, or temperature < 0."""
        check_temperature(temperature)
        rows = self.last_rows()
        chain = _Chain(self._draft, rows)
        token, tokens, probs = rows.token, [rows.token[:, None][:, :0]], []
        for _ in range(depth):
            token, drawn_from = draw_tokens(
                chain.step(token),
                temperature=temperature,
                generator=generator,
                vocab=self._vocab,
            )
            tokens.append(token[:, None])
            if drawn_from is not None:
                probs.append(drawn_from)
        return Proposal(torch.cat(tokens, 1), torch.stack(probs, 1) if probs else None)

    @torch.no_grad()
    def logits_along(self, tokens: Tensor) -> Tensor:
        """Draft logits [B, K, Vd] of the look-ahead whose first K - 1 tokens [B, K - 1] are
        given.
        """
        rows = self.last_rows()
        chain = _Chain(self._draft, rows)
        return torch.stack([chain.step(token) for token in (rows.token, *tokens.unbind(1))], 1)


class _Chain:
    """The last row of each sequence, step by step; its own keys vanish with it."""

    def __init__(self, draft: ChainDraft, rows: LastRows) -> None:
        self._draft = draft
        self._look = rows.cache.look_ahead()
        self._hidden, self._position = rows.hidden, rows.position
        self._steps = 0

    def step(self, token: Tensor) -> Tensor:
        """Draft logits [B, Vd] of the row whose next input token [B] is given."""
        place = self._position + self._steps
        embedding, stream = self._draft.stack_inputs(token, self._hidden, place)
        tables = self._draft.rope.tables(place)
        # The last row itself has its keys in the cache, those after it have not.
        num_cached = 0 if self._steps else 1
        out = self._look.run(embedding, stream, tables, num_cached=num_cached)
        logits, self._hidden = self._draft.read_out(out)
        self._steps += 1
        return logits
