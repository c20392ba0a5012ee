"""What a step of such a draft computes and keeps, at most."""

from __future__ import annotations

from specforge_ext.methods._common import layer_shape
from specforge_ext.methods._fused.shape import FusesLayers, aux_layer_ids
from specforge_ext.methods.base import StepWork
from specforge_ext.nn.saved import fused_stack_bytes, mlp_bytes
from specforge_ext.records import TargetSpec


def fused_work(
    config: FusesLayers,
    target: TargetSpec,
    *,
    num_layers: int,
    tokens: int,
    rows: int,
    rows_at_once: int,
    itemsize: int,
    recompute: bool,
) -> StepWork:
    """See `methods.base.EstimatesWork`. rows: through the layers, of a micro-batch of `tokens`;
    rows_at_once: through one feed-forward block at a time.
    """
    shape = layer_shape(config, target)
    row = fused_stack_bytes(shape, itemsize, num_layers=num_layers, recompute=recompute)
    fused = tokens * target.hidden_size * len(aux_layer_ids(config, target)) * itemsize
    again = rows_at_once * mlp_bytes(shape, itemsize) if recompute else 0
    return StepWork(
        rows=rows,
        saved_bytes=rows * row + fused + again,
        logits_vocab=target.vocab_size,
        head_bytes=4 * (config.draft_vocab_size or target.vocab_size) * target.hidden_size,
    )
