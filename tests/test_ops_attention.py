"""Attention over own keys on the CPU against its definition, in float64.

Legend: n queries, n_j rows of step j, Hq / Hkv heads, D head dimension.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from own_keys_cases import OwnKeysCase, check_grads, check_merge, grads_input, own_keys_case
from specforge_ext import _C, ops
from specforge_ext.ops import reference

DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(params=_C.available_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    _C.set_isa(request.param)
    yield request.param
    _C.set_isa("auto")


def merge(case: OwnKeysCase) -> tuple[Tensor, Tensor]:
    out, lse = case.out.clone(), case.lse.clone()
    ops.own_keys_merge_(case.query, out, lse, *case.own)
    return out, lse


def check(case: OwnKeysCase) -> None:
    check_merge(case, merge(case))
    inputs = grads_input(case)
    check_grads(case, inputs, ops.own_keys_grads_(*inputs, *case.own))


def test_definition_is_one_softmax() -> None:
    """Merged into attention over a context, it is attention over context and own keys at once."""
    case = own_keys_case(5, heads=4, kv_heads=2, depth=3).to(torch.float64, torch.float64)
    context_k, context_v = torch.randn(2, 9, 2, 16, dtype=torch.float64)

    def attend(*own: Tensor) -> tuple[Tensor, Tensor]:
        """keys, then values: each query's own, [5, 2, 16]."""
        half = len(own) // 2
        k, v = (
            torch.cat((context.expand(5, -1, -1, -1), *(x[:, None] for x in mine)), dim=1)
            for context, mine in ((context_k, own[:half]), (context_v, own[half:]))
        )
        k, v = k.repeat_interleave(2, dim=2), v.repeat_interleave(2, dim=2)
        scores = torch.einsum("nhd,nchd->nhc", case.query, k) * case.scale
        return torch.einsum("nhc,nchd->nhd", scores.softmax(-1), v), scores.logsumexp(-1)

    mine = [
        x if r is None else x[r]
        for x, r in zip((*case.keys, *case.values), case.rows * 2, strict=True)
    ]
    wanted = attend(*mine)
    got = reference.own_keys_merge(case.query, *attend(), *case.own)
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


def test_definition_of_gradients_is_autograd() -> None:
    case = own_keys_case(5, depth=4).to(torch.float64, torch.float64)
    leaves = [x.requires_grad_() for x in (case.query, *case.keys, *case.values)]
    out, lse = reference.own_keys_merge(case.query, case.out, case.lse, *case.own)
    wanted = torch.autograd.grad(out, leaves, case.grad_out)
    with torch.no_grad():
        query, keys, values = reference.own_keys_grads(
            case.grad_out, case.query, out, lse, *case.own
        )
    # autograd's gradient of the query has no part from `out`, which is an input here.
    torch.testing.assert_close([query, *keys, *values], list(wanted), rtol=1e-11, atol=1e-12)


