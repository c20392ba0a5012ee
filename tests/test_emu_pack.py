"""The packed collate's CUDA kernel, run by the emulator, against ops/reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import emulated
from specforge_ext.ops import reference
from test_ops_pack import encoded_samples, random_samples

REASON = emulated.unavailable_reason()
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

# One tile is 32768 elements. Vectors; single elements; samples without tokens; several tiles with a
# ragged last one; more tensors than one launch takes.
CASES = [
    ([5, 3], 96, 3),
    ([0, 4, 0, 1], 10, 5),
    ([300, 1, 150], 512, 4),
    ([1] * 40, 16, 1),
]


@pytest.mark.parametrize("order", emulated.ORDERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("lengths", "width", "groups"), CASES)
def test_pack_samples(
    order: str, dtype: torch.dtype, lengths: list[int], width: int, groups: int
) -> None:
    emulated.set_order(order)
    ids, masks, features = random_samples(lengths, [width, 3], [dtype, torch.float32])
    codes, group_scales = encoded_samples(lengths, width, groups)
    scales: list[list[Tensor | None]] = [[None, None] for _ in lengths]
    for k in range(1, len(lengths), 2):
        features[k][0], scales[k][0] = codes[k], group_scales[k]
    got = emulated.pack_samples(ids, masks, features, scales, [dtype, torch.float32])
    want = reference.pack_samples(ids, masks, features, scales=scales, dtype=dtype)
    for a, b in zip((*got[:4], *got[4]), (*want[:4], *want[4]), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def test_misaligned_sources_take_single_elements() -> None:
    memory = torch.randn(1 + 4 * 32)
    ids, masks, _ = random_samples([4], [], [])
    feature = memory[1:].view(4, 32)
    got = emulated.pack_samples(ids, masks, [[feature]], [[None]], [torch.float32])
    assert torch.equal(got[4][0], feature)


def test_no_samples_leave_one_bound() -> None:
    *_, cu_seqlens, _ = emulated.pack_samples([], [], [[]], [], [])
    assert cu_seqlens.tolist() == [0]
