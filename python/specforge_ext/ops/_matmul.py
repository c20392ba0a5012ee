"""The matrix products of a head, into memory that is given, for every dtype and device.

Where the hardware multiplies bf16, logits and their gradients are bf16. A CPU that only emulates it
(measured: 0.3 GFLOP/s on AVX2) gets float32 logits instead, and weights upcast block by block.
Legend: N rows, H width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from specforge_ext import _C

_BLOCK_BYTES = 16 << 20
_HUGE_BYTES = 8 << 20


def empty_buffer(like: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Uninitialised memory on the device of `like`. On the CPU large ones ask for huge pages:
    first touch in pages of 4 KiB costs a tenth of the product that fills them.
    """
    out = like.new_empty(tuple(shape), dtype=dtype)
    if out.device.type == "cpu" and out.nbytes >= _HUGE_BYTES:
        _C.advise_huge_pages(out)
    return out


def logits_dtype(hidden: Tensor) -> torch.dtype:
    """The dtype in which logits of this hidden state are computed."""
    if hidden.device.type == "cpu" and hidden.dtype != torch.float32 and not _C.has_fast_bf16():
        return torch.float32
    return hidden.dtype


def logits_into(out_NV: Tensor, hidden_NH: Tensor, head_VH: Tensor) -> None:
    """out = hidden head^T."""
    if out_NV.dtype == head_VH.dtype:
        torch.mm(hidden_NH, head_VH.t(), out=out_NV)
        return
    hidden_NH = hidden_NH.to(out_NV.dtype)
    for rows in _blocks(head_VH):
        torch.mm(hidden_NH, head_VH[rows].to(out_NV.dtype).t(), out=out_NV[:, rows])


def corrected_logits_into(
    out_NV: Tensor, logits_NV: Tensor, hidden_NH: Tensor, head_VH: Tensor
) -> None:
    """out = logits + hidden head^T; out may be logits."""
    if out_NV.dtype == head_VH.dtype:
        torch.addmm(logits_NV, hidden_NH, head_VH.t(), out=out_NV)
        return
    hidden_NH = hidden_NH.to(out_NV.dtype)
    for rows in _blocks(head_VH):
        head = head_VH[rows].to(out_NV.dtype)
        torch.addmm(logits_NV[:, rows], hidden_NH, head.t(), out=out_NV[:, rows])


def hidden_grad_into(out_NH: Tensor, grad_NV: Tensor, head_VH: Tensor) -> None:
    """out = grad head."""
    if grad_NV.dtype == head_VH.dtype:
        torch.mm(grad_NV, head_VH, out=out_NH)
        return
    total_NH = torch.zeros(out_NH.shape, dtype=grad_NV.dtype, device=out_NH.device)
    for rows in _blocks(head_VH):
        total_NH.addmm_(grad_NV[:, rows], head_VH[rows].to(grad_NV.dtype))
    out_NH.copy_(total_NH)


class HeadGrad:
    """The sum over chunks of grad^T hidden: [V, H] in the head's dtype.

    Added in float32, but for a CPU that multiplies bf16: there each product is rounded to bf16, and
    up to two of them are added where the result lies, without a [V, H] of float32.
    """

    def __init__(self, head_VH: Tensor, *, num_chunks: int) -> None:
        self._head_dtype = head_VH.dtype
        rounds = head_VH.device.type == "cpu" and logits_dtype(head_VH) == head_VH.dtype
        dtype = head_VH.dtype if num_chunks < (3 if rounds else 2) else torch.float32
        self._total_VH = empty_buffer(head_VH, head_VH.shape, dtype)
        self._num_added = 0

    def result(self) -> Tensor:
        if not self._num_added:
            self._total_VH.zero_()
        return self._total_VH.to(self._head_dtype)

    def add(self, grad_NV: Tensor, hidden_NH: Tensor) -> None:
        total_VH, beta = self._total_VH, 1 if self._num_added else 0
        self._num_added += 1
        if grad_NV.dtype != hidden_NH.dtype:  # emulated bf16
            hidden_NH = hidden_NH.to(grad_NV.dtype)
        if not beta and grad_NV.dtype == total_VH.dtype:
            torch.mm(grad_NV.t(), hidden_NH, out=total_VH)
        elif grad_NV.dtype == torch.float32 == total_VH.dtype:
            total_VH.addmm_(grad_NV.t(), hidden_NH)
        elif grad_NV.device.type == "cuda":
            torch.addmm(
                total_VH, grad_NV.t(), hidden_NH, out_dtype=torch.float32, beta=beta, out=total_VH
            )
        else:
            for rows in _blocks(total_VH):
                part = torch.mm(grad_NV[:, rows].t(), hidden_NH)
                if beta:
                    total_VH[rows] += part
                else:
                    total_VH[rows] = part


def _blocks(head_VH: Tensor) -> Iterator[slice]:
    """Slices of the vocabulary, at most _BLOCK_BYTES of float32 weights each."""
    size = max(1, _BLOCK_BYTES // (4 * head_VH.shape[1]))
    for start in range(0, head_VH.shape[0], size):
        yield slice(start, min(start + size, head_VH.shape[0]))
