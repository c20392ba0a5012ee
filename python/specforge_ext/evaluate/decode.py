"""Chain speculative decoding of a target and a draft: numbers are counted, not modelled.

Legend of shapes: B sequences of a wave, N prompts, K drafted tokens of a step (the depth).

What is counted
  A *step* is one verify pass of the target over the last known token and K drafted ones. It emits
  between 1 and K + 1 tokens; where the draft proposed fewer than K, the rest do not count as
  drafted. A *round* is a step that had room for all K + 1 of them in the
  sequence's budget when it began: as that is known before its outcome, leaving out the others
  favours neither short nor long acceptances. Acceptance is counted over rounds only. The token that
  prefill says is in the output, and counts neither as a step nor as a round's token. A round that
  says an end token counts with its tokens up to and including that one.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from specforge_ext.engines.base import TargetDecoder
from specforge_ext.evaluate.on_device import OnDevice
from specforge_ext.evaluate.prefill import check_budget, prefill, waves
from specforge_ext.evaluate.verify import Verdict, sample, verify
from specforge_ext.methods.base import Drafter
from specforge_ext.records import FeatureLayout

LEAVE = 1.25
"""The finished ones leave when there are this many sequences to one that goes on. Not at once: to
forget them copies the caches of the others."""


@dataclass(frozen=True)
class EvalResult:
    """Counts of a run, one entry a prompt, in the order of the prompts. Tensors are on the CPU.

    tokens: continuations, [n] int64 each, end token included when it was said.
    steps: [N] int64, verify passes. rounds: [N] int64, those counted (see the module).
    round_tokens: [N] int64, tokens that the rounds emitted.
    accepted_at: [N, K] int64, rounds whose first k + 1 drafted tokens were all accepted (joint, not
    conditional). proposed: [N] int64, tokens that the draft proposed, over all steps. wall_s: whole
    run; prefill_s: the part of it before the first step. batch_size: sequences decoded together.
    """

    depth: int
    temperature: float
    tokens: tuple[Tensor, ...]
    steps: Tensor
    rounds: Tensor
    round_tokens: Tensor
    accepted_at: Tensor
    proposed: Tensor
    wall_s: float
    prefill_s: float
    batch_size: int

    @property
    def drafted(self) -> int:
        """Tokens that the draft proposed, over all steps."""
        return int(self.proposed.sum())


def evaluate(
    target: TargetDecoder,
    drafter: Drafter,
    prompts: Sequence[Tensor],
    layout: FeatureLayout,
    *,
    depth: int,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    eos_ids: Sequence[int] = (),
    device: torch.device | None = None,
    batch_size: int = 64,
) -> EvalResult:
    """Decode every prompt with the draft's help; the same arguments give the same result.

    prompts: [S] int32 or int64 each, not empty. layout: the features that the drafter observes.
    max_new_tokens: budget of a sequence, prefill's token included. temperature 0 is greedy.
    device: where the drafter is (default: CPU); what the target says is brought there.
    batch_size: sequences decoded together; once a fifth of them have ended, those leave.
    Raises ValueError for arguments out of range and for proposals that cannot be verified.
    """
    if depth < 1:
        raise ValueError(f"depth: wanted at least 1, got {depth}")
    check_budget(max_new_tokens, temperature)
    device = device or torch.device("cpu")
    target = OnDevice(target, device)
    eos = torch.tensor(list(eos_ids), dtype=torch.int64, device=device)
    generator = torch.Generator(device).manual_seed(seed) if temperature > 0 else None
    began = time.perf_counter()
    prefill_s = 0.0
    done: list[_Counts] = []
    # Not inference_mode: what a model caches lazily here must stay usable in training.
    with torch.no_grad():
        for wave_prompts in waves(prompts, batch_size):
            wave = _Wave(target, drafter, depth, max_new_tokens, temperature, generator)
            wave_began = time.perf_counter()
            wave.start(wave_prompts, layout, eos, device)
            prefill_s += time.perf_counter() - wave_began
            while wave.running():
                wave.step()
            done.append(wave.finish())
    return EvalResult(
        depth=depth,
        temperature=temperature,
        tokens=tuple(row for counts in done for row in counts.continuations()),
        steps=torch.cat([counts.steps for counts in done]).cpu(),
        rounds=torch.cat([counts.rounds for counts in done]).cpu(),
        round_tokens=torch.cat([counts.round_tokens for counts in done]).cpu(),
        accepted_at=torch.cat([counts.accepted_at for counts in done]).cpu(),
        proposed=torch.cat([counts.proposed for counts in done]).cpu(),
        wall_s=time.perf_counter() - began,
        prefill_s=prefill_s,
        batch_size=batch_size,
    )


@dataclass
class _Counts:
    """What becomes of B sequences: output [B, budget], of which `produced` [B] are said, and the
    counts of EvalResult.
    """

    output: Tensor
    produced: Tensor
    steps: Tensor
    rounds: Tensor
    round_tokens: Tensor
    accepted_at: Tensor
    proposed: Tensor

    @classmethod
    def zeros(cls, size: int, budget: int, depth: int, device: torch.device) -> _Counts:
        shapes = ((size, budget), *[(size,)] * 4, (size, depth), (size,))
        return cls(*(torch.zeros(shape, dtype=torch.int64, device=device) for shape in shapes))

    def select(self, rows: Tensor) -> _Counts:
        return _Counts(*(getattr(self, field.name)[rows] for field in fields(self)))

    def put(self, rows: Tensor, counts: _Counts) -> None:
        """Let those of `counts` be these rows'."""
        for field in fields(self):
            getattr(self, field.name)[rows] = getattr(counts, field.name)

    def continuations(self) -> list[Tensor]:
        output, produced = self.output.cpu(), self.produced.cpu()
        return [row[:n].clone() for row, n in zip(output, produced.tolist(), strict=True)]