# One element; below every vector; one vector of AVX-512; a vector and a tail; real heads.
@pytest.mark.parametrize("head_dim", [1, 7, 16, 24, 64, 128])
@pytest.mark.parametrize("group", [1, 2, 4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_shapes(isa: str, dtype: torch.dtype, group: int, head_dim: int) -> None:
    check(own_keys_case(7, heads=3 * group, kv_heads=3, head_dim=head_dim, dtype=dtype))


@pytest.mark.parametrize("depth", [1, 2, 7, 63])
@pytest.mark.parametrize("num_rows", [1, 2, 31, 33])  # tasks are of 16 rows
def test_steps(num_rows: int, depth: int) -> None:
    check(own_keys_case(num_rows, head_dim=16, depth=depth, seed=depth))


@pytest.mark.parametrize("heads", [1, 15, 16, 17, 40])
def test_heads(isa: str, heads: int) -> None:
    """Softmax runs over vectors of heads."""
    check(own_keys_case(3, heads=heads, kv_heads=1, head_dim=8))


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_queries(dtype: torch.dtype) -> None:
    case = own_keys_case(0, dtype=dtype)
    grads = ops.own_keys_grads_(*grads_input(case), *case.own)
    assert [len(x) for x in grads] == [6, 0, 2] * 2
    assert all((x == 0).all() for x in grads)
    assert merge(case)[0].shape == (0, 4, 16)


def test_no_own_keys() -> None:
    case = dataclasses.replace(own_keys_case(3, depth=1), keys=(), values=(), rows=())
    out, lse = merge(case)
    assert torch.equal(out, case.out) and torch.equal(lse, case.lse)
    inputs = grads_input(own_keys_case(3, depth=1))
    before = inputs[4].clone()
    assert ops.own_keys_grads_(*inputs, *case.own) == []
    assert torch.equal(inputs[4], before)


@pytest.mark.parametrize("spread", [0.0, 30.0])
def test_far_scores(isa: str, spread: float) -> None:
    """Equal scores, and ones so far apart that all weights but one are 0."""
    check(own_keys_case(5, depth=7, spread=spread))


def test_a_query_that_saw_no_key_yet(isa: str) -> None:
    case = own_keys_case(3)
    case.lse[1] = -torch.inf
    check_merge(case, merge(case))


def test_rows_that_no_query_uses_are_not_read(isa: str) -> None:
    case, clean = own_keys_case(4), own_keys_case(4)
    for j, rows in enumerate(case.rows):
        if rows is not None:
            unused = torch.ones(len(case.keys[j]), dtype=torch.bool)
            unused[rows] = False
            case.keys[j][unused], case.values[j][unused] = torch.nan, torch.nan
    assert all(torch.equal(a, b) for a, b in zip(merge(case), merge(clean), strict=True))
    grads = [ops.own_keys_grads_(*grads_input(clean), *x.own) for x in (case, clean)]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("num_rows", [0, 1, 20])
def test_every_gradient_is_written(num_rows: int) -> None:
    case = own_keys_case(num_rows, depth=4)
    grads = [[torch.full_like(x, torch.nan) for x in xs] for xs in (case.keys, case.values)]
    *own, scale = (list(x) if isinstance(x, tuple) else x for x in case.own)
    _C.own_keys_grads(*grads_input(case), *own, *grads, scale)
    assert all(torch.isfinite(x).all() for xs in grads for x in xs)


def test_threads_do_not_change_a_bit() -> None:
    case = own_keys_case(600, heads=8, kv_heads=4, head_dim=64, depth=6, dtype=torch.bfloat16)
    results = []
    for threads in (1, 2, 7):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        inputs = grads_input(case)
        results.append([*merge(case), *ops.own_keys_grads_(*inputs, *case.own), inputs[4]])
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_compiles() -> None:
    case = own_keys_case(4, depth=2)

    def step(query: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, list[Tensor]]:
        out, lse = out.clone(), lse.clone()
        ops.own_keys_merge_(query, out, lse, *case.own)
        grad_query = torch.zeros_like(query)
        own = ops.own_keys_grads_(case.grad_out, query, out, lse, grad_query, *case.own)
        return grad_query, own

    inputs = case.query, case.out, case.lse
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*inputs), step(*inputs), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"query": torch.zeros(3, 4, 16, dtype=torch.float64)},
            r"query must be f32 or bf16, got \[3, 4, 16\] f64",
        ),
        (
            {"out": torch.zeros(3, 4, 8)},
            r"out must be \[rows=3, heads=4, head_dim=16\] f32, got \[3, 4, 8\] f32",
        ),
        (
            {"out": torch.zeros(3, 4, 16, dtype=torch.bfloat16)},
            r"out must be f32, got \[3, 4, 16\] bf16",
        ),
        ({"lse": torch.zeros(4, 3)}, r"lse must be \[rows=3, heads=4\] f32, got \[4, 3\] f32"),
        (
            {"lse": torch.zeros(4, 3).T},
            r"lse must be contiguous, got \[3, 4\] f32 with strides \[1, 3\]",
        ),
        (
            {"keys": (torch.zeros(4, 2, 16),), "rows": (None,)},
            r"keys\[0\] must be \[own_rows=3, kv_heads, head_dim=16\] f32, got \[4, 2, 16\] f32",
        ),
        (
            {"values": (torch.zeros(4, 2, 16),)},
            r"values\[0\] must be \[own_rows=5, kv_heads=2, head_dim=16\] f32, got \[4, 2, 16\]",
        ),
        (
            {"keys": (torch.zeros(5, 3, 16),), "values": (torch.zeros(5, 3, 16),)},
            "kv_heads must divide the heads of query, got 3",
        ),
        ({"rows": (torch.tensor([0, 1]),)}, r"rows\[0\] must be \[rows=3\] i64, got \[2\] i64"),
        (
            {"rows": (torch.tensor([0, 1, 2], dtype=torch.int32),)},
            r"rows\[0\] must be i64, got \[3\] i32",
        ),
        (
            {"rows": (torch.tensor([0, 2, 5]),)},
            r"rows\[0\] must ascend in \[0, 5\), got 5 at row 2",
        ),
        (
            {"rows": (torch.tensor([-1, 2, 4]),)},
            r"rows\[0\] must ascend in \[0, 5\), got -1 at row 0",
        ),
        (
            {"rows": (torch.tensor([1, 3, 3]),)},
            r"rows\[0\] must ascend in \[0, 5\), got 3 at row 2",
        ),
        ({"rows": (torch.tensor(1),)}, r"rows\[0\] must be \[rows\] i64, got a scalar"),
        ({"rows": ()}, "keys, values and rows must be as many, got 1, 1 and 0"),
        (
            {"keys": (torch.zeros(5, 2, 16),) * 64}
            | {"values": (torch.zeros(5, 2, 16),) * 64, "rows": (torch.tensor([0, 1, 2]),) * 64},
            "there must be at most 63 steps of own keys, got 64",
        ),
    ],
)
def test_refused(changes: dict[str, object], message: str) -> None:
    case = own_keys_case(3, depth=1)
    assert case.keys[0].shape[0] == 5
    case = dataclasses.replace(case, **changes)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=f"own_keys_merge: {message}"):
        ops.own_keys_merge_(case.query, case.out, case.lse, *case.own)
    inputs = (case.grad_out, case.query, case.out, case.lse, case.grad_query)
    with pytest.raises(ValueError, match=f"own_keys_grads: {message}|must be .*f64"):
        ops.own_keys_grads_(*inputs, *case.own)


