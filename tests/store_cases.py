"""Samples for the tests of stores: their content follows from their number."""

from __future__ import annotations

import os

import torch

from specforge_ext.records import DTYPES, Prompt, Sample

LAYOUT_HASH = "0123456789abcdef"
SLOWDOWN = float(os.environ.get("SPECFORGE_EXT_TEST_SLOWDOWN", "1"))
"""How much longer than elsewhere things may take: 1 but on an emulated processor."""
TIMEOUT_S = 20.0 * SLOWDOWN


def make_prompt(index: int, num_tokens: int) -> Prompt:
    generator = torch.Generator().manual_seed(index)
    ids = torch.randint(0, 1 << 30, (num_tokens,), generator=generator, dtype=torch.int32)
    return Prompt(f"sample-{index}", ids, (ids % 2).to(torch.uint8))


def make_sample(index: int, num_tokens: int = 7, width: int = 33) -> Sample:
    """One feature of each dtype, and one without width. Bits are random: NaNs must travel too."""
    generator = torch.Generator().manual_seed(index)

    def random_bits(dtype: torch.dtype) -> torch.Tensor:
        nbytes = num_tokens * width * dtype.itemsize
        bits = torch.randint(0, 256, (nbytes,), generator=generator, dtype=torch.uint8)
        return bits.view(dtype).view(num_tokens, width)

    features = {name: random_bits(dtype) for name, dtype in DTYPES.items()}
    return Sample(make_prompt(index, num_tokens), {**features, "empty": torch.empty(num_tokens, 0)})


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(*(t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)))


def same_sample(a: Sample, b: Sample) -> bool:
    return (
        a.prompt.sample_id == b.prompt.sample_id
        and torch.equal(a.prompt.input_ids, b.prompt.input_ids)
        and torch.equal(a.prompt.loss_mask, b.prompt.loss_mask)
        and a.features.keys() == b.features.keys()
        and all(same_bytes(a.features[name], b.features[name]) for name in a.features)
    )
