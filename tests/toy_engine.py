"""An engine that computes nothing, but does what the protocol says, to inject faults into runs.

Registered for a test by `register`; features of token t are the id of token t.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from specforge_ext.config import Config
from specforge_ext.copies import copied
from specforge_ext.engines import ENGINES, Into
from specforge_ext.records import (
    FeatureLayout,
    Prompt,
    Sample,
    TargetSpec,
    TargetWeights,
)

SPEC = TargetSpec(
    name="demo",  # whose tokenizer it uses
    model_type="toy",
    vocab_size=2048,
    hidden_size=4,
    intermediate_size=8,
    num_layers=8,
    num_heads=2,
    num_kv_heads=1,
    head_dim=2,
    rms_norm_eps=1e-6,
    rope_theta=1e4,
    rope_scaling=None,
    max_position_embeddings=512,
    dtype="float32",
)


class ToyConfig(Config):
    """broken: first tokens of prompts whose features are not finite; refused: of prompts that the
    target does not take. final_norm: its only weight, for another target."""

    broken: tuple[int, ...] = ()
    refused: tuple[int, ...] = ()
    final_norm: float = 1.0


class ToyEngine:
    """calls: (number of prefixes, max_new_tokens, temperature) of every `generate`."""

    Config = ToyConfig
    spec = SPEC

    def __init__(self, config: ToyConfig) -> None:
        self.config = config
        self.calls: list[tuple[int, int, float]] = []

    @classmethod
    def open(cls, config: ToyConfig) -> ToyEngine:
        return cls(config)

    def weights(self, *, device: torch.device, last_layer: bool = False) -> TargetWeights:
        table = torch.zeros(SPEC.vocab_size, SPEC.hidden_size, device=device)
        norm = torch.full((SPEC.hidden_size,), self.config.final_norm, device=device)
        return TargetWeights(SPEC, table, table, norm)

    def features(
        self, prompts: Sequence[Prompt], layout: FeatureLayout, *, into: Into | None = None
    ) -> Iterator[Sample]:
        for prompt in prompts:
            first = int(prompt.input_ids[0])
            if first in self.config.refused:
                raise ValueError(f"prompt {prompt.sample_id}: wanted another first token")
            values = prompt.input_ids.float()
            if first in self.config.broken:
                values = values * float("nan")
            shapes = {f.name: (len(prompt), f.width) for f in layout.features}
            features = into(prompt) if into else {n: torch.empty(s) for n, s in shapes.items()}
            for feature in features.values():
                copied("engine", feature.copy_(values[:, None]).nbytes)
            yield Sample(prompt, features)

    def generate(
        self,
        prefixes: Sequence[Tensor],
        *,
        max_new_tokens: int,
        temperature: float,
        seed: int,
        stop_at_eos: bool = True,
    ) -> list[Tensor]:
        """Says the prefix's first token again and again."""
        self.calls.append((len(prefixes), max_new_tokens, temperature))
        return [prefix[:1].repeat(max_new_tokens) for prefix in prefixes]

    def decoder(self) -> Any:
        raise NotImplementedError("no test decodes with the toy target")


def register(monkeypatch: pytest.MonkeyPatch) -> None:
    """As engine kind `toy`, for one test."""
    monkeypatch.setitem(ENGINES._entries, "toy", f"{__name__}:ToyEngine")


def write_ids(path: Path, lengths: Sequence[int]) -> Path:
    """A JSONL file of texts that are tokenised already; text i begins with token i."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = []
    for index, length in enumerate(lengths):
        ids = [index, *(7 * j % 100 for j in range(1, length))]
        mask = [0, *[1] * (length - 2), 0]
        lines.append(f'{{"input_ids": {ids}, "loss_mask": {mask}}}\n')
    path.write_text("".join(lines))
    return path


def recipe_of(folder: Path, texts: Path, **engine: Any) -> dict[str, Any]:
    """A recipe of the toy engine over such a file, as plain data."""
    jsonl = {"kind": "jsonl", "paths": [str(texts)], "max_length": 64}
    return {
        "name": "toy",
        "output_dir": str(folder),
        "run": {"num_threads": 1},
        "engine": {"kind": "toy", **engine},
        "data": {"train": jsonl, "heldout": jsonl},
        "method": {"kind": "eagle3"},
        "store": {"capacity_bytes": 1 << 20, "max_slots": 64},
        "order": {"batch_tokens": 64},
    }
