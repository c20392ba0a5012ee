"""Where the blocks of a packed batch begin, what they predict, and what they need of the batch.

Everything is worked out on the host; index tensors then go to the draft's device.

Legend of shapes: T tokens of the batch, N samples, A blocks, B rows of a block, C context rows, P
predicted rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from specforge_ext.methods._common import sample_keys
from specforge_ext.nn.block_plan import BlockPlan, plan_blocks
from specforge_ext.ops import draw_anchors
from specforge_ext.records import PackedBatch, StepContext, lengths_to_cu_seqlens


@dataclass(frozen=True)
class Anchors:
    """places: [A] int32, packed positions, ascending. bounds: [N + 1] int32, samples' shares of
    them. On the CPU.
    """

    places: Tensor
    bounds: Tensor


@dataclass(frozen=True)
class Blocks:
    """The blocks of a batch that predict something. Index tensors are int64 on the draft's device.

    anchors: [A] packed positions of the last known tokens. positions: [A, B] of the rows, in their
    samples. context: [C] packed positions of the rows that give keys and values: of each sample
    those up to its last anchor (whose own row is along but is seen by none: a plan's anchors lie in
    their samples). context_positions: [C] in their samples. labels: [A, B] packed positions of what
    the rows predict, any where `supervised` [A, B] bool is False. rows: [P] places of the
    supervised ones among the A * B, ascending; slots: [P] their places in their blocks.
    """

    anchors: Tensor
    positions: Tensor
    context: Tensor
    context_positions: Tensor
    labels: Tensor
    supervised: Tensor
    rows: Tensor
    slots: Tensor
    attention: BlockPlan

    @property
    def num_blocks(self) -> int:
        return self.anchors.numel()

    @property
    def block_size(self) -> int:
        return self.attention.block_size

    def by_block(self, values: Tensor) -> Tensor:
        """Values of the predicted rows [P] -> [A, B], 0 elsewhere."""
        flat = values.new_zeros(self.supervised.numel()).index_copy(0, self.rows, values)
        return flat.view(self.supervised.shape)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def draw(batch: PackedBatch, at: StepContext, *, num_anchors: int) -> Anchors:
    """Up to num_anchors a sample, uniform without replacement among the tokens that are scored and
    followed by a scored one, from (at.seed, at.step, sample id) alone.
    """
    places, bounds = draw_anchors(
        batch.loss_mask.cpu(),
        lengths_to_cu_seqlens(batch.lengths),
        sample_keys(batch.sample_ids),
        seed=at.seed,
        step=at.step,
        max_anchors=num_anchors,
    )
    return Anchors(places, bounds)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def plan(
    batch: PackedBatch,
    anchors: Anchors,
    *,
    block_size: int,
    first_label: int,
    stops_at_gap: bool = False,
) -> Blocks:
    """first_label: slot k predicts the token at anchor + first_label + k; where it is 0, slot 0
    (the known token itself) predicts nothing.

    A row is supervised if its label lies in the sample and is scored; stops_at_gap: and those of
    all slots before it too. Blocks without a supervised row are left out.
    """
    mask, bounds = batch.loss_mask.cpu().bool(), anchors.bounds.long()
    starts = lengths_to_cu_seqlens(batch.lengths).long()
    sample = torch.repeat_interleave(torch.arange(len(batch.lengths)), bounds.diff())
    places = anchors.places.long()
    slots = torch.arange(block_size)
    labels = places[:, None] + first_label + slots
    supervised = labels < starts[1:][sample][:, None]
    labels = labels.clamp_max(max(batch.num_tokens - 1, 0))
    supervised &= mask[labels]
    if stops_at_gap:
        supervised = supervised.long().cumprod(1).bool()
    if first_label == 0:
        supervised[:, 0] = False
    kept = supervised.any(1)
    places, sample, labels, supervised = (x[kept] for x in (places, sample, labels, supervised))
    context = _Context.of(places, sample, batch.lengths)
    rows = supervised.flatten().nonzero()[:, 0]
    device = batch.input_ids.device
    inside = places - starts[sample]
    return Blocks(
        anchors=places.to(device),
        positions=(inside[:, None] + slots).to(device),
        context=context.rows.to(device),
        context_positions=context.positions.to(device),
        labels=labels.to(device),
        supervised=supervised.to(device),
        rows=rows.to(device),
        slots=(rows % block_size).to(device),
        attention=plan_blocks(
            (inside + context.begins[sample]).int(),
            _bounds(torch.bincount(sample, minlength=len(batch.lengths))).int(),
            context.begins.int(),
            block_size=block_size,
            device=device,
        ),
    )


@dataclass(frozen=True)
class _Context:
    """rows, positions: [C], packed and in their samples. begins: [N + 1] of samples among them."""

    rows: Tensor
    positions: Tensor
    begins: Tensor

    @classmethod
    def of(cls, places: Tensor, sample: Tensor, lengths: Sequence[int]) -> _Context:
        starts = lengths_to_cu_seqlens(lengths).long()
        counts = torch.zeros(len(lengths), dtype=torch.int64)
        counts.scatter_reduce_(0, sample, places - starts[sample] + 1, "amax")
        begins = _bounds(counts)
        total = int(begins[-1])
        positions = torch.arange(total) - torch.repeat_interleave(begins[:-1], counts)
        rows = positions + torch.repeat_interleave(starts[:-1], counts)
        return cls(rows=rows, positions=positions, begins=begins)


def _bounds(counts: Tensor) -> Tensor:
    """[n + 1] int64, exclusive prefix sums."""
    return torch.cat((counts.new_zeros(1), counts.cumsum(0)))
