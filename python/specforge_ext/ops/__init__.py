"""The kernels as torch ops: differentiable, compilable, on CPU and CUDA.

Their definitions are in `ops.reference`.

draft_loss      loss, metrics and gradients of all draft rows, from hidden states
teacher_stats   logsumexp and argmax of the target over its full vocabulary, from hidden states
row_stats       the same from logits that exist already
soft_ce_rows_   the row loss alone, from logits that exist already; its gradient replaces them
ttt_maps        which rows of a packed batch are active and scored at each TTT step
pack_samples    samples end to end, without padding
draw_anchors    where the blocks of a block draft begin
block_mask_tensors  which tiles of block attention hold visible pairs
"""

from specforge_ext.ops.blocks import block_mask_tensors, draw_anchors
from specforge_ext.ops.draft_loss import draft_loss
from specforge_ext.ops.pack import pack_samples, ttt_maps
from specforge_ext.ops.results import BlockMaskTensors, DraftLoss, SoftCeRows, TttMaps
from specforge_ext.ops.rows import row_stats, soft_ce_rows_
from specforge_ext.ops.teacher_stats import teacher_stats

__all__ = [
    "BlockMaskTensors",
    "DraftLoss",
    "SoftCeRows",
    "TttMaps",
    "block_mask_tensors",
    "draft_loss",
    "draw_anchors",
    "pack_samples",
    "row_stats",
    "soft_ce_rows_",
    "teacher_stats",
    "ttt_maps",
]
