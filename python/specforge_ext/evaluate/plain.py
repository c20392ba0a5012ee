"""The target alone, through the same decoder; and whether the draft changed what it says.

Legend of shapes: B sequences of a wave, N prompts, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from specforge_ext.engines.base import TargetDecoder
from specforge_ext.evaluate.on_device import OnDevice
from specforge_ext.evaluate.prefill import Prefilled, check_budget, prefill, waves
from specforge_ext.evaluate.verify import sample
from specforge_ext.records import FeatureLayout

TIE_GAP = 1e-4
"""Gap of the two best logits below which their order is rounding: batches of one and of K + 1
columns go through different matrix kernels, whose float32 sums differ in the last bits."""

NO_TOKEN = -1


@dataclass(frozen=True)
class PlainResult:
    """One entry a prompt, on the CPU.

    tokens: [n] int64, end token included when it was said. runners_up: [n] int64, the second best
    token. gaps: [n] float32, best minus second best logit (nats at temperature 1). wall_s,
    prefill_s, batch_size: as in EvalResult.
    """

    temperature: float
    tokens: tuple[Tensor, ...]
    runners_up: tuple[Tensor, ...]
    gaps: tuple[Tensor, ...]
    wall_s: float
    prefill_s: float
    batch_size: int


def plain_decode(
    target: TargetDecoder,
    prompts: Sequence[Tensor],
    *,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    eos_ids: Sequence[int] = (),
    device: torch.device | None = None,
    batch_size: int = 64,
) -> PlainResult:
    """One token a pass, no draft, no features. Arguments as those of `evaluate`."""
    check_budget(max_new_tokens, temperature)
    device = device or torch.device("cpu")
    target = OnDevice(target, device)
    eos = torch.tensor(list(eos_ids), dtype=torch.int64, device=device)
    generator = torch.Generator(device).manual_seed(seed) if temperature > 0 else None
    began = time.perf_counter()
    prefill_s = 0.0
    tokens: list[Tensor] = []
    runners_up: list[Tensor] = []
    gaps: list[Tensor] = []
    with torch.no_grad():
        for wave in waves(prompts, batch_size):
            wave_began = time.perf_counter()
            read = prefill(target, wave, FeatureLayout(()), device=device)
            prefill_s += time.perf_counter() - wave_began
            said = list(_speak(target, read, max_new_tokens, temperature, generator, eos))
            *rows, active = (torch.stack(part, 1).cpu() for part in zip(*said, strict=True))
            lengths = active.sum(1).tolist()
            for part, into in zip(rows, (tokens, runners_up, gaps), strict=True):
                into.extend(row[:n].clone() for row, n in zip(part, lengths, strict=True))
    return PlainResult(
        temperature=temperature,
        tokens=tuple(tokens),
        runners_up=tuple(runners_up),
        gaps=tuple(gaps),
        wall_s=time.perf_counter() - began,
        prefill_s=prefill_s,
        batch_size=batch_size,
    )


def _speak(
    target: TargetDecoder,
    read: Prefilled,
    max_new_tokens: int,
    temperature: float,
    generator: torch.Generator | None,
    eos: Tensor,
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """For each token: what is said, its runner-up, the gap, who still speaks; [B] each."""
    logits, position = read.logits, read.lengths
    active = torch.ones_like(position, dtype=torch.bool)
    for spoken in range(1, max_new_tokens + 1):
        token = sample(logits, temperature=temperature, generator=generator)
        best = logits.topk(2, 1)
        yield token, best.indices[:, 1], best.values[:, 0] - best.values[:, 1], active
        active = active & ~torch.isin(token, eos)
        if spoken == max_new_tokens or not bool(active.any()):
            return
        logits = target.forward(token[:, None], position[:, None], active[:, None]).logits[:, 0]
        position = position + 1


@dataclass(frozen=True)
class Mismatch:
    """First place where a speculative continuation left the target's own.

    index: in the continuation. speculative, plain: the two tokens, NO_TOKEN where one had ended.
    gap: the target's best minus second best logit, in the plain pass; NaN where that had ended.
    tie: the gap is below the threshold and the speculative token is the second best.
    """

    prompt: int
    index: int
    speculative: int
    plain: int
    gap: float
    tie: bool


@dataclass(frozen=True)
class LosslessCheck:
    """lossless: all continuations equal the target's own, but for ties, which are counted."""

    prompts: int
    tie_gap: float
    mismatches: tuple[Mismatch, ...]

    @property
    def ties(self) -> int:
        return sum(m.tie for m in self.mismatches)

    @property
    def lossless(self) -> bool:
        return self.ties == len(self.mismatches)

    def __str__(self) -> str:
        same = self.prompts - len(self.mismatches)
        text = f"{same} of {self.prompts} continuations token for token the target's own"
        if self.ties:
            text += f", {self.ties} part at a tie (logit gap < {self.tie_gap:g})"
        real = [m for m in self.mismatches if not m.tie]
        if real:
            m = real[0]
            text += (
                f", {len(real)} DIFFER; first: prompt {m.prompt}, token {m.index}: "
                f"speculative {m.speculative}, target {m.plain}, logit gap {m.gap:.3g}"
            )
        return text


def check_lossless(
    speculative: Sequence[Tensor], plain: PlainResult, *, tie_gap: float = TIE_GAP
) -> LosslessCheck:
    """Compare greedy continuations with the target's own, of the same prompts and budget.

    Raises ValueError if `plain` was sampled, or the numbers of prompts differ.
    """
    if plain.temperature != 0.0:
        raise ValueError(
            f"check_lossless: wanted greedy continuations, got temperature {plain.temperature}"
        )
    if len(speculative) != len(plain.tokens):
        raise ValueError(
            f"check_lossless: wanted {len(plain.tokens)} continuations, got {len(speculative)}"
        )
    found = (_first_mismatch(i, row, plain, tie_gap) for i, row in enumerate(speculative))
    return LosslessCheck(len(speculative), tie_gap, tuple(m for m in found if m is not None))


def _first_mismatch(
    prompt: int, speculative: Tensor, plain: PlainResult, tie_gap: float
) -> Mismatch | None:
    own = plain.tokens[prompt]
    shared = min(len(own), len(speculative))
    differs = (own[:shared] != speculative[:shared]).nonzero()
    if not len(differs) and len(own) == len(speculative):
        return None
    index = int(differs[0]) if len(differs) else shared
    said = int(speculative[index]) if index < len(speculative) else NO_TOKEN
    wanted = int(own[index]) if index < len(own) else NO_TOKEN
    gap = float(plain.gaps[prompt][index]) if index < len(own) else float("nan")
    second = index < len(own) and said == int(plain.runners_up[prompt][index])
    return Mismatch(prompt, index, said, wanted, gap, tie=second and gap < tie_gap)


def is_cyclic(tokens: Tensor, *, max_period: int = 16, min_repeats: int = 3) -> bool:
    """Whether [n] ends in `min_repeats` copies of the same at most `max_period` tokens."""
    for period in range(1, min(max_period, len(tokens) // min_repeats) + 1):
        tail = tokens[len(tokens) - min_repeats * period :]
        if bool((tail[period:] == tail[:-period]).all()):
            return True
    return False


def cyclic_share(continuations: Sequence[Tensor]) -> float:
    """Share of continuations that end in a cycle (`is_cyclic`: period <= 16, at least 3 times)."""
    return sum(is_cyclic(tokens) for tokens in continuations) / len(continuations)
