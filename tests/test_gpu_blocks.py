"""Block masks and block attention on a GPU against the CPU. Run with `pytest -m gpu`."""

from __future__ import annotations

import pytest
import torch

from specforge_ext import ops
from specforge_ext.nn.block_attention import block_attention
from specforge_ext.nn.block_plan import plan_blocks
from test_ops_blocks import NAMES, random_anchors

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("lengths", [[9], [0, 700, 0, 300], [4000, 3000]])
def test_block_mask(lengths: list[int], window: int | None) -> None:
    inputs = random_anchors(lengths, [n // 8 for n in lengths], seed=0)
    shape = {"num_context": sum(lengths), "block_size": 16}
    got = ops.block_mask_tensors(*(x.cuda() for x in inputs), **shape, window=window)
    wanted = ops.block_mask_tensors(*inputs, **shape, window=window)
    for name in NAMES:
        assert torch.equal(getattr(got, name).cpu(), getattr(wanted, name)), name


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_block_attention(dtype: torch.dtype, window: int | None) -> None:
    """float32: matrix products; bfloat16: flex_attention, compiled. Truth: float64 on the CPU."""
    anchors = random_anchors([700, 0, 300], [40, 0, 20], seed=0)
    plan = plan_blocks(*anchors, block_size=16)
    on_gpu = plan_blocks(*anchors, block_size=16, device=torch.device("cuda"))
    generator = torch.Generator().manual_seed(0)
    rows = ((plan.num_queries, 4), (1000, 2), (1000, 2), *[(plan.num_queries, 2)] * 2)
    inputs = [torch.randn(n, heads, 64, generator=generator).to(dtype) for n, heads in rows]
    grad = torch.randn(plan.num_queries, 4, 64, generator=generator).to(dtype)
    results = []
    for device, wide, cut in (("cpu", torch.float64, plan), ("cuda", dtype, on_gpu)):
        leaves = [x.to(device, wide).requires_grad_() for x in inputs]
        q, context_k, context_v, block_k, block_v = leaves
        out = block_attention(q, (context_k, context_v), (block_k, block_v), cut, window)
        grads = torch.autograd.grad(out, leaves, grad.to(device, wide))
        results.append([x.detach().cpu().double() for x in (out, *grads)])
    for wanted, got in zip(*results, strict=True):
        error = ((got - wanted).norm() / wanted.norm()).item()
        assert error < (2e-2 if dtype == torch.bfloat16 else 1e-5)
