"""Which drafted tokens the target accepts, and what it says after them.

Legend of shapes: B sequences, K drafted tokens each, V target vocabulary. Column 0 of a verify step
holds the last known token, column j >= 1 the drafted token j; the target's row j judges drafted
token j + 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from specforge_ext.records import Proposal

PROBABILITY_SUM_TOLERANCE = 1e-3
"""How far from 1 the float32 probabilities of a proposal may sum."""


@dataclass(frozen=True)
class Verdict:
    """accepted: [B] int64 in 0..K. next_tokens: [B] int64, what the target says after them."""

    accepted: Tensor
    next_tokens: Tensor


def verify(
    logits: Tensor, proposal: Proposal, *, temperature: float, generator: torch.Generator | None
) -> Verdict:
    """Judge a proposal by the target's logits [B, K + 1, V].

    Temperature 0: a drafted token is accepted if it is the target's argmax; the next token is the
    argmax of the row after the last accepted one. Otherwise: drafted x is accepted with min(1, p(x)
    / q(x)); after a rejection the next token comes from norm(max(p - q, 0)), after none of all that
    were proposed from p. The outcome is then distributed exactly as the target's own (Leviathan et
    al., arXiv 2211.17192, Appendix A.1), whatever q is.
    Raises ValueError if the proposal has no probabilities, or ones it cannot have been drawn from,
    or lengths that are not in 0..K.
    """
    _check_lengths(proposal)
    if temperature == 0.0:
        return _verify_greedy(logits, proposal)
    if generator is None:
        raise ValueError(f"verify: generator is required at temperature {temperature}")
    return _verify_sampled(logits, proposal, temperature, generator)


def _verify_greedy(logits: Tensor, proposal: Proposal) -> Verdict:
    best_BK1 = logits.argmax(-1)
    accepted = _leading((best_BK1[:, :-1] == proposal.tokens) & proposal.proposed())
    return Verdict(accepted, best_BK1.gather(1, accepted[:, None]).squeeze(1))


def _verify_sampled(
    logits: Tensor, proposal: Proposal, temperature: float, generator: torch.Generator
) -> Verdict:
    tokens_BK = proposal.tokens
    depth = tokens_BK.shape[1]
    probs_BKV, drawn_BK = _checked_probs(proposal, temperature)
    scaled_BK1V = logits / temperature
    judged_BKV = scaled_BK1V[:, :depth]
    chosen_BK = judged_BKV.gather(2, tokens_BK[..., None]).squeeze(2)
    wanted_BK = (chosen_BK - judged_BKV.logsumexp(2)).exp()
    coin_BK = torch.rand(
        tokens_BK.shape, generator=generator, device=logits.device, dtype=torch.float64
    )
    proposed_BK = proposal.proposed()
    accepted = _leading((coin_BK * drawn_BK < wanted_BK) & proposed_BK)

    row = torch.arange(len(accepted), device=logits.device)
    p_BV = scaled_BK1V[row, accepted].double().softmax(1)
    q_BV = probs_BKV[row, accepted.clamp(max=depth - 1)].double()
    rejected = (accepted < proposed_BK.sum(1))[:, None]
    mass_BV = torch.where(rejected, residual(p_BV, q_BV), p_BV)
    return Verdict(accepted, torch.multinomial(mass_BV, 1, generator=generator).squeeze(1))


def residual(p: Tensor, q: Tensor) -> Tensor:
    """max(p - q, 0), not normalised, [B, V]; p itself where nothing is left.

    Nothing is left only where p equals q up to rounding; a rejection there is rounding itself.
    """
    left = (p - q).clamp_min(0.0)
    return torch.where(left.sum(1, keepdim=True) > 0, left, p)


def _leading(hit_BK: Tensor) -> Tensor:
    """[B] int64, number of leading True values of each row."""
    return hit_BK.long().cumprod(1).sum(1)


def _check_lengths(proposal: Proposal) -> None:
    depth, lengths = proposal.tokens.shape[1], proposal.lengths
    if lengths is not None and bool(((lengths < 0) | (lengths > depth)).any()):
        raise ValueError(
            f"Proposal.lengths: wanted 0..{depth}, got {int(lengths.min())} to {int(lengths.max())}"
        )


def _checked_probs(proposal: Proposal, temperature: float) -> tuple[Tensor, Tensor]:
    """The proposal's distributions [B, K, V] and what they give its tokens, [B, K]."""
    probs = proposal.probs
    if probs is None:
        raise ValueError(
            f"Proposal.probs: wanted [B, K, V] at temperature {temperature}, got None "
            "(exact sampling needs the distributions that the tokens were drawn from)"
        )
    ignored = ~proposal.proposed()
    drawn = probs.gather(2, proposal.tokens[..., None]).squeeze(2)
    error = float((probs.sum(2) - 1.0).abs().masked_fill(ignored, 0.0).max())
    # Negated, so that NaN fails too.
    if not error <= PROBABILITY_SUM_TOLERANCE:
        raise ValueError(
            f"Proposal.probs: wanted rows that sum to 1 within {PROBABILITY_SUM_TOLERANCE}, "
            f"got one that is off by {error}"
        )
    if not bool(((drawn > 0) | ignored).all()):
        raise ValueError("Proposal.tokens: got a token that Proposal.probs gives probability 0")
    return probs, drawn


def sample(logits: Tensor, *, temperature: float, generator: torch.Generator | None) -> Tensor:
    """[B] int64 of logits [B, V]: argmax at temperature 0, else a draw of softmax(logits / T)."""
    if temperature == 0.0:
        return logits.argmax(1)
    probs = (logits.double() / temperature).softmax(1)
    return torch.multinomial(probs, 1, generator=generator).squeeze(1)
