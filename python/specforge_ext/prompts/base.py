"""What every source of prompts gives, and what it is given."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, overload

import numpy as np
import torch
from torch import Tensor

from specforge_ext.records import Prompt

Tokenizer = Any
"""A fast tokenizer of transformers (`prompts.tokenizer.open_tokenizer`)."""

Generate = Callable[[Sequence[Tensor]], list[Tensor]]
"""Prefixes ([n] int32, CPU) -> what the target says after each ([m] int32, its end token included).

The run binds an engine's `generate` to a length, a temperature and a seed.
"""


@dataclass(frozen=True)
class Skipped:
    """A text that gives no prompt. where: "file:line", as it was called when it was read."""

    where: str
    reason: str


@dataclass(frozen=True, eq=False)
class PromptSet(Sequence[Prompt]):
    """Prompts laid end to end.

    input_ids: [tokens] int32. loss_mask: [tokens] uint8. offsets: [N + 1] int64; prompt i is
    offsets[i]..offsets[i + 1]. skipped: texts that gave none. num_truncated: prompts that lost
    their end to max_length.
    """

    sample_ids: tuple[str, ...]
    input_ids: Tensor
    loss_mask: Tensor
    offsets: Tensor
    skipped: tuple[Skipped, ...] = ()
    num_truncated: int = 0

    @property
    def lengths(self) -> list[int]:
        """Tokens of each prompt."""
        lengths: list[int] = self.offsets.diff().tolist()
        return lengths

    def __len__(self) -> int:
        return len(self.sample_ids)

    @overload
    def __getitem__(self, index: int) -> Prompt: ...

    @overload
    def __getitem__(self, index: slice) -> list[Prompt]: ...

    def __getitem__(self, index: int | slice) -> Prompt | list[Prompt]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"prompt {index} of {len(self)}")
        start, end = self.offsets[index % len(self) :][:2].tolist()
        return Prompt(self.sample_ids[index], self.input_ids[start:end], self.loss_mask[start:end])


class PromptSource(Protocol):
    """A kind of prompts, made from its own config. Registered in `prompts.PROMPTS`."""

    def check(self) -> None:
        """ValueError if a file that it reads is not there; the message begins with the key."""
        ...

    def content_key(self) -> str:
        """Changes when the texts do, before the target has written anything; the same elsewhere."""
        ...

    def longest(self, *, max_new_tokens: int) -> int:
        """Most tokens of a prompt if the target writes max_new_tokens, where it writes at all."""
        ...

    def load(self, tokenizer: Tokenizer, generate: Generate | None = None) -> PromptSet:
        """All prompts, in a fixed order. ValueError where the target must write and cannot."""
        ...


def build_set(
    texts: Iterable[tuple[Sequence[int], Sequence[int]]],
    *,
    skipped: Iterable[Skipped] = (),
    num_truncated: int = 0,
) -> PromptSet:
    """A PromptSet of (ids, mask) pairs.

    A sample's id is a hash of its ids and mask; the second of equal ones gets "-1" after it, the
    third "-2", so that ids are unique and the same on every run.
    """
    ids: list[np.ndarray[Any, Any]] = []
    masks: list[np.ndarray[Any, Any]] = []
    names: list[str] = []
    seen: Counter[str] = Counter()
    for text_ids, text_mask in texts:
        ids.append(np.asarray(text_ids, dtype=np.int32))
        masks.append(np.asarray(text_mask, dtype=np.uint8))
        name = hashlib.sha256(ids[-1].tobytes() + masks[-1].tobytes()).hexdigest()[:16]
        names.append(f"{name}-{seen[name]}" if seen[name] else name)
        seen[name] += 1
    return PromptSet(
        sample_ids=tuple(names),
        input_ids=torch.from_numpy(np.concatenate([np.empty(0, np.int32), *ids])),
        loss_mask=torch.from_numpy(np.concatenate([np.empty(0, np.uint8), *masks])),
        offsets=torch.tensor([0, *map(len, ids)], dtype=torch.int64).cumsum(0),
        skipped=tuple(skipped),
        num_truncated=num_truncated,
    )


def build_training_prompts(
    prefixes: Sequence[Tensor], continuations: Sequence[Tensor]
) -> PromptSet:
    """Prompts of texts that the target wrote, in order.

    loss_mask is 1 on the tokens of the continuation, which the target wrote, and 0 on the prefix
    and on the last position of all: nothing after it is known. An empty continuation, or one of a
    single token, leaves nothing to score: such texts are named in `skipped`.
    """
    texts: list[tuple[list[int], list[int]]] = []
    skipped: list[Skipped] = []
    for index, (prefix, written) in enumerate(zip(prefixes, continuations, strict=True)):
        if len(written) < 2:
            skipped.append(Skipped(f"prefix {index}", f"the target wrote {len(written)} tokens"))
            continue
        mask = [0] * len(prefix) + [1] * (len(written) - 1) + [0]
        texts.append(([*prefix.tolist(), *written.tolist()], mask))
    return build_set(texts, skipped=skipped)
