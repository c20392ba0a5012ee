"""What a step of a block draft computes and keeps, at most."""

from __future__ import annotations

from specforge_ext.methods._block.config import BlockConfig, layer_ids
from specforge_ext.methods._common import layer_shape
from specforge_ext.methods.base import StepWork
from specforge_ext.nn.saved import key_value_bytes, layer_bytes, norm_bytes, scored_bytes
from specforge_ext.records import TargetSpec


def block_work(
    config: BlockConfig,
    target: TargetSpec,
    *,
    tokens: int,
    longest: int,
    itemsize: int,
    recompute: bool,
) -> StepWork:
    """See `methods.base.EstimatesWork`. Samples have `longest` tokens; shorter ones have more
    anchors a token, up to one each.
    """
    shape = layer_shape(config, target)
    samples = -(-tokens // longest)
    anchors = min(tokens, samples * min(config.num_anchors, longest))
    rows, hidden = anchors * config.block_size, target.hidden_size
    layer = layer_bytes(shape, itemsize, qk_norm=True)
    keys = key_value_bytes(shape, itemsize, qk_norm=True)
    width = hidden * len(layer_ids(config, target))
    context = tokens * (width * itemsize + norm_bytes(hidden, itemsize) + hidden * itemsize)
    of_layers = config.num_layers * (rows * layer + tokens * keys)
    if recompute:
        # What goes into each layer stays, and one layer is computed again at a time.
        of_layers = config.num_layers * rows * hidden * itemsize + rows * layer + tokens * keys
    return StepWork(
        rows=rows,
        saved_bytes=of_layers + context + rows * scored_bytes(hidden, itemsize),
        logits_vocab=target.vocab_size,
    )
