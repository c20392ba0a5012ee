"""Small DSpark drafts, and what they compute written out in float64, one row at a time.

Legend of shapes: S tokens of a sample, A blocks, B rows of a block, H hidden size, E rank, V
vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

import block_cases
from specforge_ext.methods.dspark import DSparkConfig, DSparkMethod
from specforge_ext.methods.dspark.model import DSparkDraft
from specforge_ext.records import DraftVocab, PackedBatch, TargetWeights

RANK = 6
KINDS = ("vanilla", "gated", "rnn")


def build(
    *, weights: TargetWeights | None = None, **config: object
) -> tuple[DSparkMethod, DSparkDraft, TargetWeights]:
    """A method and a draft whose matrices are large enough for every path to matter."""
    weights = weights or block_cases.target()
    base: dict[str, object] = {
        "block_size": block_cases.BLOCK,
        "num_anchors": 6,
        "num_layers": block_cases.LAYERS,
        "markov_rank": RANK,
    }
    method = DSparkMethod(DSparkConfig.model_validate({**base, **config}))
    draft = method.build(weights, DraftVocab.full(block_cases.VOCAB), seed=1)
    block_cases.shake(draft)
    return method, draft, weights


def batch(lengths: Sequence[int], *, seed: int = 0, density: float = 0.7) -> PackedBatch:
    packed = block_cases.batch(lengths, seed=seed, density=density)
    generator = torch.Generator().manual_seed(seed + 200)
    last = torch.randn(packed.num_tokens, block_cases.HIDDEN, generator=generator)
    return replace(packed, features={**packed.features, "last": last})


@dataclass(frozen=True)
class Dense:
    """loss: differentiable. weight: what it is divided by. The others [A, B] of all blocks, 0 where
    a slot is not scored; `loss` there is that of the row, without its weight.
    """

    loss_sum: Tensor
    weight: float
    loss: Tensor
    correct: Tensor
    accepted: Tensor
    foretold_error: Tensor
    scored: Tensor


def dense_step(
    p: dict[str, Tensor], method: DSparkMethod, draft: DSparkDraft, packed: PackedBatch,
    places: Sequence[Sequence[int]],
) -> Dense:  # fmt: skip
    """The definition, docs/methods: DSpark."""
    config, total, weight = method.config, torch.zeros((), dtype=torch.float64), 0.0
    found: list[Tensor] = []
    head = draft.target_head.double()
    for sample, own in zip(block_cases.separate(packed), places, strict=True):
        for anchor in own:
            states = block_cases.dense_block(p, draft, sample, anchor)
            row = torch.zeros(5, config.block_size, dtype=torch.float64)
            ids = sample.input_ids[anchor:].tolist()
            logits, confidence = dense_block_logits(p, draft, states, ids)
            for k in range(len(logits)):
                label = anchor + 1 + k
                if label >= sample.lengths[0] or not sample.loss_mask[label]:
                    break  # and whatever comes after it in the block
                teacher = sample.features["last"][label - 1].double() @ head.T
                q, t = logits[k].softmax(0), teacher.softmax(0)
                l1 = (q - t).abs().sum()
                loss = config.ce_weight * -logits[k].log_softmax(0)[ids[k + 1]]
                loss = loss + config.l1_weight * l1
                chance = 1 - 0.5 * l1.detach()
                if config.confidence_weight:
                    foretold = torch.sigmoid(confidence[k])
                    error = -(chance * foretold.log() + (1 - chance) * (1 - foretold).log())
                    loss = loss + config.confidence_weight * error
                    row[3, k] = (foretold.detach() - chance).abs()
                share = float(torch.tensor(-k / (config.gamma or 1e30)).exp())
                total, weight = total + share * loss, weight + share
                row[0, k], row[2, k], row[4, k] = loss.detach(), chance, 1
                row[1, k] = int(logits[k].argmax()) == int(teacher.argmax())
            if row[4].any():
                found.append(row)
    rows = torch.stack(found)
    return Dense(total, weight, *rows.unbind(1))


def dense_block_logits(
    p: dict[str, Tensor], draft: DSparkDraft, states: Tensor, ids: Sequence[int]
) -> tuple[list[Tensor], list[Tensor]]:
    """Logits [V] of each slot and of its confidence, when the tokens from the anchor on are ids."""
    head, kind = draft.target_head.double(), draft.head_shape.kind
    w1, w2 = p["markov_head.markov_w1.weight"], p["markov_head.markov_w2.weight"]
    state = torch.zeros(w1.shape[1], dtype=torch.float64)
    logits, confidence = [], []
    for hidden, token in zip(states[: len(ids) - 1], ids, strict=False):
        m = w1[token]
        latent = m
        if kind == "gated":
            joined = torch.cat((hidden, m))
            gate = p["markov_head.gate_proj.weight"] @ joined + p["markov_head.gate_proj.bias"]
            latent = torch.sigmoid(gate) * m
        if kind == "rnn":
            joined = torch.cat((state, m, hidden))
            raw = p["markov_head.joint_proj.weight"] @ joined + p["markov_head.joint_proj.bias"]
            keep, new, out = raw.chunk(3)
            latent = torch.tanh(out)
            state = torch.sigmoid(keep) * state + (1 - torch.sigmoid(keep)) * torch.tanh(new)
        logits.append(head @ hidden + w2 @ latent)
        if draft.head_shape.confidence:
            joined = torch.cat((hidden, m))
            (one,) = F.linear(
                joined, p["confidence_head.proj.weight"], p["confidence_head.proj.bias"]
            )
            confidence.append(one)
    return logits, confidence
