"""Bytes that autograd keeps of a row, from the forward of a layer to its backward: estimates.

Counted from what each operation saves, once per storage. They are checked against what is really
saved in tests/test_run_check.py.
"""

from __future__ import annotations

from specforge_ext.nn.layer import LayerShape

WIDE = 4
"""Bytes of float32, in which norms are computed."""


def norm_bytes(width: int, itemsize: int) -> int:
    """Of an RMSNorm: its input, the normalised row, and the input in float32 if it is not that."""
    return width * (2 * itemsize + (WIDE if itemsize < WIDE else 0))


def mlp_bytes(shape: LayerShape, itemsize: int) -> int:
    """Of a SwiGLU: gate, silu(gate), up and their product. Its input is the norm's."""
    return 4 * shape.intermediate_size * itemsize


def key_value_bytes(shape: LayerShape, itemsize: int, *, qk_norm: bool = False) -> int:
    """Of keys and values, without their input."""
    width = shape.num_kv_heads * shape.head_dim
    return 2 * width * itemsize + (norm_bytes(width, itemsize) if qk_norm else 0)


def layer_bytes(
    shape: LayerShape, itemsize: int, *, streams: int = 1, qk_norm: bool = False, mlp: bool = True
) -> int:
    """Of a pre-norm decoder layer, a row of its own keys and values included.

    streams: that it reads side by side, each with its norm. mlp: False if that part is computed
    again.
    """
    hidden, queries = shape.hidden_size, shape.num_heads * shape.head_dim
    parts = (
        streams * (norm_bytes(hidden, itemsize) + hidden * itemsize),
        2 * queries * itemsize + (norm_bytes(queries, itemsize) if qk_norm else 0),
        key_value_bytes(shape, itemsize, qk_norm=qk_norm),
        norm_bytes(hidden, itemsize) + hidden * itemsize,
        mlp_bytes(shape, itemsize) if mlp else 0,
    )
    return sum(parts)


def scored_bytes(hidden_size: int, itemsize: int) -> int:
    """Of a row's way to the loss: a copy, the final norm, and its gradient from the forward."""
    return norm_bytes(hidden_size, itemsize) + 2 * hidden_size * itemsize


def fused_stack_bytes(shape: LayerShape, itemsize: int, *, num_layers: int, recompute: bool) -> int:
    """Of a row through EAGLE-3's layers (the first reads two streams) to the loss.

    recompute: the feed-forward blocks are computed again.
    """
    first = layer_bytes(shape, itemsize, streams=2, mlp=not recompute)
    further = layer_bytes(shape, itemsize, mlp=not recompute)
    return first + (num_layers - 1) * further + scored_bytes(shape.hidden_size, itemsize)
