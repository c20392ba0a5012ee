"""Batched generation over a ColumnModel: ragged prefixes, seeded sampling, early ends."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from specforge_ext.engines.columns import ColumnModel, Visibility

CHECK_ENDS_EVERY = 8
"""Steps between looks at which rows have ended: a look waits for the device."""


def noise(prefixes: Sequence[Tensor], num_tokens: int, seed: int) -> Tensor:
    """[len(prefixes), num_tokens] float64, uniform in [0, 1), CPU.

    A row is a pure function of (seed, its prefix, how many equal prefixes came before it), so that
    neither the order nor the company of a prefix changes what it draws.
    """
    seen: Counter[bytes] = Counter()
    out = np.empty((len(prefixes), num_tokens))
    for row, prefix in enumerate(prefixes):
        content = prefix.to(torch.int64).numpy().tobytes()
        text = f"{seed}:{seen[content]}:".encode() + content
        seen[content] += 1
        key = np.frombuffer(hashlib.sha256(text).digest()[:16], dtype=np.uint64)
        out[row] = np.random.Generator(np.random.Philox(key=key)).random(num_tokens)
    return torch.from_numpy(out)


def choose(logits: Tensor, temperature: float, uniform: Tensor) -> Tensor:
    """Tokens [B] int64 of logits [B, V] float32: argmax at temperature 0, else by inverse CDF.

    uniform: [B] float64. The CDF is summed in float64, so a change of the logits' last bits
    changes a token only where `uniform` lies within that change of a step.
    """
    if temperature == 0:
        return logits.argmax(-1)
    cdf = torch.softmax(logits / temperature, -1).cumsum(-1, dtype=torch.float64)
    drawn = torch.searchsorted(cdf, uniform[:, None] * cdf[:, -1:], right=True)
    return drawn.squeeze(1).clamp_(max=logits.shape[1] - 1)


def generate_batch(
    model: ColumnModel,
    head: Callable[[Tensor], Tensor],
    prefixes: Sequence[Tensor],
    *,
    uniform: Tensor,
    temperature: float,
    eos_ids: tuple[int, ...],
) -> list[Tensor]:
    """Continuations of one batch, [n] int32 CPU each, the end token included; uniform [B, tokens].

    head: hidden [B, H] -> logits [B, V] float32. Once half of the rows have ended, they leave.
    """
    device = uniform.device
    num_rows, num_tokens = uniform.shape
    written = torch.zeros(num_rows, num_tokens, dtype=torch.int64, device=device)
    ends = torch.tensor(eos_ids, dtype=torch.int64, device=device)
    batch = _Batch(model, head, prefixes, num_tokens, device)
    rows = torch.arange(num_rows, device=device)
    alive = torch.ones(num_rows, dtype=torch.bool, device=device)
    for step in range(num_tokens):
        tokens = choose(batch.logits, temperature, uniform[rows, step])
        written[rows, step] = tokens
        if eos_ids:
            alive &= ~torch.isin(tokens, ends)
            if step % CHECK_ENDS_EVERY == CHECK_ENDS_EVERY - 1:
                num_alive = int(alive.sum())
                if num_alive == 0:
                    break
                if 2 * num_alive <= len(rows):
                    keep = alive.nonzero().squeeze(1)
                    rows, tokens, alive = rows[keep], tokens[keep], alive[keep]
                    batch.select(keep)
        if step + 1 < num_tokens:
            batch.append(tokens)
    return [_cut(row, eos_ids) for row in written.to("cpu", torch.int32)]


class _Batch:
    """The state of a batch: the cache, where each row stands, and the logits of its next token."""

    def __init__(
        self,
        model: ColumnModel,
        head: Callable[[Tensor], Tensor],
        prefixes: Sequence[Tensor],
        num_tokens: int,
        device: torch.device,
    ) -> None:
        self._model, self._head = model, head
        lengths = torch.tensor([len(prefix) for prefix in prefixes])
        width = int(lengths.max())
        ids = torch.nn.utils.rnn.pad_sequence([p.to(torch.int64) for p in prefixes], True)
        columns = torch.arange(width, device=device)
        self._next_position = lengths.to(device)
        # Without holes attention needs no mask, which is the fast way through.
        self._visible = None if int(lengths.min()) == width else Visibility(len(ids), device)
        model.start(len(ids), width + num_tokens)
        valid = columns < self._next_position[:, None]
        out = model.append(
            ids.to(device),
            columns.expand(len(ids), width),
            mask=None if self._visible is None else self._visible.append(valid),
        )
        last = out.last_hidden[torch.arange(len(ids), device=device), self._next_position - 1]
        self.logits = head(last)

    def append(self, tokens: Tensor) -> None:
        """Say these tokens ([B] int64); `logits` are those after them."""
        mask = None
        if self._visible is not None:
            mask = self._visible.append(torch.ones_like(tokens, dtype=torch.bool)[:, None])
        out = self._model.append(tokens[:, None], self._next_position[:, None], mask=mask)
        self._next_position = self._next_position + 1
        self.logits = self._head(out.last_hidden[:, 0])

    def select(self, rows: Tensor) -> None:
        self._model.select(rows)
        self._next_position = self._next_position[rows]
        if self._visible is not None:
            self._visible.select(rows)


def _cut(row: Tensor, eos_ids: tuple[int, ...]) -> Tensor:
    """A row up to its first end token, inclusive."""
    if not eos_ids:
        return row.clone()
    ended = torch.isin(row, torch.tensor(eos_ids, dtype=row.dtype)).nonzero()
    return row[: int(ended[0]) + 1].clone() if len(ended) else row.clone()
