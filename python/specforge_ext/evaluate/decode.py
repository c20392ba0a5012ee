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
from dataclasses import dataclass

import torch
from torch import Tensor

from specforge_ext.engines.base import TargetDecoder
from specforge_ext.evaluate.prefill import check_budget, prefill, waves
from specforge_ext.evaluate.verify import Verdict, sample, verify
from specforge_ext.methods.base import Drafter
from specforge_ext.records import FeatureLayout


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
    device: where target and drafter compute (default: CPU). batch_size: sequences decoded together.
    Raises ValueError for arguments out of range and for proposals that cannot be verified.
    """
    if depth < 1:
        raise ValueError(f"depth: wanted at least 1, got {depth}")
    check_budget(max_new_tokens, temperature)
    device = device or torch.device("cpu")
    eos = torch.tensor(list(eos_ids), dtype=torch.int64, device=device)
    generator = torch.Generator(device).manual_seed(seed) if temperature > 0 else None
    began = time.perf_counter()
    prefill_s = 0.0
    done: list[_Wave] = []
    # Not inference_mode: what a model caches lazily here must stay usable in training.
    with torch.no_grad():
        for wave_prompts in waves(prompts, batch_size):
            wave = _Wave(target, drafter, depth, max_new_tokens, temperature, generator)
            wave_began = time.perf_counter()
            wave.start(wave_prompts, layout, eos, device)
            prefill_s += time.perf_counter() - wave_began
            while wave.running():
                wave.step()
            done.append(wave)
    return EvalResult(
        depth=depth,
        temperature=temperature,
        tokens=tuple(row for wave in done for row in wave.continuations()),
        steps=torch.cat([wave.steps for wave in done]).cpu(),
        rounds=torch.cat([wave.rounds for wave in done]).cpu(),
        round_tokens=torch.cat([wave.round_tokens for wave in done]).cpu(),
        accepted_at=torch.cat([wave.accepted_at for wave in done]).cpu(),
        proposed=torch.cat([wave.proposed for wave in done]).cpu(),
        wall_s=time.perf_counter() - began,
        prefill_s=prefill_s,
        batch_size=batch_size,
    )


class _Wave:
    """B sequences that start together and advance unevenly; a finished one stays, switched off."""

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

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int64, device=device)

        self.eos = eos
        self.position = read.lengths  # of the last known token
        self.output = zeros(size, self.max_new_tokens)
        self.output[:, 0] = self.last
        self.produced = zeros(size) + 1
        self.active = (self.produced < self.max_new_tokens) & ~torch.isin(self.last, eos)
        self.columns = torch.arange(depth + 1, device=device)
        self.steps, self.rounds, self.round_tokens = zeros(size), zeros(size), zeros(size)
        self.accepted_at, self.proposed = zeros(size, depth), zeros(size)

    def running(self) -> bool:
        return bool(self.active.any())

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
        self.proposed += proposal.proposed().sum(1) * self.active
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
        room = self.max_new_tokens - self.produced
        ends = torch.isin(said, self.eos) & (self.columns <= verdict.accepted[:, None])
        ended = ends.any(1)
        first_end = torch.where(ended, ends.long().argmax(1), self.depth)
        emitted = torch.minimum(torch.minimum(verdict.accepted, first_end) + 1, room)
        emitted = emitted * self.active
        self._write(said, emitted)

        counted = self.active & (room > self.depth)
        self.steps += self.active
        self.rounds += counted
        self.round_tokens += emitted * counted
        accepted = torch.minimum(verdict.accepted, emitted) * counted
        self.accepted_at += self.columns[:-1] < accepted[:, None]

        self.produced += emitted
        self.position = self.position + (verdict.accepted + 1) * self.active
        self.last = torch.where(self.active, verdict.next_tokens, self.last)
        self.active = self.active & ~ended & (self.produced < self.max_new_tokens)

    def _write(self, said: Tensor, emitted: Tensor) -> None:
        """Put each sequence's first `emitted` tokens behind those it has."""
        offset = torch.arange(self.max_new_tokens, device=said.device) - self.produced[:, None]
        fresh = (offset >= 0) & (offset < emitted[:, None])
        tokens = said.gather(1, offset.clamp(0, self.depth))
        self.output = torch.where(fresh, tokens, self.output)

    def continuations(self) -> list[Tensor]:
        output, produced = self.output.cpu(), self.produced.cpu()
        return [row[:n].clone() for row, n in zip(output, produced.tolist(), strict=True)]
