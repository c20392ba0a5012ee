"""How rows are cut into chunks, and what the buffers and products under `draft_loss` rest on."""

from __future__ import annotations

import random

import pytest
import torch

from specforge_ext import _C
from specforge_ext.ops import _matmul
from specforge_ext.ops._chunks import Chunk, cut, default_workspace_bytes


def cost(chunk: Chunk, row_bytes: int, teacher_bytes: int) -> int:
    return chunk.num_rows * row_bytes + chunk.num_teachers * teacher_bytes


@pytest.mark.parametrize("seed", range(30))
def test_chunks_cover_fit_and_are_as_few_as_can_be(seed: int) -> None:
    rng = random.Random(seed)
    rows, teachers = rng.randint(1, 60), rng.randint(1, 25)
    index = sorted(rng.randrange(teachers) for _ in range(rows))
    row_bytes, teacher_bytes = rng.choice([(4, 4), (2, 4), (4, 2)])
    workspace = rng.randint(row_bytes + teacher_bytes, 100)
    chunks = cut(
        torch.tensor(index, dtype=torch.int32),
        row_bytes=row_bytes,
        teacher_bytes=teacher_bytes,
        workspace_bytes=workspace,
    )
    assert [n for c in chunks for n in range(c.row, c.row_end)] == list(range(rows))
    for chunk in chunks:
        assert cost(chunk, row_bytes, teacher_bytes) <= workspace
        assert (chunk.teacher, chunk.teacher_end - 1) == (
            index[chunk.row],
            index[chunk.row_end - 1],
        )
    longest, begin = 0, 0
    while begin < rows:  # taking as many rows as fit, again and again, is optimal
        end = begin + 1
        while end < rows and (
            (end + 1 - begin) * row_bytes + (index[end] - index[begin] + 1) * teacher_bytes
            <= workspace
        ):
            end += 1
        begin, longest = end, longest + 1
    assert len(chunks) <= longest


def test_chunks_are_even() -> None:
    """Seven students a teacher: 1133 rows in a workspace of 384 would greedily end in a rest."""
    index = torch.arange(1133) // 7
    chunks = cut(index, row_bytes=1, teacher_bytes=1, workspace_bytes=384)
    costs = [cost(chunk, 1, 1) for chunk in chunks]
    assert len(chunks) == 4 and max(costs) - min(costs) <= 8


def test_no_rows_no_chunks() -> None:
    none = torch.zeros(0, dtype=torch.int32)
    assert cut(none, row_bytes=4, teacher_bytes=4, workspace_bytes=8) == []


def test_the_default_workspace_grows_with_the_vocabulary_only() -> None:
    assert default_workspace_bytes(torch.device("cpu"), vocab=32000) == 384 * 32000 * 4
    assert default_workspace_bytes(torch.device("cuda"), vocab=32000) == 2560 * 32000 * 2


def test_huge_pages_are_only_advice() -> None:
    for numel in (0, 1, 1000, 3 << 20):
        tensor = torch.arange(numel)
        _C.advise_huge_pages(tensor[1:])
        assert torch.equal(tensor, torch.arange(numel))
    with pytest.raises(ValueError, match=r"advise_huge_pages: tensor must be contiguous"):
        _C.advise_huge_pages(torch.zeros(4, 4).t())


def test_bf16_is_not_fast_without_the_instructions_for_it() -> None:
    """As on a CPU that has none: `benchmarks/loss.py` and the float32 logits rest on this."""
    try:
        _C.set_isa("plain")
        assert not _C.has_fast_bf16()
        assert _matmul.logits_dtype(torch.zeros(1, dtype=torch.bfloat16)) == torch.float32
    finally:
        _C.set_isa("auto")
