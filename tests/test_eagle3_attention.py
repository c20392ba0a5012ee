"""Split attention against dense attention, its backward by finite differences, and rotary
tables.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from specforge_ext.methods._ttt_plan import TttPlan, build_plan
from specforge_ext.nn import flash, query_plan
from specforge_ext.nn.attention import OwnKeys, split_attention
from specforge_ext.nn.rope import Rope, inverse_frequencies, rotate

LENGTHS = (9, 1, 12, 4)


def plan_of(mask: Sequence[int], lengths: Sequence[int], ttt_length: int) -> TttPlan:
    return build_plan(
        torch.tensor(mask, dtype=torch.uint8),
        lengths,
        ttt_length=ttt_length,
        compaction=True,
        device=torch.device("cpu"),
    )


@pytest.fixture(params=[2, 32], ids=["spans cut", "spans whole"])
def holes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> TttPlan:
    """Queries with gaps, a sample without any, a sample whose first rows do not ask."""
    monkeypatch.setattr(query_plan, "_MAX_HOLE_ROWS", request.param)
    mask = [0] * sum(LENGTHS)
    for u in (2, 6, 12, 15, 16, 19):
        mask[u] = 1
    return plan_of(mask, LENGTHS, 3)


def tensors(
    plan: TttPlan, *, heads: int, kv_heads: int, dtype: torch.dtype
) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def rand(rows: int, num_heads: int) -> Tensor:
        x = torch.randn(rows, num_heads, 8, dtype=torch.float64, generator=generator)
        return x.to(dtype).requires_grad_()

    own_k = [rand(step.rows.numel(), kv_heads) for step in plan.steps[1:]]
    own_v = [rand(step.rows.numel(), kv_heads) for step in plan.steps[1:]]
    return own_k, own_v, rand(plan.context.numel(), kv_heads), rand(plan.context.numel(), kv_heads)


def attend(
    plan: TttPlan, step: int, q: Tensor, k: Tensor, v: Tensor, own: Sequence[Tensor]
) -> Tensor:
    half = len(own) // 2
    rows = plan.steps[step]
    keys = [OwnKeys(own[j], own[half + j], rows.ancestors[j]) for j in range(step)]
    return split_attention(q, (k, v), rows.queries, keys)


def dense(
    plan: TttPlan, step: int, q: Tensor, k: Tensor, v: Tensor, own: Sequence[Tensor]
) -> Tensor:
    """One softmax over step-0 keys of the sample up to the row, and the row's own keys."""
    half, out = len(own) // 2, []
    starts = torch.tensor([0, *LENGTHS]).cumsum(0)
    group = q.shape[1] // k.shape[1]
    for n, t in enumerate(plan.steps[step].rows.tolist()):
        start = int(starts[starts <= t].max())
        seen = ((plan.context >= start) & (plan.context <= t)).nonzero()[:, 0]
        own_rows = [int((plan.steps[j + 1].rows == t).nonzero()) for j in range(step)]
        keys = torch.cat((k[seen], *(own[j][r : r + 1] for j, r in enumerate(own_rows))))
        values = torch.cat((v[seen], *(own[half + j][r : r + 1] for j, r in enumerate(own_rows))))
        keys, values = (x.repeat_interleave(group, 1) for x in (keys, values))
        p = torch.softmax(torch.einsum("hd,khd->hk", q[n], keys) / 8**0.5, -1)
        out.append(torch.einsum("hk,khd->hd", p, values))
    return torch.stack(out)


