"""Which rows of a packed batch are computed at which step of training-time test (arXiv
2503.01840).

A row is active at step i if it is scored at step i or later. Later steps' keys are seen by their
own row only and step-0 keys come from the layer's input, so a row that is not active needs nothing
of step i, and at step 0 only its key and value, and those only if an active row of its sample comes
after it. With several layers that holds for the last one: the step-0 keys of a layer come from the
layer below, so below the last every row up to the sample's last active one runs at step 0. Later
steps stay with their active rows in every layer.

Legend of shapes: T tokens of the batch, C context rows, n_i rows of step i, P scored (row, step)
pairs, R teacher rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from specforge_ext.nn.flash import QueryPlan
from specforge_ext.nn.query_plan import Context, places
from specforge_ext.ops import TttMaps, ttt_maps
from specforge_ext.records import lengths_to_cu_seqlens


@dataclass(frozen=True)
class StepRows:
    """The rows of one step.

    rows: [n_i] int64 packed positions, ascending. parent: [n_i] int64, each row's place among the
    previous step's rows (for step 0: among the context); None where both are the same rows.
    ancestors[j - 1]: the same among the rows of step j, j = 1..i. queries: for the step-0 keys.
    """

    rows: Tensor
    parent: Tensor | None
    ancestors: tuple[Tensor | None, ...]
    queries: QueryPlan


@dataclass(frozen=True)
class TttPlan:
    """Index tensors, int64, on the draft's device.

    context: [C] packed positions that need a step-0 key. whole: all of them asking, for the layers
    below the last. steps: L of them. pair_source: [P] places in the steps' rows laid end to end;
    pair_step, pair_teacher: [P] int32, the latter a place in teacher_rows, non-decreasing.
    teacher_rows: [R] packed positions u; u + 1 is the teacher's row.
    """

    context: Tensor
    whole: QueryPlan
    steps: tuple[StepRows, ...]
    pair_source: Tensor
    pair_step: Tensor
    pair_teacher: Tensor
    teacher_rows: Tensor


@torch.compiler.disable  # type: ignore[untyped-decorator]
def build_plan(
    mask: Tensor,
    lengths: Sequence[int],
    *,
    ttt_length: int,
    compaction: bool,
    device: torch.device,
) -> TttPlan:
    """mask: [T] uint8, CPU, 1 where u is scored; 0 at the last position of every sample."""
    cu_seqlens = lengths_to_cu_seqlens(lengths)
    maps = ttt_maps(mask, cu_seqlens, ttt_length)
    cu = cu_seqlens.numpy().astype(np.int64)
    active = [a.numpy().astype(np.int64) for a in maps.active]
    if not compaction:
        active = [np.arange(cu[-1])] * ttt_length
    context = Context.up_to_last(active[0], cu)
    steps: list[StepRows] = []
    for i, rows in enumerate(active):
        steps.append(_step_rows(i, active, rows, context, device))
    return TttPlan(
        context=torch.from_numpy(context.rows).to(device),
        whole=context.queries(context.rows, device),
        steps=tuple(steps),
        pair_source=_pair_source(maps, int(cu[-1]), compaction).to(device),
        pair_step=maps.pair_step.to(device),
        pair_teacher=maps.pair_teacher.to(device),
        teacher_rows=maps.teacher_rows.long().to(device),
    )


def _step_rows(
    step: int, active: list[np.ndarray], rows: np.ndarray, context: Context, device: torch.device
) -> StepRows:
    earlier = [context.rows if step == 0 else active[step - 1], *active[1 : step + 1]]
    parent, *ancestors = [places(rows, among, device) for among in earlier]
    return StepRows(
        rows=torch.from_numpy(rows).to(device),
        parent=parent,
        ancestors=tuple(ancestors),
        queries=context.queries(rows, device),
    )


def _pair_source(maps: TttMaps, num_tokens: int, compaction: bool) -> Tensor:
    """[P] int64. Without compaction every step holds all tokens, so step i's row t is i * T + t."""
    if compaction:
        return maps.pair_source.long()
    step = maps.pair_step.long()
    return step * num_tokens + maps.teacher_rows.long()[maps.pair_teacher.long()] - step


def labelled_per_step(labelled: Tensor, lengths: Sequence[int], ttt_length: int) -> Tensor:
    """[L] float64, CPU: the rows t with labelled[t + i] in the same sample, of each step i."""
    inside = torch.cat([torch.arange(n) for n in lengths] or [torch.arange(0)])[labelled]
    return (inside[:, None] >= torch.arange(ttt_length)).sum(0).double()


def select(x: Tensor, rows: Tensor | None) -> Tensor:
    """Rows of x [n, ...] by an index of `StepRows`, None for all."""
    return x if rows is None else x.index_select(0, rows)
