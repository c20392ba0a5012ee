"""What a step of multi-token prediction computes and keeps, at most."""

from __future__ import annotations

from specforge_ext.methods.base import StepWork
from specforge_ext.methods.mtp.forms import shape_of
from specforge_ext.nn.saved import WIDE, layer_bytes, mlp_bytes, scored_bytes
from specforge_ext.records import TargetSpec


def mtp_work(
    target: TargetSpec, *, num_steps: int, tokens: int, itemsize: int, recompute: bool
) -> StepWork:
    """See `methods.base.EstimatesWork`. All tokens at each step. The layer's kind is not known
    here: with norms of queries and keys, without a gate.
    """
    shape, hidden = shape_of(target), target.hidden_size
    # Embedding and hidden state: in float32, normed, and side by side. Nothing else keeps them.
    inputs = 2 * hidden * (WIDE + 2 * itemsize)
    layer = layer_bytes(shape, itemsize, qk_norm=True, mlp=not recompute)
    rows = tokens * num_steps
    row = inputs + layer + scored_bytes(hidden, itemsize)
    again = tokens * mlp_bytes(shape, itemsize) if recompute else 0
    return StepWork(rows=rows, saved_bytes=rows * row + again, logits_vocab=target.vocab_size)