class _Wave:
    """B sequences that start together and advance unevenly. A finished one stays, switched off,
    until a fifth have finished; then they leave.
    """

    def __init__(
        self,
        target: TargetDecoder,
        drafter: Drafter,
        depth: int,
        max_new_tokens: int,
        temperature: float,
        generator: torch.Generator | None,
    ) -> None:
        self.target = target
        self.drafter = drafter
        self.depth = depth
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature
        self.generator = generator

    def start(
        self, prompts: Sequence[Tensor], layout: FeatureLayout, eos: Tensor, device: torch.device
    ) -> None:
        """Prefill, say the first token, show the prompt's rows to the draft."""
        size, depth = len(prompts), self.depth
        read = prefill(self.target, prompts, layout, device=device)
        self.last = sample(read.logits, temperature=self.temperature, generator=self.generator)
        # Row t pairs the features of position t with token t + 1; the last row's was just said.
        follows = read.input_ids.roll(-1, 1).scatter(
            1, read.lengths[:, None] - 1, self.last[:, None]
        )
        # Each step emits at least one token, so there are at most max_new_tokens - 1 of them.
        capacity = read.input_ids.shape[1] + (self.max_new_tokens - 1) * (depth + 1)
        self.drafter.start(size, capacity)
        self.drafter.observe(follows, read.features, read.positions, read.valid)

        self.eos = eos
        self.position = read.lengths  # of the last known token
        self.counts = _Counts.zeros(size, self.max_new_tokens, depth, device)
        self.counts.output[:, 0] = self.last
        self.counts.produced += 1
        self.active = (self.counts.produced < self.max_new_tokens) & ~torch.isin(self.last, eos)
        self.columns = torch.arange(depth + 1, device=device)
        self.rows = torch.arange(size, device=device)  # of the wave, those that are still here
        self.all = self.counts

    def running(self) -> bool:
        """Whether a sequence goes on; of many that do not, the state is forgotten."""
        num_active = int(self.active.sum())
        if num_active and LEAVE * num_active <= len(self.active):
            self._select(self.active.nonzero().squeeze(1))
        return num_active > 0

    def finish(self) -> _Counts:
        """Of all sequences, in the order of the prompts."""
        if self.all is not self.counts:
            self.all.put(self.rows, self.counts)
        return self.all

    def _select(self, rows: Tensor) -> None:
        self.all = self.finish()
        self.counts = self.counts.select(rows)
        self.target.select(rows)
        self.drafter.select(rows)
        self.rows, self.active = self.rows[rows], self.active[rows]
        self.last, self.position = self.last[rows], self.position[rows]

    def step(self) -> None:
        """Draft, verify, forget what was rejected, show the rest to the draft."""
        proposal = self.drafter.propose(
            self.depth, temperature=self.temperature, generator=self.generator
        )
        positions = self.position[:, None] + self.columns
        judged = self.target.forward(
            torch.cat([self.last[:, None], proposal.tokens], 1),
            positions,
            self.active[:, None].expand_as(positions),
        )
        self.counts.proposed += proposal.proposed().sum(1) * self.active
        verdict = verify(
            judged.logits, proposal, temperature=self.temperature, generator=self.generator
        )
        keep = (self.columns <= verdict.accepted[:, None]) & self.active[:, None]
        self.target.drop(keep)
        said = torch.cat([proposal.tokens, verdict.next_tokens[:, None]], 1)
        said = said.scatter(1, verdict.accepted[:, None], verdict.next_tokens[:, None])
        self.drafter.observe(said, judged.features, positions, keep)
        self._account(verdict, said)

    def _account(self, verdict: Verdict, said: Tensor) -> None:
        """Count the step and move on. said: [B, K + 1]; token j follows column j <= accepted."""
        counts = self.counts
        room = self.max_new_tokens - counts.produced
        ends = torch.isin(said, self.eos) & (self.columns <= verdict.accepted[:, None])
        ended = ends.any(1)
        first_end = torch.where(ended, ends.long().argmax(1), self.depth)
        emitted = torch.minimum(torch.minimum(verdict.accepted, first_end) + 1, room)
        emitted = emitted * self.active
        self._write(said, emitted)

        counted = self.active & (room > self.depth)
        counts.steps += self.active
        counts.rounds += counted
        counts.round_tokens += emitted * counted
        accepted = torch.minimum(verdict.accepted, emitted) * counted
        counts.accepted_at += self.columns[:-1] < accepted[:, None]

        counts.produced += emitted
        self.position = self.position + (verdict.accepted + 1) * self.active
        self.last = torch.where(self.active, verdict.next_tokens, self.last)
        self.active = self.active & ~ended & (counts.produced < self.max_new_tokens)

    def _write(self, said: Tensor, emitted: Tensor) -> None:
        """Put each sequence's first `emitted` tokens behind those it has."""
        counts = self.counts
        offset = torch.arange(self.max_new_tokens, device=said.device) - counts.produced[:, None]
        fresh = (offset >= 0) & (offset < emitted[:, None])
        tokens = said.gather(1, offset.clamp(0, self.depth))
        counts.output = torch.where(fresh, tokens, counts.output)
