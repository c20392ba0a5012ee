"""A tiny method, draft and data plan for the trainer's tests, and a runner of it under torchrun.

The draft applies one block several times, as EAGLE-3 does, and reads out with a frozen buffer.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from specforge_ext.records import PackedBatch, StepContext, StepLoss, lengths_to_cu_seqlens
from specforge_ext.trainer.config import TrainerConfig
from specforge_ext.trainer.data import StepData

HIDDEN, VOCAB, DEPTH, SAMPLES_PER_STEP = 8, 11, 3, 8
Layout = list[list[list[int]]]
"""[rank][micro-batch] -> indices of the step's samples."""

ONE_RANK: Layout = [[list(range(SAMPLES_PER_STEP))]]


class ToyBlock(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.up = nn.Linear(HIDDEN, 13)
        self.down = nn.Linear(13, HIDDEN, bias=False)
        self.dropout = nn.Dropout(dropout)
        self.calls = 0

    def forward(self, hidden: Tensor) -> Tensor:
        self.calls += 1
        out: Tensor = hidden + self.down(self.dropout(torch.tanh(self.up(hidden))))
        return out


class ToyDraft(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.block = ToyBlock(dropout)
        # One row: at two ranks, one of them holds nothing of it.
        self.scale = nn.Parameter(torch.ones(1, HIDDEN))
        self.register_buffer("readout", torch.randn(VOCAB, HIDDEN))

    def forward(self, features: Tensor) -> list[Tensor]:
        hidden, logits = features * self.scale, []
        for _ in range(DEPTH):
            hidden = self.block(hidden)
            logits.append(F.linear(hidden, self.readout).float())
        return logits


@dataclass
class ToyMethod:
    """`name` is never read: the trainer must not. poison: sample id whose loss is that value."""

    units: bool = True
    poison: Mapping[str, float] = field(default_factory=dict)

    def shard_units(self, draft: nn.Module) -> Sequence[nn.Module]:
        return [draft.block] if self.units else []

    def recompute_units(self, draft: nn.Module) -> Sequence[nn.Module]:
        return self.shard_units(draft)

    def step(self, draft: nn.Module, batch: PackedBatch, at: StepContext) -> StepLoss:
        mask = batch.loss_mask.bool()
        scored = mask.sum()
        names = {"correct": "scored"}
        if not bool(mask.any()):
            # As a method may: no forward, no graph, no metrics.
            return StepLoss(torch.zeros(()), torch.zeros(()))
        labels = batch.input_ids[mask]
        logits = [z[mask] for z in draft(batch.features["x"])]
        loss = torch.stack([F.cross_entropy(z, labels, reduction="sum") for z in logits]).sum()
        for sample_id in batch.sample_ids:
            loss = loss * self.poison.get(sample_id, 1.0)
        correct = torch.stack([(z.argmax(-1) == labels).sum() for z in logits])
        return StepLoss(
            loss_sum=loss,
            weight_sum=scored.float(),
            metrics={"correct": correct.double(), "scored": scored.double()},
            ratios=names,
        )


def make_draft(seed: int = 0, dropout: float = 0.0) -> ToyDraft:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return ToyDraft(dropout)


def make_batch(step: int, indices: Sequence[int], *, masked: bool = False) -> PackedBatch:
    """Samples `indices` of a step: 1 to 8 tokens each, the last token of each scored at least."""
    ids, masks, features, lengths, positions = [], [], [], [], []
    for index in indices:
        generator = torch.Generator().manual_seed(1000 * step + index)
        length = 1 + (5 * step + 3 * index) % 8
        lengths.append(length)
        ids.append(torch.randint(VOCAB, (length,), generator=generator))
        mask = (torch.rand(length, generator=generator) < 0.5).to(torch.uint8)
        mask[-1] = 1
        masks.append(torch.zeros_like(mask) if masked else mask)
        features.append(torch.randn(length, HIDDEN, generator=generator))
        positions.append(torch.arange(length))
    return PackedBatch(
        sample_ids=tuple(f"s{step}.{index}" for index in indices),
        lengths=tuple(lengths),
        input_ids=torch.cat(ids),
        loss_mask=torch.cat(masks),
        positions=torch.cat(positions),
        features={"x": torch.cat(features)},
        cu_seqlens=lengths_to_cu_seqlens(lengths),
    )


@dataclass
class ToySource:
    """The plan: step s has the samples s.0 .. s.7, dealt to ranks and micro-batches by `layout`.

    masked_steps have no scored token. faults: step -> what this rank does on reaching it:
    "kill" (SIGKILL itself), "term" (SIGTERM to itself), "ctrl-c" (SIGINT), "ctrl-c twice",
    or "sleep:<seconds>".
    """

    total_steps: int
    layout: Layout = field(default_factory=lambda: ONE_RANK)
    rank: int = 0
    masked_steps: Sequence[int] = ()
    faults: Mapping[int, str] = field(default_factory=dict)

    def iterate(self, start_step: int) -> Iterator[StepData]:
        for step in range(start_step, self.total_steps):
            fault(self.faults.get(step, ""))
            batches = tuple(
                make_batch(step, indices, masked=step in self.masked_steps)
                for indices in self.layout[self.rank]
            )
            yield StepData(
                step=step,
                micro_batches=batches,
                wait_s=0.001,
                samples=sum(len(b.lengths) for b in batches),
                tokens=sum(b.num_tokens for b in batches),
            )


def fault(what: str) -> None:
    name, _, argument = what.partition(":")
    if name == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif name == "term":
        os.kill(os.getpid(), signal.SIGTERM)
    elif name in ("ctrl-c", "ctrl-c twice"):
        for _ in name.split():
            os.kill(os.getpid(), signal.SIGINT)
    elif name == "sleep":
        time.sleep(float(argument))


def config(**settings: Any) -> TrainerConfig:
    """Settings that move far in few steps, and write nothing that a test does not ask for."""
    base: dict[str, Any] = {
        "lr": 1e-2,
        "warmup_ratio": 0.2,
        "log_every_steps": 1,
        "tensorboard": False,
        "num_threads": 1,
        "collective_timeout_s": 60.0,
    }
    return TrainerConfig.model_validate({**base, **settings})


def torchrun(specs: Sequence[Mapping[str, Any]], folder: Path, *, ranks: int = 2) -> str:
    """Run trainer_worker.py on the specs one after the other; its output. See `start`."""
    process = start(specs, folder, ranks=ranks)
    try:
        output, _ = process.communicate(timeout=90)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun ends its ranks
        output, _ = process.communicate(timeout=60)
        return f"{output}\nno end within 90 s"
    return f"{output}\nexit code {process.returncode}"


def start(
    specs: Sequence[Mapping[str, Any]], folder: Path, *, ranks: int = 2
) -> subprocess.Popen[str]:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "specs.json"
    file.write_text(json.dumps(list(specs)))
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "torch.distributed.run"),
            *("--nproc-per-node", str(ranks), "--master-addr", "127.0.0.1", "--master-port", "0"),
            *("--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "--no-python"),
            *(sys.executable, str(Path(__file__).with_name("trainer_worker.py")), str(file)),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
