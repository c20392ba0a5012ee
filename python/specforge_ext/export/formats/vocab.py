"""d2t and t2d: offsets or ids, present or not, for a part of the vocabulary or all of it."""

from __future__ import annotations

import torch
from torch import Tensor

from specforge_ext.export.formats.portable import Portable
from specforge_ext.methods._export import count


def draft_vocab(
    t2d: Tensor | None, d2t: Tensor | None, *, vocab_size: int, size: int
) -> dict[str, Tensor]:
    """d2t [size] int64 offsets and t2d [vocab_size] bool, or nothing for the whole vocabulary.

    Word i of the draft is i + d2t[i]. A table of ids instead of offsets is taken if t2d proves it.
    ValueError where tables contradict each other or the sizes, do not ascend, or where without t2d
    nobody can tell offsets from ids.
    """
    if size == vocab_size:
        if d2t is not None and bool(d2t.any()):
            raise ValueError(
                f"d2t: wanted zeros, since draft_vocab_size is the whole {vocab_size}, got others"
            )
        if t2d is not None and not bool(t2d.all()):
            raise ValueError("t2d: wanted true for the whole vocabulary, got some false")
        return {}
    if d2t is None:
        raise ValueError(f"d2t: wanted it for {size} of {vocab_size} words, got none")
    if d2t.shape != (size,) or d2t.is_floating_point():
        raise ValueError(f"d2t: wanted [{size}] integers, got {list(d2t.shape)} {d2t.dtype}")
    table = d2t.long()
    readings = {"offsets": torch.arange(size) + table, "ids": table}
    fits = {how: said for how, said in readings.items() if _ascends(said, vocab_size)}
    if t2d is not None:
        if t2d.shape != (vocab_size,):
            raise ValueError(f"t2d: wanted [{vocab_size}], got {list(t2d.shape)}")
        marked = t2d.bool().nonzero()[:, 0]
        fits = {how: said for how, said in fits.items() if torch.equal(said, marked)}
    if not fits:
        known = "" if t2d is None else " of the words that t2d marks"
        raise ValueError(
            f"d2t: wanted ascending offsets or ids below {vocab_size}{known}, got others"
        )
    if len(fits) > 1:
        raise ValueError(
            "d2t: wanted t2d beside it, since its values could be offsets as well as ids"
        )
    words = next(iter(fits.values()))
    marks = torch.zeros(vocab_size, dtype=torch.bool)
    marks[words] = True
    return {"d2t": words - torch.arange(size), "t2d": marks}


def whole_vocab(draft: Portable) -> dict[str, Tensor]:
    """The tables of a draft that has none: every word is its own. Empty if it has them."""
    if "d2t" in draft.tensors:
        return {}
    size = count(draft.config, "vocab_size")
    return {
        "d2t": torch.zeros(size, dtype=torch.int64),
        "t2d": torch.ones(size, dtype=torch.bool),
    }


def _ascends(words: Tensor, vocab_size: int) -> bool:
    in_range = int(words[0]) >= 0 and int(words[-1]) < vocab_size
    return in_range and bool((words.diff() > 0).all())
