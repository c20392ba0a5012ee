"""Ops whose forward has made their gradients already, so that backward only scales them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def made_ahead(op: Any, *, name: str, num_gradients: int) -> None:
    """Gives a custom op its autograd. name: for errors.

    The op's first output is what is differentiated: [], or [N], each row's own. Its first
    num_gradients inputs get gradients; its last ones, bools, say which of these are wanted; its
    last outputs are the gradients of the first output (of [N]: of its rows, one by one). Under
    create_graph it raises RuntimeError: the result would lack the terms of this op.
    """

    def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.wants, ctx.num_inputs = inputs[-num_gradients:], len(inputs)
        ctx.save_for_backward(*output[-num_gradients:])
        # Or every backward would fill zeros of the size of the gradients, for outputs nobody uses.
        ctx.set_materialize_grads(False)

    def backward(ctx: Any, of_output: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(f"{name}: second derivatives are not available (create_graph=True)")
        grads: list[Tensor | None] = [None] * ctx.num_inputs
        if of_output is not None:
            for k, (saved, wanted) in enumerate(zip(ctx.saved_tensors, ctx.wants, strict=True)):
                grads[k] = _scaled(saved, of_output) if wanted else None
        return tuple(grads)

    op.register_autograd(backward, setup_context=save)


def gradient_buffer(x: Tensor, *, wanted: bool) -> Tensor:
    """Contiguous memory as `x`, or without a row of it."""
    return torch.empty_like(x if wanted else x[:0], memory_format=torch.contiguous_format)


def _scaled(saved: Tensor, of_output: Tensor) -> Tensor:
    """saved * of_output, in the memory of `saved` where no later backward can want it.

    The head's gradient is the largest tensor of a step: a copy costs page faults and memory. With
    retain_graph, and while a compiler traces (a subclass of Tensor), it is a copy nevertheless.
    """
    if of_output.dim():
        return saved * of_output[:, None].to(saved.dtype)
    keeps = torch._C._autograd._get_current_graph_task_keep_graph()
    if keeps or type(of_output) is not Tensor:
        return saved * of_output
    if of_output.device.type == "cpu" and of_output.item() == 1:
        return saved
    return saved.mul_(of_output)
