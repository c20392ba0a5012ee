"""The definitions of the ops, in plain torch: slow, short, judged in float64.

Every function follows the dtype of its inputs, so that the same lines serve as the float64 truth
and as the same-dtype baseline. `wire` is imported by its name.
"""

from specforge_ext.ops.reference.attention import block_visibility, own_keys_grads, own_keys_merge
from specforge_ext.ops.reference.draws import cod_chains, draw_anchors, philox4x32
from specforge_ext.ops.reference.losses import (
    LossRows,
    corrected_label_loss,
    draft_loss,
    loss_rows,
    lowest_argmax,
    row_stats,
    step_sums,
    teacher_stats,
)
from specforge_ext.ops.reference.packing import decode_fp8, pack_samples, ttt_maps

__all__ = [
    "LossRows",
    "block_visibility",
    "cod_chains",
    "corrected_label_loss",
    "decode_fp8",
    "draft_loss",
    "draw_anchors",
    "loss_rows",
    "lowest_argmax",
    "own_keys_grads",
    "own_keys_merge",
    "pack_samples",
    "philox4x32",
    "row_stats",
    "step_sums",
    "teacher_stats",
    "ttt_maps",
]
