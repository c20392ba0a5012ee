"""What every wrapper of a native op needs, and nothing else."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def stream_of(tensor: Tensor) -> int:
    """The cudaStream_t on which the tensor's device works now, as an integer; 0 on the CPU."""
    if tensor.device.type != "cuda":
        return 0
    stream: Any = torch.cuda.current_stream(tensor.device)
    return int(stream.cuda_stream)


def check(op: str, name: str, tensor: Tensor, shape: tuple[int, ...], *dtypes: torch.dtype) -> None:
    """ValueError unless the tensor has this shape and one of these dtypes. Metadata only."""
    if tuple(tensor.shape) != shape or tensor.dtype not in dtypes:
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(
            f"{op}: {name} must be {list(shape)} {wanted}, "
            f"got {list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
        )


FLOATS = (torch.float32, torch.bfloat16)
"""Of hidden states and heads."""


def in_autocast_dtype(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Where autocast is on, in its dtype; all on one device."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    return tuple(x.to(torch.get_autocast_dtype(device)) for x in tensors)
