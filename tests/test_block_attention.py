"""Block attention against one dense softmax in float64, and its leaks by perturbation.

Legend of shapes: T context rows, A blocks, B rows of a block, Hq / Hkv heads, D head dimension.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

import emulated
from ops_helpers import assert_no_worse
from specforge_ext.nn import attend, block_plan
from specforge_ext.nn import block_attention as module
from specforge_ext.nn.attend import Masking
from specforge_ext.nn.block_attention import block_attention, flex_block_attention
from specforge_ext.nn.block_plan import BlockPlan, plan_blocks
from specforge_ext.ops import reference
from specforge_ext.records import lengths_to_cu_seqlens
from test_ops_blocks import random_anchors

# Runs cut many times, also to single blocks; samples without tokens and without anchors; a sample
# that is all anchors, among them its first row; blocks that overrun the end of their sample; a
# block without context.
CASES = {
    "deep": ([0, 300, 37, 60], [0, 40, 0, 5]),
    "sparse": ([600], [4]),
    "crowded": ([50, 9], [50, 9]),
    "one": ([1], [1]),
}
HEADS, DIM = 4, 8


def plan_of(case: str, block_size: int) -> BlockPlan:
    lengths, counts = CASES[case]
    return plan_blocks(*random_anchors(lengths, counts, seed=1), block_size=block_size)


def tensors(plan: BlockPlan, kv_heads: int, seed: int = 0) -> list[Tensor]:
    """query, context keys and values, block keys and values, float64."""
    generator = torch.Generator().manual_seed(seed)

    def randn(rows: int, heads: int) -> Tensor:
        return torch.randn(rows, heads, DIM, dtype=torch.float64, generator=generator)

    context, queries = plan.num_context, plan.num_queries
    return [
        randn(queries, HEADS),
        *(randn(context, kv_heads) for _ in range(2)),
        *(randn(queries, kv_heads) for _ in range(2)),
    ]


def ours(plan: BlockPlan, window: int | None, inputs: list[Tensor]) -> Tensor:
    q, context_k, context_v, block_k, block_v = inputs
    return block_attention(q, (context_k, context_v), (block_k, block_v), plan, window)


def dense(plan: BlockPlan, window: int | None, inputs: list[Tensor]) -> Tensor:
    """One softmax over all visible keys, in the dtype of the inputs."""
    q, context_k, context_v, block_k, block_v = inputs
    visible = reference.block_visibility(
        plan.anchors,
        plan.cu_anchors,
        plan.cu_seqlens,
        num_context=plan.num_context,
        block_size=plan.block_size,
        window=window,
    )
    group = q.shape[1] // context_k.shape[1]
    keys = torch.cat((context_k, block_k)).repeat_interleave(group, 1)
    values = torch.cat((context_v, block_v)).repeat_interleave(group, 1)
    scores = torch.einsum("qhd,khd->hqk", q, keys) * DIM**-0.5
    p = scores.masked_fill(~visible, -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", p, values)


Attention = Callable[[BlockPlan, int | None, list[Tensor]], Tensor]


def with_gradients(
    attention: Attention, plan: BlockPlan, window: int | None, inputs: list[Tensor]
) -> list[Tensor]:
    """The output and the gradients of all five inputs."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = attention(plan, window, leaves)
    generator = torch.Generator().manual_seed(5)
    grad = torch.randn(out.shape, dtype=torch.float64, generator=generator).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


