"""What a tensor on a GPU meets where no GPU is: an exception that says why, never a crash."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from specforge_ext import _C


class CudaTensor:
    """Looks to the binding like a tensor on cuda:0."""

    device = SimpleNamespace(type="cuda", index=0)

    def __init__(self, *shape: int, dtype: torch.dtype) -> None:
        self.memory = torch.zeros(shape, dtype=dtype)
        self.shape, self.dtype = tuple(shape), dtype
        self.stride, self.data_ptr = self.memory.stride, self.memory.data_ptr


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here: test_gpu_ops covers it")
def test_launch_without_a_gpu_raises() -> None:
    arguments = (
        CudaTensor(2, 8, dtype=torch.float32),
        CudaTensor(2, dtype=torch.float32),
        CudaTensor(2, dtype=torch.int32),
    )
    if _C.cuda_compiled:
        error, message = RuntimeError, r"cudaGetDevice.*: .*(driver|device).* \(.*launch\.cuh:\d+\)"
    else:
        error, message = ValueError, r"tensors are on cuda:0, but .* built without CUDA"
    with pytest.raises(error, match=message):
        _C.row_stats(*arguments)
