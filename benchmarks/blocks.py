"""Attention of a block draft (DFlash), forward and backward, on one packed sample.

    python benchmarks/blocks.py [--json FILE] [--quick]

2048 context rows (512 with --quick), 128 anchors (32) of blocks of 16 rows, 16 query and 8 key
heads of 128. Every implementation gets projected queries, keys and values and gives the output and
the gradients of all five inputs, which are compared with float64 before anything is timed. What
depends on the anchors alone (our plan, the peers' dense masks) is made outside the timing, and
inside the measurement of memory. One thread, unless OMP_NUM_THREADS says otherwise.

specforge      SpecForge 0.2.0's attention with its mask, "eager" implementation
torch-sdpa     one call of torch's scaled dot product attention with the dense boolean mask; what
               SpecForge's "sdpa" implementation comes to on the CPU
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

# Before torch: CPU seconds must not hold threads that spin for a core which others use.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor

from common import BenchScript, Report, time_interleaved
from specforge_ext import ops
from specforge_ext.nn.block_attention import block_attention
from specforge_ext.nn.block_plan import BlockPlan, plan_blocks

BLOCK, HEADS, KV_HEADS, HEAD_DIM = 16, 16, 8, 128
FULL_SIZE, QUICK_SIZE = (2048, 128), (512, 32)
CASES: dict[str, tuple[torch.dtype, int | None]] = {
    "float32/full": (torch.float32, None),
    "float32/window512": (torch.float32, 512),
    "bfloat16/full": (torch.bfloat16, None),
    "bfloat16/window512": (torch.bfloat16, 512),
}
QUICK_CASES = ("float32/full",)
BASELINE = "torch-sdpa"
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}


@dataclass(frozen=True)
class Case:
    """inputs: query, context keys and values, block keys and values. grad: of the output."""

    plan: BlockPlan
    window: int | None
    inputs: list[Tensor]
    grad: Tensor


Attention = Callable[[list[Tensor]], Tensor]


def make_case(name: str, *, quick: bool) -> Case:
    dtype, window = CASES[name]
    context, num_anchors = QUICK_SIZE if quick else FULL_SIZE
    bounds = torch.tensor([0, context], dtype=torch.int32)
    drawn = ops.draw_anchors(
        torch.ones(context, dtype=torch.uint8),
        bounds,
        torch.tensor([1]),
        seed=0,
        step=0,
        max_anchors=num_anchors,
    )
    generator = torch.Generator().manual_seed(0)

    def randn(rows: int, heads: int) -> Tensor:
        return torch.randn(rows, heads, HEAD_DIM, generator=generator).to(dtype).requires_grad_()

    rows = num_anchors * BLOCK
    shapes = ((rows, HEADS), (context, KV_HEADS), (context, KV_HEADS))
    inputs = [randn(*shape) for shape in (*shapes, (rows, KV_HEADS), (rows, KV_HEADS))]
    plan = plan_blocks(*drawn, bounds, block_size=BLOCK)
    return Case(plan, window, inputs, randn(rows, HEADS).detach())


def native(case: Case) -> Attention:
    case.plan.calls(case.window)

    def attention(inputs: list[Tensor]) -> Tensor:
        q, context_k, context_v, block_k, block_v = inputs
        context, block = (context_k, context_v), (block_k, block_v)
        return block_attention(q, context, block, case.plan, case.window)

    return attention


def _dense_mask(case: Case) -> Tensor:
    """[1, 1, A * B, T + A * B] bool, by SpecForge."""
    from specforge.algorithms.common.dflash_family_model import create_dflash_sdpa_mask

    anchors = case.plan.anchors.long()[None]
    keep, device = torch.ones_like(anchors, dtype=torch.bool), torch.device("cpu")
    mask: Tensor = create_dflash_sdpa_mask(
        anchors, keep, case.plan.num_context, BLOCK, device, sliding_window=case.window
    )
    return mask


def _heads(inputs: list[Tensor]) -> list[Tensor]:
    """query, keys, values as [1, heads, rows, D]."""
    q, context_k, context_v, block_k, block_v = inputs
    joined = (q, torch.cat((context_k, block_k)), torch.cat((context_v, block_v)))
    return [x.transpose(0, 1)[None] for x in joined]


def torch_sdpa(case: Case) -> Attention:
    mask = _dense_mask(case)

    def attention(inputs: list[Tensor]) -> Tensor:
        out = torch.nn.functional.scaled_dot_product_attention(
            *_heads(inputs), attn_mask=mask, enable_gqa=True
        )
        return out[0].transpose(0, 1)

    return attention


def specforge(case: Case) -> Attention:
    from specforge.modeling.draft import dflash

    mask = _dense_mask(case)
    layer = SimpleNamespace(num_key_value_groups=HEADS // KV_HEADS, training=True)

    def attention(inputs: list[Tensor]) -> Tensor:
        q, k, v = _heads(inputs)
        bias, _ = dflash._prepare_dflash_eager_mask(mask, q.dtype)
        out: Tensor = dflash.eager_attention_forward(
            layer, q, k, v, bias, dropout=0.0, scaling=HEAD_DIM**-0.5
        )[0]
        return out[0]

    return attention


IMPLEMENTATIONS: dict[str, Callable[[Case], Attention]] = {
    BASELINE: torch_sdpa,
    "specforge": specforge,
    "specforge_ext": native,
}


def run(attention: Attention, inputs: list[Tensor], grad: Tensor) -> list[Tensor]:
    """Output and gradients."""
    out = attention(inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, grad)]


def truth(case: Case) -> list[Tensor]:
    """float64, two query heads at a time."""
    mask, parts = _dense_mask(case), []
    group = HEADS // KV_HEADS
    for head in range(KV_HEADS):
        heads = [slice(head * group, (head + 1) * group), *[slice(head, head + 1)] * 4]
        own = [
            x[:, h].detach().double().requires_grad_()
            for x, h in zip(case.inputs, heads, strict=True)
        ]

        def dense(inputs: list[Tensor]) -> Tensor:
            q, k, v = _heads(inputs)
            scores = (q @ k.mT * HEAD_DIM**-0.5).masked_fill(~mask, -torch.inf)
            return (scores.softmax(-1) @ v)[0].transpose(0, 1)

        parts.append(run(dense, own, case.grad[:, heads[0]].double()))
    return [torch.cat(tensors, dim=1) for tensors in zip(*parts, strict=True)]


def check(name: str, got: list[Tensor], wanted: list[Tensor], tolerance: float) -> float:
    """The largest error of an output or gradient, relative to its largest entry."""
    error = max(
        float((a.double() - b).abs().max() / b.abs().max())
        for a, b in zip(got, wanted, strict=True)
    )
    if error > tolerance:
        raise RuntimeError(f"blocks: {name} is wrong: relative error {error:.2e} > {tolerance}")
    return error


def visible_flops(case: Case) -> float:
    """Of the visible pairs alone: 4 D forward and 10 D backward per pair and query head."""
    slots = torch.arange(BLOCK)
    anchors = case.plan.anchors.long()[:, None]
    low = 0 if case.window is None else (anchors + slots - (case.window - 1)).clamp(min=0)
    own = BLOCK if case.window is None else slots + 1
    pairs = ((anchors - low).clamp(min=0) + own + 0 * slots).sum()
    return float(pairs) * 14 * HEAD_DIM * HEADS


def main() -> None:
    script = BenchScript(__doc__ or "")
    if script.peak:
        name, impl = script.peak
        case = make_case(name, quick=script.quick)
        attention = IMPLEMENTATIONS[impl]
        script.answer_peak(
            lambda: run(attention(case), case.inputs, case.grad), torch.device("cpu")
        )
        return
    report = Report("blocks", BASELINE)
    for name in QUICK_CASES if script.quick else CASES:
        case = make_case(name, quick=script.quick)
        wanted, errors, calls = truth(case), {}, {}
        for impl, make in IMPLEMENTATIONS.items():
            attention = make(case)
            calls[impl] = lambda a=attention, c=case: run(a, c.inputs, c.grad)  # type: ignore[misc]
            errors[impl] = check(impl, calls[impl](), wanted, TOLERANCE[CASES[name][0]])
        for impl, timing in time_interleaved(calls, rounds=3 if script.quick else 5).items():
            report.add(
                name,
                impl,
                timing,
                script.peak_bytes(name, impl),
                error=errors[impl],
                visible_gflop_per_cpu_s=visible_flops(case) / timing.cpu_s / 1e9,
            )
    if script.json:
        report.write(script.json)


if __name__ == "__main__":
    main()