def test_refused_gradients() -> None:
    case = own_keys_case(3, depth=1)
    inputs = list(grads_input(case))
    inputs[4] = torch.zeros(3, 4, 8)
    with pytest.raises(ValueError, match=r"own_keys_grads: grad_query must be \[rows=3, heads=4"):
        ops.own_keys_grads_(*inputs, *case.own)
    fixed = (*grads_input(case), list(case.keys), list(case.values), list(case.rows))
    with pytest.raises(ValueError, match="grad_keys and grad_values must be as many, got 0 and 1"):
        _C.own_keys_grads(*fixed, [], [case.values[0].clone()], 1.0)
    with pytest.raises(ValueError, match="one gradient for each of own keys, got 0"):
        _C.own_keys_grads(*fixed, [], [], 1.0)
    small = torch.zeros(4, 2, 16)
    with pytest.raises(ValueError, match=r"grad_keys\[0\] must be \[own_rows=5, kv_heads=2"):
        _C.own_keys_grads(*fixed, [small], [small], 1.0)
    with pytest.raises(ValueError, match=r"grad_values\[0\] must be \[own_rows=5, kv_heads=2"):
        _C.own_keys_grads(*fixed, [case.keys[0].clone()], [small], 1.0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
@pytest.mark.parametrize("head_dim", [16, 64, 80, 128, 256])
@pytest.mark.parametrize("dtype", DTYPES)
def test_cuda(dtype: torch.dtype, head_dim: int) -> None:
    case = own_keys_case(2001, heads=8, head_dim=head_dim, depth=6, dtype=dtype)

    def on_gpu(tensors: tuple[Tensor | None, ...]) -> list[Tensor | None]:
        return [None if x is None else x.cuda() for x in tensors]

    own = *(on_gpu(x) for x in (case.keys, case.values, case.rows)), case.scale
    query, out, lse = on_gpu((case.query, case.out, case.lse))
    ops.own_keys_merge_(query, out, lse, *own)
    check_merge(case, (out.cpu(), lse.cpu()))  # type: ignore[union-attr]
    inputs = on_gpu(grads_input(case))
    grads = ops.own_keys_grads_(*inputs, *own)
    inputs_back = [x.cpu() for x in inputs if x is not None]
    check_grads(case, inputs_back, [x.cpu() for x in grads])
