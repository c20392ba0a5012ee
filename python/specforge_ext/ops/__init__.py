"""The kernels as torch ops: differentiable, compilable, on CPU and CUDA.

Their definitions are in `ops.reference`.

draft_loss      loss, metrics and gradients of all draft rows, from hidden states
teacher_stats   logsumexp and argmax of the target over its full vocabulary, from hidden states
row_stats       the same from logits that exist already
soft_ce_rows_   the row loss alone, from logits that exist already; its gradient replaces them
ttt_maps        which rows of a packed batch are active and scored at each TTT step
pack_samples    samples end to end, without padding
fp8_pack        a feature as e4m3 codes, a scale per token and layer, and a checksum
fp8_unpack      and back, the checksum compared
"""

from specforge_ext.ops.draft_loss import draft_loss
from specforge_ext.ops.pack import pack_samples, ttt_maps
from specforge_ext.ops.results import DraftLoss, SoftCeRows, TttMaps
from specforge_ext.ops.rows import row_stats, soft_ce_rows_
from specforge_ext.ops.teacher_stats import teacher_stats
from specforge_ext.ops.wire import CorruptRows, Fp8Rows, fp8_pack, fp8_unpack

__all__ = [
    "CorruptRows",
    "DraftLoss",
    "Fp8Rows",
    "SoftCeRows",
    "TttMaps",
    "draft_loss",
    "fp8_pack",
    "fp8_unpack",
    "pack_samples",
    "row_stats",
    "soft_ce_rows_",
    "teacher_stats",
    "ttt_maps",
]
