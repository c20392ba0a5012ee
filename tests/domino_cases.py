"""Small Domino drafts, and their step written out densely in float64, slot by slot.

Targets, batches, anchors and the backbone's definition are those of block_cases.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import block_cases
from block_cases import VOCAB, separate, target
from specforge_ext.methods.domino import DominoConfig, DominoMethod
from specforge_ext.methods.domino.model import DominoDraft
from specforge_ext.records import DraftVocab, PackedBatch, StepContext, TargetWeights

STATE, WIDTH = 10, 7
AT = StepContext(step=3, total_steps=20, seed=7)
"""0.7 of the loss is the uncorrected one's, with nothing set."""


def build(
    *, weights: TargetWeights | None = None, **config: object
) -> tuple[DominoMethod, DominoDraft, TargetWeights]:
    """A method and a draft whose matrices are large enough for every path to matter."""
    weights = weights or target()
    base: dict[str, object] = {
        "block_size": block_cases.BLOCK,
        "num_anchors": 6,
        "num_layers": block_cases.LAYERS,
        "gru_hidden_dim": STATE,
        "emb_dim": WIDTH,
    }
    method = DominoMethod(DominoConfig.model_validate({**base, **config}))
    draft = method.build(weights, DraftVocab.full(VOCAB), seed=1)
    block_cases.shake(draft)
    for part in (draft.prefix_gru, draft.embed_proj):
        block_cases.shake(part, 0.8)
    return method, draft, weights


@dataclass(frozen=True)
class DenseResult:
    """final, base: the two weighted sums, differentiable; weight: of both. Of all blocks and the
    slots that predict, [A, K]: cross entropies, correctness and scored ones.
    """

    final: Tensor
    base: Tensor
    weight: float
    ce: Tensor
    base_ce: Tensor
    correct: Tensor
    base_correct: Tensor
    scored: Tensor


def dense_logits(
    p: dict[str, Tensor], draft: DominoDraft, sample: PackedBatch, anchor: int, *, shift: bool
) -> tuple[Tensor, Tensor]:
    """Base and final logits [K, V] of the slots that predict, given the sample's own tokens."""
    hidden = block_cases.dense_block(p, draft, sample, anchor)
    hidden = hidden if shift else hidden[1:]
    base = hidden @ draft.target_head.double().T
    ids = sample.input_ids[anchor : anchor + len(hidden)]
    gru = nn.GRU(hidden.shape[1], draft.own_shape.gru_hidden_dim, bias=False, batch_first=True)
    weights = {name: p[f"prefix_gru.{name}"] for name, _ in gru.named_parameters()}
    read = draft.embed_tokens.double()[ids][None]
    states, _ = torch.func.functional_call(gru.double(), weights, (read,))
    final = []
    for k, (state, logits) in enumerate(zip(states[0], base, strict=False)):
        both = torch.cat((hidden[k], state))
        act = F.silu(p["embed_proj.0.weight"] @ both)
        final.append(logits + p["embed_proj.2.weight"] @ act if k else logits)
    missing = base[len(final) :]  # past the sample's end: never scored
    return base, torch.cat((torch.stack(final), missing))


def dense_step(
    p: dict[str, Tensor],
    method: DominoMethod,
    draft: DominoDraft,
    packed: PackedBatch,
    places: Sequence[Sequence[int]],
) -> DenseResult:
    """docs/methods: Domino."""
    config = method.config
    first = 0 if config.shift_label else 1
    rows: list[list[Tensor]] = [[] for _ in range(6)]
    for sample, own in zip(separate(packed), places, strict=True):
        for anchor in own:
            base, final = dense_logits(p, draft, sample, anchor, shift=config.shift_label)
            for k, (b, f) in enumerate(zip(base, final, strict=True)):
                at = anchor + 1 + k  # both conventions: the slots that predict say what follows
                scored = at < sample.lengths[0] and bool(sample.loss_mask[at])
                label = sample.input_ids[at] if scored else torch.tensor(0)
                decay = exp(-k / config.gamma) if config.gamma else 1.0
                for store, value in zip(
                    rows,
                    (
                        F.cross_entropy(f, label),
                        F.cross_entropy(b, label),
                        scored & (f.argmax() == label),
                        scored & (b.argmax() == label),
                        torch.tensor(scored),
                        torch.tensor(decay * scored, dtype=torch.float64),
                    ),
                    strict=True,
                ):
                    store.append(value)
    slots = config.block_size - first
    ce, base_ce, right, base_right, mask, weight = (torch.stack(x).view(-1, slots) for x in rows)
    return DenseResult(
        final=(weight * ce).sum(),
        base=(weight * base_ce).sum(),
        weight=float(weight.sum()),
        ce=ce.detach(),
        base_ce=base_ce.detach(),
        correct=right,
        base_correct=base_right,
        scored=mask,
    )
