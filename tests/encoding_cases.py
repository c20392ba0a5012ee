"""Samples for the tests of encodings: hidden states with outlier channels, as transport.md has."""

from __future__ import annotations

import torch
from torch import Tensor

from specforge_ext import ops
from specforge_ext.records import EncodedFeature, FeatureLayout, FeatureSpec, Sample, StoredSample
from store_cases import make_prompt

LAYOUT = FeatureLayout(
    (
        FeatureSpec("aux", (1, 2, 3), 3 * 40, "bfloat16"),
        FeatureSpec("last", (4,), 40, "float32", final_norm=True),
        FeatureSpec("half", (1, 2), 2 * 40, "float16"),
    )
)
DTYPES = {"aux": torch.bfloat16, "last": torch.float32, "half": torch.float16}


def outliers(num_tokens: int, width: int, seed: int) -> Tensor:
    """[num_tokens, width] float32: normal, one channel in a hundred a hundred times as large."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(num_tokens, width, generator=generator)
    values[:, ::100] *= 100
    return values


def make_feature_sample(index: int, num_tokens: int = 7) -> Sample:
    """A sample of LAYOUT."""
    features = {
        spec.name: outliers(num_tokens, spec.width, index).to(DTYPES[spec.name])
        for spec in LAYOUT.features
    }
    return Sample(make_prompt(index, num_tokens), features)


def rounded(sample: Sample) -> dict[str, Tensor]:
    """What is left of the features on the other side of the encoding."""
    return {
        name: ops.fp8_unpack(ops.fp8_pack(x, layers=LAYOUT.layers[name]), dtype=x.dtype)
        for name, x in sample.features.items()
    }


def codes_and_scales(sample: StoredSample) -> dict[str, tuple[Tensor, Tensor]]:
    out = {}
    for name, feature in sample.features.items():
        assert isinstance(feature, EncodedFeature)
        out[name] = feature.codes, feature.scales
    return out
