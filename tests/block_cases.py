"""Small block drafts, and what they compute written out densely in float64, one block at a time.

Targets and batches are those of eagle3_cases. Legend of shapes: S tokens of a sample, A blocks, B
rows of a block, K = B - 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

import eagle3_cases
from eagle3_cases import HIDDEN, VOCAB, double_parameters, gradients, separate, target
from specforge_ext.methods._block.model import BlockBackbone
from specforge_ext.methods._block.plan import Anchors
from specforge_ext.methods.dflash import DFlashConfig, DFlashMethod
from specforge_ext.methods.dflash.model import DFlashDraft
from specforge_ext.nn.rope import inverse_frequencies
from specforge_ext.records import (
    DraftVocab,
    PackedBatch,
    StepContext,
    TargetWeights,
    lengths_to_cu_seqlens,
)

__all__ = ["HIDDEN", "VOCAB", "double_parameters", "gradients", "separate", "target"]

LAYERS, BLOCK = 2, 5
FEATURES = LAYERS * HIDDEN
AT = StepContext(step=3, total_steps=10, seed=7)
MIXED: dict[str, object] = {
    "layer_types": ("sliding_attention", "full_attention"),
    "sliding_window": 5,
}
"""A sliding layer, whose last slot sees its block only, and a full one."""


def build(
    *, weights: TargetWeights | None = None, **config: object
) -> tuple[DFlashMethod, DFlashDraft, TargetWeights]:
    """A method and a draft whose matrices are large enough for every path to matter."""
    weights = weights or target()
    base: dict[str, object] = {"block_size": BLOCK, "num_anchors": 6, "num_layers": LAYERS}
    method = DFlashMethod(DFlashConfig.model_validate({**base, **config}))
    draft = method.build(weights, DraftVocab.full(VOCAB), seed=1)
    shake(draft)
    return method, draft, weights


def shake(draft: torch.nn.Module, std: float = 0.2) -> None:
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * std)


def batch(lengths: Sequence[int], *, seed: int = 0, density: float = 0.7) -> PackedBatch:
    """Samples whose loss mask comes in runs, 0 at the last position."""
    packed = eagle3_cases.batch(lengths, seed=seed, density=density)
    generator = torch.Generator().manual_seed(seed + 100)
    hidden = torch.randn(packed.num_tokens, FEATURES, generator=generator)
    return replace(packed, features={"hidden": hidden})


def anchors(places: Sequence[Sequence[int]], lengths: Sequence[int]) -> Anchors:
    """Of each sample, places in it."""
    starts = lengths_to_cu_seqlens(lengths).tolist()
    packed = [start + a for start, own in zip(starts, places, strict=False) for a in own]
    return Anchors(
        torch.tensor(packed, dtype=torch.int32), lengths_to_cu_seqlens([len(p) for p in places])
    )


def by_sample(drawn: Anchors, lengths: Sequence[int]) -> list[list[int]]:
    """The inverse of `anchors`."""
    starts, bounds = lengths_to_cu_seqlens(lengths).tolist(), drawn.bounds.tolist()
    places = drawn.places.tolist()
    return [[a - starts[k] for a in places[bounds[k] : bounds[k + 1]]] for k in range(len(lengths))]


@dataclass(frozen=True)
class DenseResult:
    """loss: differentiable in the parameters. ce, correct, scored: [A, B] of all blocks."""

    loss: Tensor
    weight: float
    ce: Tensor
    correct: Tensor
    scored: Tensor


def dense_step(
    p: dict[str, Tensor], method: DFlashMethod, draft: DFlashDraft, packed: PackedBatch,
    places: Sequence[Sequence[int]],
) -> DenseResult:  # fmt: skip
    """The definition, docs/methods: DFlash; every block by itself, every slot by itself."""
    config, ces, rights, masks = method.config, [], [], []
    for sample, own in zip(separate(packed), places, strict=True):
        size = sample.lengths[0]
        for anchor in own:
            states = dense_block(p, draft, sample, anchor)
            logits = states @ draft.target_head.double().T
            ce, right, mask = [], [], []
            for k in range(config.block_size):
                at = anchor + k
                scored = k > 0 and at < size and bool(sample.loss_mask[at])
                label = sample.input_ids[at] if at < size else torch.tensor(0)
                ce.append(F.cross_entropy(logits[k], label))
                right.append(scored and int(logits[k].argmax()) == int(label))
                mask.append(scored)
            ces.append(torch.stack(ce))
            rights.append(torch.tensor(right))
            masks.append(torch.tensor(mask))
    ce, correct, scored = torch.stack(ces), torch.stack(rights), torch.stack(masks)
    weight = dense_weight(method.config, ce.detach(), scored)
    total = float(weight.sum()) if config.dpace is None else float(len(packed.lengths))
    return DenseResult((weight * ce).sum(), total, ce.detach(), correct, scored)


def dense_weight(config: DFlashConfig, ce: Tensor, scored: Tensor) -> Tensor:
    weight = torch.zeros_like(ce)
    for row, (losses, mask) in enumerate(zip(ce.tolist(), scored.tolist(), strict=True)):
        pass_rate = [
            (1 - config.dpace_alpha) * float(torch.tensor(-c).exp()) + config.dpace_alpha
            if m
            else 1.0
            for c, m in zip(losses, mask, strict=True)
        ]
        prefix = torch.tensor(pass_rate, dtype=torch.float64).cumprod(0)
        for k, is_scored in enumerate(mask):
            if not is_scored:
                continue
            suffix = sum(float(prefix[j]) for j in range(k, len(mask)) if mask[j])
            weight[row, k] = {
                None: float(torch.tensor(-(k - 1) / (config.gamma or 1e30)).exp()),
                "prefix": float(prefix[k]),
                "suffix": suffix,
                "suffix_over_prefix": suffix / float(prefix[k]),
            }[config.dpace]
    return weight


def dense_block(
    p: dict[str, Tensor], draft: BlockBackbone, sample: PackedBatch, anchor: int
) -> Tensor:
    """Normed hidden states [B, H] of the block at a sample's anchor."""
    shape = draft.block_shape
    size, eps = shape.block_size, shape.layer.rms_norm_eps
    heads, kv_heads, dim = shape.layer.num_heads, shape.layer.num_kv_heads, shape.layer.head_dim
    freq = inverse_frequencies(dim, theta=shape.rope_theta, scaling=shape.rope_scaling).double()

    def norm(x: Tensor, name: str) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * p[f"{name}.weight"]

    def turn(x: Tensor, positions: Tensor) -> Tensor:
        angle = (positions[:, None].double() * freq).repeat(1, 2)[:, None]
        rotated = torch.cat((-x[..., dim // 2 :], x[..., : dim // 2]), -1)
        return x * angle.cos() + rotated * angle.sin()

    before, places = torch.arange(anchor), torch.arange(anchor, anchor + size)
    features = sample.features["hidden"][:anchor].double()
    context = norm(features @ p["fc.weight"].T, "hidden_norm")
    ids = torch.full((size,), shape.mask_token_id)
    ids[0] = sample.input_ids[anchor]
    x = draft.embed_tokens.double()[ids]
    for i, window in enumerate(shape.windows):
        name = f"layers.{i}"

        def project(y: Tensor, which: str, at: Tensor, name: str = name) -> Tensor:
            out = (y @ p[f"{name}.self_attn.{which}_proj.weight"].T).unflatten(-1, (-1, dim))
            return out if which == "v" else turn(norm(out, f"{name}.self_attn.{which}_norm"), at)

        normed = norm(x, f"{name}.input_layernorm")
        query = project(normed, "q", places)
        keys, values = (
            torch.cat((project(context, w, before), project(normed, w, places))) for w in ("k", "v")
        )
        keys, values = (y.repeat_interleave(heads // kv_heads, 1) for y in (keys, values))
        at = torch.cat((before, places))
        hidden = torch.zeros(size, len(at), dtype=torch.bool)
        if window is not None:  # it bounds the context; the block is causal
            too_old = (at < places[:, None] - (window - 1)) & (at < anchor)
            hidden = too_old | (at > places[:, None])
        scores = torch.einsum("qhd,khd->hqk", query, keys) * dim**-0.5
        share = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        attended = torch.einsum("hqk,khd->qhd", share, values).flatten(1)
        x = x + attended @ p[f"{name}.self_attn.o_proj.weight"].T
        y = norm(x, f"{name}.post_attention_layernorm")
        gate, up = (y @ p[f"{name}.mlp.{w}_proj.weight"].T for w in ("gate", "up"))
        x = x + F.silu(gate) * up @ p[f"{name}.mlp.down_proj.weight"].T
    return norm(x, "norm")
