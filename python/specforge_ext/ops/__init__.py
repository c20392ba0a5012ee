"""The kernels as torch ops: differentiable, compilable, on CPU and CUDA.

Their definitions are in `ops.reference`.

draft_loss      loss, metrics and gradients of all draft rows, from hidden states
draft_first_permutation  the target's head with the draft's vocabulary first
teacher_stats   logsumexp and argmax of the target over its full vocabulary, from hidden states
row_stats       the same from logits that exist already
loss_rows_      the row losses alone, from logits that exist already; the gradient replaces them
ttt_maps        which rows of a packed batch are active and scored at each TTT step
pack_samples    samples end to end, without padding
own_keys_merge_ attention over the rows' own keys of earlier TTT steps, into flash attention's
                output
own_keys_grads_ its backward
draw_anchors    where the blocks of a block draft begin
block_mask_tensors  which tiles of block attention hold visible pairs
cod_chains      which anchors of a parallel draft look how deep
label_loss      cross entropy of rows against labels under a frozen head, one value a row
corrected_label_loss  the same with and without a low-rank correction of the logits, summed
two_head_loss   loss of rows whose logits are a frozen head's and a trained narrow one's, added
fp8_pack        a feature as e4m3 codes, a scale per token and layer, and a checksum
fp8_unpack      and back, the checksum compared
crc32c          of bytes, on the device where they lie
"""

from specforge_ext.ops._chunks import default_workspace_bytes
from specforge_ext.ops.attention import own_keys_grads_, own_keys_merge_
from specforge_ext.ops.blocks import block_mask_tensors, draw_anchors
from specforge_ext.ops.chains import cod_chains
from specforge_ext.ops.corrected_label_loss import CorrectedLabelLoss, corrected_label_loss
from specforge_ext.ops.draft_loss import draft_first_permutation, draft_loss
from specforge_ext.ops.label_loss import LabelLoss, label_loss
from specforge_ext.ops.pack import pack_samples, ttt_maps
from specforge_ext.ops.results import (
    BlockMaskTensors,
    DraftLoss,
    KlSchedule,
    LossRowsResult,
    RowLoss,
    TttMaps,
)
from specforge_ext.ops.rows import loss_rows_, row_stats
from specforge_ext.ops.teacher_stats import teacher_stats
from specforge_ext.ops.two_head_loss import TwoHeadLoss, two_head_loss
from specforge_ext.ops.wire import CorruptRows, Fp8Rows, crc32c, fp8_pack, fp8_unpack

__all__ = [
    "BlockMaskTensors",
    "CorrectedLabelLoss",
    "CorruptRows",
    "DraftLoss",
    "Fp8Rows",
    "KlSchedule",
    "LabelLoss",
    "LossRowsResult",
    "RowLoss",
    "TttMaps",
    "TwoHeadLoss",
    "block_mask_tensors",
    "cod_chains",
    "corrected_label_loss",
    "crc32c",
    "default_workspace_bytes",
    "draft_first_permutation",
    "draft_loss",
    "draw_anchors",
    "fp8_pack",
    "fp8_unpack",
    "label_loss",
    "loss_rows_",
    "own_keys_grads_",
    "own_keys_merge_",
    "pack_samples",
    "row_stats",
    "teacher_stats",
    "ttt_maps",
    "two_head_loss",
]
