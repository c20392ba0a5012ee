"""Which rows of a packed batch P-EAGLE (arXiv 2602.01469) computes: pairs of an anchor and a depth.

The row (a, d) stands at position a + d. It sees the depth-0 rows of its sample up to a, and the
rows (a, 1..d) of its own chain. So the rows of a depth are queries like those of a step of
training-time test: a causal context and a few keys of their own (nn/attention.py), and no mask is
ever built. Chains are nested: an anchor of depth d is one of depth d - 1.

Only rows from which a scored row can be reached are computed: depth-0 rows up to the last anchor
of their sample with a scored row, chains up to their deepest scored row, and in the last layer the
scored rows alone.

Legend of shapes: T tokens of the batch, K depths, C context rows (depth 0), n_d rows of depth d
(n_0 = C), n all rows laid end to end by depth, P scored rows, R teacher rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from specforge_ext.methods._common import sample_keys
from specforge_ext.methods._teacher import labelled_rows
from specforge_ext.methods.peagle.config import PEagleConfig
from specforge_ext.nn.flash import QueryPlan
from specforge_ext.nn.query_plan import Context, places
from specforge_ext.ops import cod_chains
from specforge_ext.records import PackedBatch, StepContext, lengths_to_cu_seqlens


@dataclass(frozen=True)
class DepthQueries:
    """Queries of one depth d. context: for the depth-0 keys. own[j - 1]: [queries] int64, each
    query's place among the rows of depth j, j = 1..d; None where they are all of them.
    """

    context: QueryPlan
    own: tuple[Tensor | None, ...]


@dataclass(frozen=True)
class ChainPlan:
    """Index tensors, int64 unless said, on the draft's device.

    anchors, depths: [n] packed positions of the rows' anchors, and depths. sizes: n_0 ... n_(K-1).
    every: queries of all rows, by depth; last: of those that the last layer finishes, whose places
    among the n are last_rows. order: [P] the scored ones among last_rows, by teacher row;
    row_depth, row_teacher: [P] int32 in that order, the latter a place in teacher_rows,
    non-decreasing. teacher_rows: [R] packed positions u; u + 1 is the teacher's row. labelled: [K]
    float64, CPU, rows drawn at each depth whose loss mask is 1.
    """

    anchors: Tensor
    depths: Tensor
    sizes: tuple[int, ...]
    every: tuple[DepthQueries, ...]
    last: tuple[DepthQueries, ...]
    last_rows: Tensor
    order: Tensor
    row_depth: Tensor
    row_teacher: Tensor
    teacher_rows: Tensor
    labelled: Tensor


@torch.compiler.disable  # type: ignore[untyped-decorator]
def draw_chains(batch: PackedBatch, at: StepContext, config: PEagleConfig) -> tuple[Tensor, ...]:
    """Anchors of depths 1..K-1 from (at.seed, at.step, sample id) alone: `ops.cod_chains`."""
    return cod_chains(
        labelled_rows(batch.loss_mask, batch.lengths),
        lengths_to_cu_seqlens(batch.lengths),
        sample_keys(batch.sample_ids),
        seed=at.seed,
        step=at.step,
        num_depths=config.num_depths,
        ratio=config.down_sample_ratio,
        min_ratio=config.down_sample_ratio_min,
    )


@torch.compiler.disable  # type: ignore[untyped-decorator]
def plan_chains(
    mask: Tensor,
    labelled: Tensor,
    lengths: Sequence[int],
    chains: Sequence[Tensor],
    *,
    compaction: bool,
    device: torch.device,
) -> ChainPlan:
    """mask: [T] uint8, CPU, 1 where u = anchor + depth is scored; labelled: [T] bool, CPU, where
    the loss mask is. chains: as `draw_chains`.
    """
    counts = mask.numpy().astype(bool)
    cu = lengths_to_cu_seqlens(lengths).numpy().astype(np.int64)
    drawn = [np.arange(cu[-1]), *(c.numpy().astype(np.int64) for c in chains)]
    scored = [a[counts[a + d]] for d, a in enumerate(drawn)]
    rows, context = _computed(drawn, scored, cu, compaction=compaction)
    asking = scored if compaction else rows
    return _indices(rows, asking, scored, context, device, labelled=_labelled(drawn, labelled))


def _computed(
    drawn: list[np.ndarray], scored: list[np.ndarray], cu: np.ndarray, *, compaction: bool
) -> tuple[list[np.ndarray], Context]:
    """Anchors of the rows that are computed, by depth, and the context: depth 0's rows."""
    if not compaction:
        return drawn, Context.up_to_last(drawn[0], cu)
    needed = np.zeros(0, dtype=np.int64)
    chains: list[np.ndarray] = []
    for d in range(len(drawn) - 1, 0, -1):
        needed = np.union1d(needed, scored[d])
        chains.insert(0, needed)
    context = Context.up_to_last(np.union1d(needed, scored[0]), cu)
    return [context.rows, *chains], context


def _indices(
    rows: list[np.ndarray],
    asking: list[np.ndarray],
    scored: list[np.ndarray],
    context: Context,
    device: torch.device,
    *,
    labelled: Tensor,
) -> ChainPlan:
    sizes = [a.size for a in rows]
    begins = np.concatenate(([0], np.cumsum(sizes)))

    def queries(anchors: list[np.ndarray]) -> tuple[DepthQueries, ...]:
        return tuple(
            DepthQueries(
                context=context.queries(a, device),
                own=tuple(places(a, rows[j], device) for j in range(1, d + 1)),
            )
            for d, a in enumerate(anchors)
        )

    def put(x: np.ndarray) -> Tensor:
        return torch.from_numpy(x).to(device)

    of_depth = [begins[d] + np.searchsorted(rows[d], a) for d, a in enumerate(asking)]
    # Scored rows among the asking ones, whose teachers then rise.
    asked = np.concatenate([np.isin(a, s) for a, s in zip(asking, scored, strict=True)]).nonzero()[
        0
    ]
    teachers = np.concatenate([a + d for d, a in enumerate(scored)])
    depth = np.repeat(np.arange(len(scored)), [a.size for a in scored])
    order = np.argsort(teachers, kind="stable")
    teacher_rows, row_teacher = np.unique(teachers[order], return_inverse=True)
    return ChainPlan(
        anchors=put(np.concatenate(rows)),
        depths=put(np.repeat(np.arange(len(rows)), sizes)),
        sizes=tuple(sizes),
        every=queries(rows),
        last=queries(asking),
        last_rows=put(np.concatenate(of_depth)),
        order=put(asked[order]),
        row_depth=put(depth[order].astype(np.int32)),
        row_teacher=put(row_teacher.astype(np.int32)),
        teacher_rows=put(teacher_rows),
        labelled=labelled,
    )


def _labelled(drawn: list[np.ndarray], labelled: Tensor) -> Tensor:
    on = labelled.numpy()
    return torch.tensor([on[a + d].sum() for d, a in enumerate(drawn)], dtype=torch.float64)
