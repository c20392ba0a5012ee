"""A target that computes on one device, and says it on another."""

from __future__ import annotations

import torch
from torch import Tensor

from specforge_ext.engines.base import TargetDecoder, TargetOutput
from specforge_ext.records import FeatureLayout


class OnDevice:
    """A TargetDecoder whose outputs come to `device`, where the draft is and the counting is done.

    What it is given it hands on as it is: a decoder brings that to its own device. With one device
    for both nothing is copied.
    """

    def __init__(self, target: TargetDecoder, device: torch.device) -> None:
        self._target = target
        self._device = device

    def start(self, num_sequences: int, layout: FeatureLayout) -> None:
        self._target.start(num_sequences, layout)

    def forward(self, input_ids: Tensor, positions: Tensor, valid: Tensor) -> TargetOutput:
        said = self._target.forward(input_ids, positions, valid)
        return TargetOutput(
            logits=said.logits.to(self._device),
            features={name: rows.to(self._device) for name, rows in said.features.items()},
        )

    def drop(self, keep: Tensor) -> None:
        self._target.drop(keep)

    def select(self, rows: Tensor) -> None:
        self._target.select(rows)
