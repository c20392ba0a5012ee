"""The CUDA kernels of own_keys, run by the emulator, against ops/reference in float64.

Legend: n queries, n_j rows of step j, Hq / Hkv heads, D head dimension.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

import emulated
from own_keys_cases import OwnKeysCase, check_grads, check_merge, grads_input, own_keys_case

REASON = emulated.unavailable_reason()
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def forward_order() -> None:
    emulated.set_order("forward")


def merge(case: OwnKeysCase) -> tuple[Tensor, Tensor]:
    out, lse = case.out.clone(), case.lse.clone()
    emulated.own_keys_merge_(case.query, out, lse, *case.own)
    return out, lse


def check(case: OwnKeysCase) -> None:
    check_merge(case, merge(case))
    inputs = grads_input(case)
    check_grads(case, inputs, emulated.own_keys_grads_(*inputs, *case.own))


# Part of a team, 8 lanes; all of them; 16, all; 16, not all; 32.
@pytest.mark.parametrize("head_dim", [16, 64, 128, 80, 256])
@pytest.mark.parametrize("group", [1, 2, 4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_shapes(dtype: torch.dtype, group: int, head_dim: int) -> None:
    case = own_keys_case(
        7, heads=2 * group, kv_heads=2, head_dim=head_dim, depth=3, dtype=dtype, seed=group
    )
    check(case)


@pytest.mark.parametrize("depth", [1, 2, 6, 7, 63])
@pytest.mark.parametrize("num_rows", [1, 2, 19])  # 19 rows are more than a block serves
def test_steps(num_rows: int, depth: int) -> None:
    check(own_keys_case(num_rows, heads=6, kv_heads=3, head_dim=16, depth=depth, seed=depth))


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_queries(dtype: torch.dtype) -> None:
    """All that is to do is to clear the gradients of rows that nobody used."""
    case = own_keys_case(0, head_dim=64, dtype=dtype)
    grads = emulated.own_keys_grads_(*grads_input(case), *case.own)
    assert [len(x) for x in grads] == [6, 0, 2] * 2
    assert all((x == 0).all() for x in grads)
    assert merge(case)[0].shape == (0, 4, 64)


@pytest.mark.parametrize("spread", [0.0, 30.0])
def test_far_scores(spread: float) -> None:
    """Equal scores, and ones so far apart that all weights but one are 0."""
    check(own_keys_case(5, head_dim=64, depth=7, spread=spread))


def test_a_query_that_saw_no_key_yet() -> None:
    case = own_keys_case(3, head_dim=64)
    case.lse[1] = -torch.inf
    out, lse = merge(case)
    assert torch.isfinite(out).all() and torch.isfinite(lse).all()
    check_merge(case, (out, lse))


@pytest.mark.parametrize("bad", [-1, 9, 2**40])
def test_a_row_out_of_range_is_marked_and_not_touched(bad: int) -> None:
    case = own_keys_case(3, head_dim=64, depth=1)
    case = dataclasses.replace(case, rows=(torch.tensor([1, 2, 3]),))
    assert case.rows[0] is not None and case.keys[0].shape[0] == 5
    wrong = torch.tensor([bad, 2, 3]) if bad < 0 else torch.tensor([1, 2, bad])
    at = 0 if bad < 0 else 2
    broken = dataclasses.replace(case, rows=(wrong,))
    out, lse = merge(broken)
    others = [n for n in range(3) if n != at]
    assert out[at].isnan().all() and lse[at].isnan().all()
    assert torch.equal(out[others], merge(case)[0][others])
    inputs, right = grads_input(case), grads_input(case)
    grads = emulated.own_keys_grads_(*inputs, *broken.own)
    wanted = emulated.own_keys_grads_(*right, *case.own)
    assert inputs[4][at].isnan().all()
    assert torch.equal(inputs[4][others], right[4][others])
    for mine, true in zip(grads, wanted, strict=True):
        assert torch.equal(mine[[2]], true[[2]]), "the row of the query in the middle"


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"head_dim": 12}, "head_dim must be a multiple of 8, at most 256, on CUDA, got 12"),
        ({"head_dim": 264}, "head_dim must be a multiple of 8, at most 256, on CUDA, got 264"),
    ],
)
def test_refused_shapes(shape: dict[str, int], message: str) -> None:
    case = own_keys_case(2, **shape)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match=f"own_keys_merge: {message}"):
        merge(case)
    with pytest.raises(RuntimeError, match=f"own_keys_grads: {message}"):
        emulated.own_keys_grads_(*grads_input(case), *case.own)


def test_refuses_more_weights_than_shared_memory_holds() -> None:
    case = own_keys_case(1, heads=26, kv_heads=1, head_dim=64, depth=60)
    with pytest.raises(RuntimeError, match=r"per kv head times steps must be at most 1536 .* 1560"):
        emulated.own_keys_grads_(*grads_input(case), *case.own)
    check_merge(case, merge(case))


def test_refuses_misaligned_memory() -> None:
    case = own_keys_case(2, head_dim=64)
    memory = torch.randn(case.query.numel() + 1)
    moved = dataclasses.replace(case, query=memory[1:].view(case.query.shape))
    with pytest.raises(RuntimeError, match="own_keys_merge: tensors must be 16-byte aligned"):
        merge(moved)


def test_writes_nothing_outside_its_rows() -> None:
    case = own_keys_case(3, head_dim=64)
    memory, lse = torch.full((5, 4, 64), 77.0), torch.full((5, 4), 77.0)
    memory[1:4], lse[1:4] = case.out, case.lse
    emulated.own_keys_merge_(case.query, memory[1:4], lse[1:4], *case.own)
    assert (memory[[0, 4]] == 77).all() and (lse[[0, 4]] == 77).all()


@pytest.mark.parametrize("order", ["reverse", "random"])
def test_values_do_not_depend_on_the_order_of_threads(order: str) -> None:
    case = own_keys_case(9, heads=6, kv_heads=3, head_dim=64, depth=4, dtype=torch.bfloat16)

    def run() -> list[Tensor]:
        inputs = grads_input(case)
        return [*merge(case), *emulated.own_keys_grads_(*inputs, *case.own), inputs[4]]

    forward = run()
    emulated.set_order(order)
    assert all(torch.equal(a, b) for a, b in zip(forward, run(), strict=True))
