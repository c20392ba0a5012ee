"""How rows are cut into chunks whose logits, with those of their teachers, fit a workspace."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

_CPU_ROW_BYTES, _CUDA_ROW_BYTES = 4 * 384, 2 * 2560
"""Bytes per word of the vocabulary: students and teachers of a chunk, float32 and bfloat16.

Measured on the CPU: docs/kernels.md. On CUDA 2048 students and their teachers.
"""


def default_workspace_bytes(device: torch.device, *, vocab: int) -> int:
    """A workspace that does not slow the matrix products; the same for any number of rows."""
    return vocab * (_CUDA_ROW_BYTES if device.type == "cuda" else _CPU_ROW_BYTES)


@dataclass(frozen=True)
class Chunk:
    """Rows [row, row_end), whose teachers lie in [teacher, teacher_end)."""

    row: int
    row_end: int
    teacher: int
    teacher_end: int

    @property
    def rows(self) -> slice:
        return slice(self.row, self.row_end)

    @property
    def teachers(self) -> slice:
        return slice(self.teacher, self.teacher_end)

    @property
    def num_rows(self) -> int:
        return self.row_end - self.row

    @property
    def num_teachers(self) -> int:
        return self.teacher_end - self.teacher


def cut(
    row_to_teacher: Tensor, *, row_bytes: int, teacher_bytes: int, workspace_bytes: int
) -> list[Chunk]:
    """As few chunks as fit the workspace, of about the same cost.

    row_to_teacher: [N] on the CPU, non-decreasing. A student's row takes row_bytes, a teacher's
    teacher_bytes; one of each must fit.
    """
    teachers = row_to_teacher.long()
    # Rows [a, b] need cost[b] - cost[a] + row_bytes + teacher_bytes.
    cost = torch.arange(teachers.numel()) * row_bytes + teachers * teacher_bytes
    spare = workspace_bytes - row_bytes - teacher_bytes
    greedy = [0, *_greedy_ends(cost, spare)]
    even = _even_bounds(cost, len(greedy) - 1)
    fits = all(int(cost[b - 1] - cost[a]) <= spare for a, b in pairwise(even))
    return [
        Chunk(a, b, int(teachers[a]), int(teachers[b - 1]) + 1)
        for a, b in pairwise(even if fits else greedy)
    ]


def _greedy_ends(cost: Tensor, spare: int) -> Iterator[int]:
    row = 0
    while row < cost.numel():
        row = int(torch.searchsorted(cost, int(cost[row]) + spare, right=True))
        yield row


def _even_bounds(cost: Tensor, num_chunks: int) -> list[int]:
    """Bounds of `num_chunks` chunks of equal cost, or of fewer where one row costs too much."""
    if not num_chunks:
        return []
    first, last = int(cost[0]), int(cost[-1])
    at = torch.arange(1, num_chunks) * (last - first) // num_chunks + first
    inner = torch.searchsorted(cost, at, right=True).tolist()
    return sorted({0, *inner, cost.numel()})
