"""How block attention (DFlash family, arXiv 2602.06036) is cut into plain attention calls.

A block at anchor a sees the context of its sample before a. Sorted anchors make these nested: all
blocks of a run see what its first one sees. So a run of blocks is one dense call on the context
that all of them see, and its parts are runs of their own with what is left, until so little is left
that one masked call computes it. No key is visited twice by a query, few in vain.

Legend: T context rows, N samples, A blocks, B rows of a block.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from specforge_ext import ops

_PARTS = 2
"""Runs that a run is cut into."""
_RAGGED_KEYS = 128
"""Keys that a masked call may have: about half of its scores are in vain."""
_MIN_DENSE_KEYS = 32
"""A dense call on fewer keys costs more in merging than it saves: they are left to the parts."""


@dataclass(frozen=True)
class KeyCall:
    """Blocks [first, last) attend to the context rows `keys`; masked: not all to all of them."""

    first: int
    last: int
    keys: slice
    masked: bool


@dataclass(frozen=True)
class BlockPlan:
    """Blocks of a packed batch and what they may see.

    anchors: [A] int32, packed positions, ascending, in the order of samples. cu_anchors,
    cu_seqlens: [N + 1] int32. These lie on `device`; all else is on the host. num_context: T.
    Make one by `plan_blocks`.
    """

    anchors: Tensor
    cu_anchors: Tensor
    cu_seqlens: Tensor
    num_context: int
    block_size: int
    samples: tuple[tuple[int, tuple[int, ...]], ...]
    _calls: dict[int | None, tuple[KeyCall, ...]] = field(default_factory=dict, repr=False)
    _masks: dict[int | None, BlockMask] = field(default_factory=dict, repr=False)

    @property
    def num_blocks(self) -> int:
        return self.anchors.numel()

    @property
    def num_queries(self) -> int:
        return self.num_blocks * self.block_size

    def calls(self, window: int | None) -> tuple[KeyCall, ...]:
        """Context calls of a layer: each visible (query, context row) is in exactly one."""
        if window not in self._calls:
            found: list[KeyCall] = []
            first = 0
            for begin, anchors in self.samples:
                tree = _Tree(begin, anchors, self.block_size, window, first)
                found += tree.calls(0, len(anchors), None)
                first += len(anchors)
            self._calls[window] = tuple(found)
        return self._calls[window]

    def block_mask(self, window: int | None) -> BlockMask:
        """For flex_attention with keys = context rows, then block rows."""
        if window not in self._masks:
            self._masks[window] = _block_mask(self, window)
        return self._masks[window]


def plan_blocks(
    anchors: Tensor,
    cu_anchors: Tensor,
    cu_seqlens: Tensor,
    *,
    block_size: int,
    device: torch.device | None = None,
) -> BlockPlan:
    """anchors [A], cu_anchors [N + 1], cu_seqlens [N + 1], int32, on the CPU: `ops.draw_anchors`.

    device: where the attention will run, the CPU by default. ValueError if an anchor lies outside
    its sample or is not above the one before it.
    """
    bounds, places = cu_seqlens.tolist(), anchors.tolist()
    if block_size < 1:
        raise ValueError(f"plan_blocks: block_size must be at least 1, got {block_size}")
    counts = cu_anchors.tolist()
    if len(counts) != len(bounds) or counts[0] != 0 or counts[-1] != len(places):
        raise ValueError(
            f"plan_blocks: cu_anchors must be {len(bounds)} sums from 0 to {len(places)}, "
            f"got {counts}"
        )
    samples = []
    for k, ((begin, end), (first, last)) in enumerate(
        zip(pairwise(bounds), pairwise(counts), strict=True)
    ):
        own = tuple(places[first:last])
        if any(b <= a for a, b in pairwise((begin - 1, *own, end))):
            raise ValueError(
                f"plan_blocks: anchors of sample {k} must ascend within [{begin}, {end}), "
                f"got {list(own)}"
            )
        samples.append((begin, own))
    where = device or anchors.device
    return BlockPlan(
        anchors=anchors.to(where),
        cu_anchors=cu_anchors.to(where),
        cu_seqlens=cu_seqlens.to(where),
        num_context=bounds[-1],
        block_size=block_size,
        samples=tuple(samples),
    )


Interval = tuple[int, int]


@dataclass(frozen=True)
class _Tree:
    """The calls of one sample. begin: its first context row. offset: blocks before it."""

    begin: int
    anchors: tuple[int, ...]
    block_size: int
    window: int | None
    offset: int

    def calls(self, first: int, last: int, covered: Interval | None) -> Iterator[KeyCall]:
        """Of the run [first, last), whose blocks all have seen `covered` already."""
        if first == last:
            return
        end = self.anchors[last - 1]
        seen_by_any = (self._low(first, 0), end)
        rest = _without(seen_by_any, covered)
        if _size(rest) <= _RAGGED_KEYS:
            yield from self._emit(first, last, rest, masked=True)
            return
        seen_by_all = (self._low(last - 1, self.block_size - 1), self.anchors[first])
        dense = _without(seen_by_all, covered)
        is_single = last - first == 1
        if _size(dense) >= (1 if is_single else _MIN_DENSE_KEYS):
            yield from self._emit(first, last, dense, masked=False)
            covered = seen_by_all
        if is_single:
            yield from self._emit(first, last, _without(seen_by_any, covered), masked=True)
            return
        parts = min(_PARTS, last - first)
        cuts = [first + (last - first) * i // parts for i in range(parts + 1)]
        for a, b in pairwise(cuts):
            yield from self.calls(a, b, covered)

    def _low(self, block: int, slot: int) -> int:
        """The first context row that the slot sees."""
        if self.window is None:
            return self.begin
        return max(self.begin, self.anchors[block] + slot - (self.window - 1))

    def _emit(
        self, first: int, last: int, intervals: list[Interval], *, masked: bool
    ) -> Iterator[KeyCall]:
        for low, high in intervals:
            yield KeyCall(self.offset + first, self.offset + last, slice(low, high), masked)


def _without(interval: Interval, covered: Interval | None) -> list[Interval]:
    """What of the interval is not covered; a covered interval lies inside it."""
    low, high = interval
    parts = [interval] if covered is None else [(low, covered[0]), (covered[1], high)]
    return [(a, b) for a, b in parts if a < b]


def _size(intervals: list[Interval]) -> int:
    return sum(high - low for low, high in intervals)


def _block_mask(plan: BlockPlan, window: int | None) -> BlockMask:
    tensors = ops.block_mask_tensors(
        plan.anchors,
        plan.cu_anchors,
        plan.cu_seqlens,
        num_context=plan.num_context,
        block_size=plan.block_size,
        window=window,
    )
    counts = plan.cu_anchors.diff()
    begins = torch.repeat_interleave(plan.cu_seqlens[:-1], counts, output_size=plan.num_blocks)
    anchors, size = plan.anchors, plan.block_size
    # A tensor: torch.compile would take a number for a constant, and compile for every batch.
    context = torch.tensor(plan.num_context, dtype=torch.int32, device=anchors.device)

    def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        block, slot = q // size, q % size
        low = begins[block]
        own = (k >= context) & ((k - context) // size == block)
        if window is not None:
            low = torch.maximum(low, anchors[block] + slot - (window - 1))
            own = own & ((k - context) % size <= slot)
        return own | ((k >= low) & (k < anchors[block]))

    return BlockMask(
        (plan.num_queries, plan.num_context + plan.num_queries),
        tensors.kv_num_blocks,
        tensors.kv_indices,
        tensors.full_kv_num_blocks,
        tensors.full_kv_indices,
        tensors.q_num_blocks,
        tensors.q_indices,
        tensors.full_q_num_blocks,
        tensors.full_q_indices,
        mask_mod=visible,
    )
