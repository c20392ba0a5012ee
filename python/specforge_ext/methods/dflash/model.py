"""The DFlash draft (arXiv 2602.06036): the backbone and nothing else."""

from __future__ import annotations

from torch import Tensor

from specforge_ext.methods._block.model import BlockBackbone
from specforge_ext.methods._block.plan import Blocks
from specforge_ext.ops import LabelLoss, label_loss


class DFlashDraft(BlockBackbone):
    """Parameters carry the names that engines load."""

    def forward(self, features: Tensor, input_ids: Tensor, blocks: Blocks) -> LabelLoss:
        """Loss and correctness of `blocks.rows`. features [T, F], input_ids [T] int64."""
        hidden = self.predicted(features, input_ids, blocks)
        labels = input_ids.index_select(0, blocks.labels.flatten().index_select(0, blocks.rows))
        return label_loss(hidden, self.target_head, labels.int())