@pytest.mark.parametrize("step", [0, 1, 2])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (3, 3), (4, 1)])
def test_split_is_dense(holes: TttPlan, step: int, heads: int, kv_heads: int) -> None:
    plan = holes
    own_k, own_v, k, v = tensors(plan, heads=heads, kv_heads=kv_heads, dtype=torch.float64)
    n = plan.steps[step].rows.numel()
    q = torch.randn(n, heads, 8, dtype=torch.float64, requires_grad=True)
    inputs = (q, k, v, *own_k, *own_v)
    grad = torch.randn(n, heads, 8, dtype=torch.float64)
    results = []
    for function in (attend, dense):
        out = function(plan, step, q, k, v, (*own_k, *own_v))
        used = torch.autograd.grad(out, inputs, grad, allow_unused=True)
        results.append((out, *(torch.zeros_like(x) if g is None else g
                               for x, g in zip(inputs, used, strict=True))))  # fmt: skip
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_gradients_by_finite_differences() -> None:
    plan = plan_of([0, 1, 0, 1, 0], (5,), 2)
    own_k, own_v, k, v = tensors(plan, heads=2, kv_heads=1, dtype=torch.float64)
    rows = plan.steps[1].rows.numel()
    q = torch.randn(rows, 2, 8, dtype=torch.float64, requires_grad=True)

    def function(*inputs: Tensor) -> Tensor:
        return attend(plan, 1, *inputs[:3], inputs[3:])

    assert torch.autograd.gradcheck(function, (q, k, v, own_k[0], own_v[0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_math_path_is_the_flash_path(
    holes: TttPlan, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On chunks of 4 queries, so that spans are cut; CUDA uses it for float32."""
    monkeypatch.setattr(flash, "_MATH_CHUNK_ROWS", 4)
    plan = holes.steps[0].queries
    n, c = plan.index.numel(), int(plan.cu_context[-1])
    q, grad = (torch.randn(n, 4, 8, dtype=dtype) for _ in range(2))
    k, v = (torch.randn(c, 2, 8, dtype=dtype) for _ in range(2))
    expected = flash.forward(q, k, v, plan, 0.3)
    got = flash.math_forward(q, k, v, plan, 0.3)
    torch.testing.assert_close(got, expected)
    lse = expected[1] + 0.5  # as if more keys had been merged
    torch.testing.assert_close(
        flash.math_backward(grad, q, k, v, expected[0], lse, plan, 0.3),
        flash.backward(grad, q, k, v, expected[0], lse, plan, 0.3),
    )


def test_bfloat16_is_near_float32(holes: TttPlan) -> None:
    plan = holes
    own_k, own_v, k, v = tensors(plan, heads=4, kv_heads=2, dtype=torch.float32)
    q = torch.randn(plan.steps[2].rows.numel(), 4, 8)
    exact = attend(plan, 2, q, k, v, (*own_k, *own_v))
    half = [x.bfloat16() for x in (q, k, v, *own_k, *own_v)]
    rounded = attend(plan, 2, *half[:3], half[3:])
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.float(), exact, rtol=0.05, atol=0.03)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_cuda_is_the_cpu(dtype: torch.dtype, tolerance: float) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    mask = (torch.arange(300) % 11 < 6).to(torch.uint8)
    lengths = (130, 1, 169)
    mask[[129, 130, 299]] = 0
    results = []
    for device in (cpu, cuda):
        plan = build_plan(mask, lengths, ttt_length=3, compaction=True, device=device)
        wide = dtype if device == cuda else torch.float32
        generator = torch.Generator().manual_seed(0)
        sizes = [
            plan.steps[2].rows.numel(), *[plan.context.numel()] * 2,
            *[s.rows.numel() for s in plan.steps[1:]] * 2,
        ]  # fmt: skip
        inputs = [
            torch.randn(n, 4 if j == 0 else 2, 64, generator=generator)
            .to(dtype).to(device, wide).requires_grad_()
            for j, n in enumerate(sizes)
        ]  # fmt: skip
        out = attend(plan, 2, *inputs[:3], inputs[3:])
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
        grads = torch.autograd.grad(out, inputs, grad.to(dtype).to(device, wide))
        results.append([x.float().cpu() for x in (out, *grads)])
    for got, expected in zip(results[1], results[0], strict=True):
        scale = float(expected.abs().max())
        torch.testing.assert_close(got, expected, rtol=0, atol=tolerance * scale)


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.mark.parametrize(
    "scaling", [None, {"rope_type": "default"}, {"type": "linear", "factor": 4.0}, LLAMA3]
)
def test_rope_is_transformers(scaling: dict[str, object] | None) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    kind = (scaling or {}).get("rope_type", (scaling or {}).get("type", "default"))
    config = LlamaConfig(
        hidden_size=256,
        num_attention_heads=2,
        max_position_embeddings=131072,
        rope_parameters={**(scaling or {}), "rope_type": kind, "rope_theta": 500000.0},
    )
    positions = torch.tensor([0, 1, 7, 8191, 100003])
    q = torch.randn(1, 2, 5, 128)
    cos, sin = LlamaRotaryEmbedding(config)(q, positions[None])
    expected, _ = apply_rotary_pos_emb(q, q, cos, sin)
    tables = Rope(128, theta=500000.0, scaling=scaling).tables(positions)
    got = rotate(q[0].transpose(0, 1), tables).transpose(0, 1)[None]
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        ({"rope_type": "yarn"}, r"rope_type: wanted one of .*'llama3'.*, got 'yarn'"),
        ({"rope_type": "linear"}, r"rope_scaling.factor: wanted a positive number, got None"),
        ({**LLAMA3, "high_freq_factor": 1.0}, r"high_freq_factor: wanted more than .* got 1.0"),
    ],
)
def test_rope_refuses(scaling: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        inverse_frequencies(8, theta=1e4, scaling=scaling)


def test_rope_refuses_odd_width() -> None:
    with pytest.raises(ValueError, match="positive even number, got 7"):
        inverse_frequencies(7, theta=1e4)
