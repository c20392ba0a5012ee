"""What the contract of methods is tested with: batches, a data plan and a target of any layout."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import eagle3_cases
from specforge_ext.config import Config
from specforge_ext.engines.base import TargetOutput
from specforge_ext.methods import METHODS, Method
from specforge_ext.records import (
    DTYPES,
    DraftVocab,
    FeatureLayout,
    PackedBatch,
    Prompt,
    TargetWeights,
    lengths_to_cu_seqlens,
)
from specforge_ext.trainer.data import StepData
from toy_decoding import TableTarget

VOCAB = eagle3_cases.VOCAB
LENGTHS = (24, 3, 17, 1, 30, 9)
"""Of the samples of every step, the same six."""

Layout = list[list[list[int]]]
"""[rank][micro-batch] -> indices of the step's samples."""


@dataclass(frozen=True)
class Subject:
    """A method as a recipe would get it, with nothing set, and a target."""

    method: Method
    weights: TargetWeights

    def draft(self, *, seed: int = 0) -> nn.Module:
        """Fresh weights, and noise, so that every path matters."""
        draft = self.method.build(self.weights, self.vocab(), seed=seed)
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for parameter in draft.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
        return draft

    def vocab(self) -> DraftVocab:
        mask = torch.ones(VOCAB, dtype=torch.uint8)
        text = Prompt("text", torch.arange(VOCAB, dtype=torch.int32), mask)
        return self.method.vocab([text], self.weights.spec)

    @property
    def layout(self) -> FeatureLayout:
        return self.method.layout(self.weights.spec)

    def batch(self, step: int, indices: Sequence[int], *, masked: bool = False) -> PackedBatch:
        """Samples of a step; a sample is the same whatever it is packed with."""
        ids, masks, features = [], [], []
        for index in indices:
            length = LENGTHS[index]
            generator = torch.Generator().manual_seed(100 * step + index)
            ids.append(torch.randint(VOCAB, (length,), generator=generator))
            mask = (torch.rand(length, generator=generator) < 0.8).to(torch.uint8)
            mask[-1] = 0
            masks.append(torch.zeros_like(mask) if masked else mask)
            width = sum(spec.width for spec in self.layout.features)
            features.append(torch.randn(length, width, generator=generator))
        widths = [spec.width for spec in self.layout.features]
        parts = torch.cat(features).split(widths, dim=1)
        lengths = tuple(LENGTHS[index] for index in indices)
        return PackedBatch(
            sample_ids=tuple(f"s{step}.{index}" for index in indices),
            lengths=lengths,
            input_ids=torch.cat(ids),
            loss_mask=torch.cat(masks),
            positions=torch.cat([torch.arange(n) for n in lengths]),
            features={
                spec.name: part.to(DTYPES[spec.dtype])
                for spec, part in zip(self.layout.features, parts, strict=True)
            },
            cu_seqlens=lengths_to_cu_seqlens(lengths),
        )


def subject(name: str) -> Subject:
    """Of the registry; its config with nothing set."""
    factory = METHODS.get(name)
    config: Config = factory.Config()
    return Subject(factory(config), eagle3_cases.target())


@dataclass
class Source:
    """A StepSource: the same six samples at every step, with other contents."""

    subject: Subject
    total_steps: int
    layout: Layout
    rank: int = 0

    def iterate(self, start_step: int) -> Iterator[StepData]:
        for step in range(start_step, self.total_steps):
            batches = tuple(self.subject.batch(step, own) for own in self.layout[self.rank])
            yield StepData(
                step=step,
                micro_batches=batches,
                wait_s=0.0,
                samples=sum(len(b.lengths) for b in batches),
                tokens=sum(b.num_tokens for b in batches),
            )


class LayoutTarget(TableTarget):
    """A table target with features of any layout: codes of the token and its position."""

    def forward(self, input_ids: Tensor, positions: Tensor, valid: Tensor) -> TargetOutput:
        out = super().forward(input_ids, positions, valid)
        features = {}
        for spec in self.layout.features:
            generator = torch.Generator().manual_seed(spec.width)
            codes = torch.randn(99, spec.width, generator=generator)
            features[spec.name] = codes[(7 * input_ids + positions) % 99]
        return TargetOutput(out.logits, features)
