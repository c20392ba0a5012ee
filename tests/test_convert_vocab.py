"""Tables of the draft's vocabulary in foreign checkpoints: offsets, ids, or neither."""

from __future__ import annotations

import pytest
import torch

from specforge_ext.export.formats.vocab import draft_vocab


def test_draft_vocab_tells_offsets_from_ids() -> None:
    words = torch.tensor([1, 2, 5, 9])
    offsets, marks = words - torch.arange(4), torch.zeros(12, dtype=torch.bool)
    marks[words] = True
    for table in (offsets, words):
        for t2d in (marks, None):
            got = draft_vocab(t2d, table.int(), vocab_size=12, size=4)
            assert torch.equal(got["d2t"], offsets) and torch.equal(got["t2d"], marks)
    assert draft_vocab(torch.ones(4).bool(), torch.zeros(4).long(), vocab_size=4, size=4) == {}


@pytest.mark.parametrize(
    ("t2d", "d2t", "size", "message"),
    [
        (None, [0, 2, 4], 3, "d2t: wanted t2d beside it, since its values could be offsets as"),
        (None, None, 3, "d2t: wanted it for 3 of 12 words, got none"),
        (None, [0, 2], 3, r"d2t: wanted \[3\] integers, got \[2\]"),
        (None, [9, 2, 4], 3, "d2t: wanted ascending offsets or ids below 12, got others"),
        ([1] * 3 + [0] * 9, [0, 0, 1], 3, "below 12 of the words that t2d marks, got others"),
        ([1] * 3, [0, 0, 1], 3, r"t2d: wanted \[12\], got \[3\]"),
        (None, [0] * 11 + [1], 12, "d2t: wanted zeros, since draft_vocab_size is the whole 12"),
        ([0] * 12, None, 12, "t2d: wanted true for the whole vocabulary, got some false"),
    ],
)
def test_draft_vocab_refuses(
    t2d: list[int] | None, d2t: list[int] | None, size: int, message: str
) -> None:
    marks = None if t2d is None else torch.tensor(t2d).bool()
    table = None if d2t is None else torch.tensor(d2t)
    with pytest.raises(ValueError, match=message):
        draft_vocab(marks, table, vocab_size=12, size=size)