@pytest.mark.parametrize("window", [None, 1, 6, 40, 1000])
@pytest.mark.parametrize("block_size", [1, 4, 16])
@pytest.mark.parametrize("case", CASES)
def test_is_dense(case: str, block_size: int, window: int | None) -> None:
    plan = plan_of(case, block_size)
    inputs = tensors(plan, 2)
    for got, wanted in zip(
        with_gradients(ours, plan, window, inputs),
        with_gradients(dense, plan, window, inputs),
        strict=True,
    ):
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("kv_heads", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_is_as_exact_as_dense(dtype: torch.dtype, kv_heads: int, window: int | None) -> None:
    plan = plan_of("deep", 16)
    inputs = [x.to(dtype) for x in tensors(plan, kv_heads)]
    truth = with_gradients(dense, plan, window, [x.double() for x in inputs])
    baseline = with_gradients(dense, plan, window, inputs)
    slack = 1e-6 if dtype == torch.float32 else 4e-3  # torch's flash takes exp to 20 bits
    for got, true, base in zip(
        with_gradients(ours, plan, window, inputs), truth, baseline, strict=True
    ):
        assert got.dtype == dtype
        assert_no_worse(got, true, base, slack=slack)


@pytest.mark.parametrize("window", [None, 5])
def test_gradients_by_finite_differences(window: int | None) -> None:
    plan = plan_blocks(*random_anchors([7, 3], [3, 1], seed=0), block_size=3)
    inputs = [x[:, :2].requires_grad_() for x in tensors(plan, 2)]
    assert torch.autograd.gradcheck(lambda *x: ours(plan, window, list(x)), inputs)


@pytest.mark.parametrize("parameters", [(2, 1, 1), (2, 8, 200), (3, 16, 4), (5, 10_000, 1)])
@pytest.mark.parametrize("window", [None, 30])
def test_the_cut_changes_nothing(
    window: int | None, parameters: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every visible pair is in exactly one call, however runs are cut."""
    for name, value in zip(("_PARTS", "_RAGGED_KEYS", "_MIN_DENSE_KEYS"), parameters, strict=True):
        monkeypatch.setattr(block_plan, name, value)
    plan = plan_of("deep", 4)
    inputs = tensors(plan, 2)
    got = with_gradients(ours, plan, window, inputs)
    for mine, wanted in zip(got, with_gradients(dense, plan, window, inputs), strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-12, atol=1e-12)
    visits = torch.zeros(plan.num_blocks, plan.num_context, dtype=torch.int64)
    for call in plan.calls(window):
        visits[call.first : call.last, call.keys] += 1
    assert visits.max() == 1


def test_few_scores_are_in_vain() -> None:
    """What the calls compute, against what is visible: 1024 rows, 64 blocks."""
    plan = plan_blocks(*random_anchors([1024], [64], seed=0), block_size=16)
    computed = sum((c.last - c.first) * (c.keys.stop - c.keys.start) for c in plan.calls(None))
    assert computed < 1.15 * int(plan.anchors.sum())
    assert len(plan.calls(None)) < 40


@pytest.mark.parametrize("window", [None, 20])
def test_packed_equals_separate(window: int | None) -> None:
    lengths, counts = [90, 41], [12, 7]
    anchors, cu_anchors, cu_seqlens = random_anchors(lengths, counts, seed=2)
    plan = plan_blocks(anchors, cu_anchors, cu_seqlens, block_size=4)
    inputs = tensors(plan, 2)
    together = with_gradients(ours, plan, window, inputs)
    parts = []
    for k, (begin, end) in enumerate(pairwise(cu_seqlens.tolist())):
        first, last = cu_anchors[k : k + 2].tolist()
        alone = plan_blocks(
            anchors[first:last] - begin,
            lengths_to_cu_seqlens([last - first]),
            lengths_to_cu_seqlens([end - begin]),
            block_size=4,
        )
        rows, context = slice(4 * first, 4 * last), slice(begin, end)
        cuts = (rows, context, context, rows, rows)
        own = [x[cut] for x, cut in zip(inputs, cuts, strict=True)]
        leaves = [x.clone().requires_grad_() for x in own]
        out = ours(alone, window, leaves)
        generator = torch.Generator().manual_seed(5)
        grad = torch.randn(together[0].shape, dtype=torch.float64, generator=generator)[rows]
        parts.append([out.detach(), *torch.autograd.grad(out, leaves, grad)])
    for whole, *pieces in zip(together, *parts, strict=True):
        torch.testing.assert_close(whole, torch.cat(pieces), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("window", [None, 9])
def test_no_leak(window: int | None) -> None:
    """Noise in a block, and in the context from an anchor on, reaches nobody who may not see it."""
    plan = plan_blocks(*random_anchors([120, 30], [9, 3], seed=3), block_size=4)
    inputs = tensors(plan, 2)
    clean = ours(plan, window, inputs)
    anchors, first_of_second = plan.anchors.tolist(), int(plan.cu_seqlens[1])
    for block, anchor in enumerate(anchors):
        own = slice(4 * block, 4 * block + 4)
        spoilt = [x.clone() for x in inputs]
        spoilt[3][own] += 100.0
        spoilt[4][own] += 100.0
        changed = (ours(plan, window, spoilt) != clean).flatten(1).any(1)
        assert changed[own].all() and changed.sum() == 4
        spoilt = [x.clone() for x in inputs]
        end = first_of_second if anchor < first_of_second else plan.num_context
        spoilt[1][anchor:end] += 100.0
        spoilt[2][anchor:end] += 100.0
        changed = (ours(plan, window, spoilt) != clean).flatten(1).any(1).view(-1, 4).any(1)
        may_change = torch.tensor([anchor < other < end for other in anchors])
        assert not (changed & ~may_change).any()
        assert changed.any() == may_change.any()


def test_slots_past_the_end_of_a_sample_do_not_reach_the_next() -> None:
    """An anchor two rows before the end: its block overruns into the rows of the next sample."""
    bounds, counts = lengths_to_cu_seqlens([10, 10]), lengths_to_cu_seqlens([1, 0])
    plan = plan_blocks(torch.tensor([8], dtype=torch.int32), counts, bounds, block_size=16)
    inputs = tensors(plan, 2)
    clean = ours(plan, 4, inputs)
    inputs[1][10:], inputs[2][10:] = 1e3, 1e3
    assert torch.equal(ours(plan, 4, inputs), clean)


def test_no_blocks_and_no_context() -> None:
    none = torch.zeros(0, dtype=torch.int32)
    plan = plan_blocks(none, lengths_to_cu_seqlens([0]), lengths_to_cu_seqlens([5]), block_size=4)
    out, *grads = with_gradients(ours, plan, None, tensors(plan, 2))
    assert out.shape == (0, HEADS, DIM)
    assert [g.shape[0] for g in grads] == [0, 5, 5, 0, 0]
    assert not any(g.any() for g in grads)
    assert flex_block_attention(
        tensors(plan, 2)[0], (out, out), (out, out), plan, None
    ).shape == out.shape  # fmt: skip


@pytest.mark.parametrize("window", [None, 12])
def test_math_path_is_the_flash_path(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """In chunks of few rows; CUDA uses it for float32 and float64."""
    plan = plan_of("deep", 4)
    inputs = tensors(plan, 2)
    wanted = with_gradients(ours, plan, window, inputs)
    monkeypatch.setattr(attend, "_MATH_SCORES", 3000)
    monkeypatch.setattr(module, "attend", attend.math_attend)
    monkeypatch.setattr(module, "attend_backward", attend.math_attend_backward)
    for got, true in zip(with_gradients(ours, plan, window, inputs), wanted, strict=True):
        torch.testing.assert_close(got, true, rtol=1e-12, atol=1e-12)


def test_backward_of_a_row_that_sees_nothing_is_zero() -> None:
    q, k, v = (torch.randn(1, 2, 3, 8) for _ in range(3))
    bias = torch.full((3, 3), attend.HIDDEN)
    bias[1:] = 0.0
    out, lse = attend.attend(q, k, v, 1.0, Masking(bias))
    assert torch.isfinite(out).all() and (lse[:, :, 0] < -1e29).all()
    merged = torch.logaddexp(lse, torch.zeros_like(lse))
    dq, *_ = attend.attend_backward(out, q, k, v, out, merged, 1.0, Masking(bias))
    assert (dq[:, :, 0] == 0).all() and (dq[:, :, 1] != 0).any()


@pytest.mark.parametrize(("case", "window"), [("deep", None), ("deep", 6), ("crowded", 6)])
def test_flex_attention_with_the_plans_mask(case: str, window: int | None) -> None:
    """Uncompiled, it follows mask_mod alone; torch has no backward of it on the CPU."""
    plan = plan_of(case, 4)
    q, context_k, context_v, block_k, block_v = inputs = tensors(plan, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is slow uncompiled
        got = flex_block_attention(q, (context_k, context_v), (block_k, block_v), plan, window)
    torch.testing.assert_close(got, dense(plan, window, inputs), rtol=1e-12, atol=1e-12)


@pytest.mark.skipif(
    emulated.unavailable_reason() is not None, reason="torch.compile needs a compiler"
)
def test_compiled_flex_attention_with_the_plans_mask() -> None:
    """Compiled, it visits only the tiles of the block mask and leaves mask_mod out of full ones."""
    anchors, counts = [150, 160, 171, 180, 200, 201, 230, 299, 305, 336], [8, 2]
    bounds, firsts = lengths_to_cu_seqlens([300, 37]), lengths_to_cu_seqlens(counts)
    plan = plan_blocks(torch.tensor(anchors, dtype=torch.int32), firsts, bounds, block_size=16)
    mask = plan.block_mask(None)
    assert mask.full_kv_num_blocks is not None and mask.full_kv_num_blocks.any()
    q, context_k, context_v, block_k, block_v = inputs = [x.float() for x in tensors(plan, 2)]
    got = flex_block_attention(
        q,
        (context_k, context_v),
        (block_k, block_v),
        plan,
        None,
        flex=torch.compile(flex_attention, dynamic=False),
    )
    torch.testing.assert_close(got, ours(plan, None, inputs), rtol=0, atol=2e-6)


def test_block_attention_names_what_does_not_fit() -> None:
    plan = plan_of("crowded", 4)
    q, context_k, context_v, block_k, block_v = tensors(plan, 2)
    for inputs, message in (
        (
            (q[1:], context_k, context_v, block_k, block_v),
            r"query must be \[236, 4, 8\], got \[235",
        ),
        (
            (q, context_k, context_v[1:], block_k, block_v),
            r"context must be \[59, 2, 8\], got \[58",
        ),
        ((q, context_k, context_v, block_k[..., 1:], block_v), r"block must be \[236, 2, 8\], got"),
        ((q[:, 1:], context_k, context_v, block_k, block_v), "multiple of key heads, got 3 and 2"),
    ):
        with pytest.raises(ValueError, match=message):
            ours(plan, None, list(inputs))
    with pytest.raises(ValueError, match="window must be at least 1 or None, got 0"):
        ours(plan, 0, tensors(plan, 2))


def test_plan_names_what_does_not_fit() -> None:
    bounds, counts = lengths_to_cu_seqlens([5, 5]), lengths_to_cu_seqlens([1, 2])

    def plan(anchors: list[int], block_size: int = 4, cu_anchors: Tensor = counts) -> None:
        plan_blocks(
            torch.tensor(anchors, dtype=torch.int32), cu_anchors, bounds, block_size=block_size
        )

    plan([4, 5, 9])
    for anchors in ([4, 6, 5], [5, 6, 7], [4, 6, 10], [4, 6, 6]):
        with pytest.raises(
            ValueError, match=r"anchors of sample \d must ascend within \[\d, \d+\)"
        ):
            plan(anchors)
    with pytest.raises(ValueError, match="block_size must be at least 1, got 0"):
        plan([4, 5, 9], block_size=0)
    with pytest.raises(ValueError, match=r"cu_anchors must be 3 sums from 0 to 2, got \[0, 1, 3\]"):
        plan([4, 5])
    with pytest.raises(ValueError, match="cu_anchors must be 3 sums from 0 to 3"):
        plan([4, 5, 9], cu_anchors=counts[:2])
