"""Small P-EAGLE drafts, and the whole step written out densely in float64."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

import eagle3_cases as cases
from specforge_ext.methods.peagle import PEagleConfig, PEagleMethod
from specforge_ext.methods.peagle.model import PEagleDraft
from specforge_ext.records import PackedBatch, StepContext, TargetWeights

AT = StepContext(step=3, total_steps=10, seed=5)


def build(
    *, vocab_size: int | None = 23, weights: TargetWeights | None = None, **config: object
) -> tuple[PEagleMethod, PEagleDraft, TargetWeights]:
    """A method and a draft whose matrices are large enough for every path to matter."""
    weights = weights or cases.target()
    method = PEagleMethod(PEagleConfig.model_validate({"draft_vocab_size": vocab_size, **config}))
    draft = method.build(weights, cases.vocab(vocab_size), seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return method, draft, weights


def double_parameters(draft: PEagleDraft) -> dict[str, Tensor]:
    return {n: p.detach().double().requires_grad_() for n, p in draft.named_parameters()}


def gradients(draft: PEagleDraft) -> dict[str, Tensor]:
    """The gradients, which must all be there."""
    out = {}
    for name, parameter in draft.named_parameters():
        assert parameter.grad is not None, name
        out[name] = parameter.grad.clone()
    return out


def chains_of_sample(
    packed: PackedBatch, chains: Sequence[Tensor], k: int
) -> list[tuple[int, int]]:
    """(anchor, depth) of every row of sample k, offsets in the sample."""
    begin = sum(packed.lengths[:k])
    end = begin + packed.lengths[k]
    rows = [(t, 0) for t in range(packed.lengths[k])]
    for d, anchors in enumerate(chains, 1):
        rows += [(a - begin, d) for a in anchors.tolist() if begin <= a < end]
    return rows


def dense_logits(
    p: dict[str, Tensor], draft: PEagleDraft, sample: PackedBatch, rows: list[tuple[int, int]]
) -> Tensor:
    """Draft logits [rows, Vd] float64 of one sample, with the mask [rows, rows] written out."""
    shape, n = draft.shape.layer, len(rows)
    anchor, depth = torch.tensor(rows).T
    place = anchor + depth

    def norm(x: Tensor, name: str) -> Tensor:
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + shape.rms_norm_eps) * p[name]

    def rope(x: Tensor) -> Tensor:
        half = shape.head_dim // 2
        frequencies = 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
        turn = torch.polar(torch.ones(n, half).double(), place[:, None] * frequencies)[:, None]
        turned = torch.complex(x[..., :half], x[..., half:]) * turn
        return torch.cat((turned.real, turned.imag), -1)

    following = torch.cat((sample.input_ids[1:], sample.input_ids[-1:]))
    first = (depth == 0)[:, None]
    ids = torch.where(first[:, 0], following[place], draft.mask_token_id)
    embedding = p["embed_tokens.weight"][ids]
    aux = torch.where(first, sample.features["aux"].double()[place], p["mask_hidden"][0])
    hidden = aux @ p["fc.weight"].T
    visible = ((depth == 0) & (anchor[:, None] >= anchor)) | (
        (anchor[:, None] == anchor) & (depth[:, None] >= depth)
    )
    for i in range(draft.config.num_layers):
        name = f"layers.{i}"
        x = norm(hidden, f"{name}.{'input_layernorm' if i else 'hidden_norm'}.weight")
        if not i:
            x = torch.cat((norm(embedding, f"{name}.input_layernorm.weight"), x), -1)
        q, k, v = (
            (x @ p[f"{name}.self_attn.{part}_proj.weight"].T).reshape(n, -1, shape.head_dim)
            for part in "qkv"
        )
        groups = shape.num_heads // shape.num_kv_heads
        k, v = (y.repeat_interleave(groups, 1) for y in (rope(k), v))
        scores = torch.einsum("qhd,khd->hqk", rope(q), k) / shape.head_dim**0.5
        scores = scores.masked_fill(~visible, float("-inf"))
        seen = torch.einsum("hqk,khd->qhd", torch.softmax(scores, -1), v).flatten(1)
        hidden = hidden + seen @ p[f"{name}.self_attn.o_proj.weight"].T
        y = norm(hidden, f"{name}.post_attention_layernorm.weight")
        gate, up = (y @ p[f"{name}.mlp.{part}_proj.weight"].T for part in ("gate", "up"))
        hidden = hidden + (gate * torch.sigmoid(gate) * up) @ p[f"{name}.mlp.down_proj.weight"].T
    return norm(hidden, "norm.weight") @ p["lm_head.weight"].T


def dense_step(
    parameters: dict[str, Tensor],
    draft: PEagleDraft,
    weights: TargetWeights,
    packed: PackedBatch,
    chains: Sequence[Tensor],
) -> tuple[Tensor, Tensor]:
    """(loss, [5, K]: sums of loss, correct, accepted, rows and labelled rows by depth)."""
    sums = torch.zeros(5, draft.config.num_depths, dtype=torch.float64)
    loss, tau = torch.zeros((), dtype=torch.float64), draft.config.temperature
    for k, sample in enumerate(cases.separate(packed)):
        rows = chains_of_sample(packed, chains, k)
        logits = dense_logits(parameters, draft, sample, rows)
        target = sample.features["last"].double() @ weights.lm_head.double().T
        for (a, d), z in zip(rows, logits, strict=True):
            u = a + d
            if u + 1 >= sample.num_tokens or not sample.loss_mask[u]:
                continue
            sums[4, d] += 1
            row = target[u + 1]
            if not draft.t2d[row.argmax()]:
                continue
            p = torch.softmax(row[draft.t2d] / tau, -1)
            row_loss = -(p * torch.log_softmax(z / tau, -1)).sum()
            loss = loss + row_loss
            sums[0, d] += row_loss.detach()
            best = int(z.argmax())
            sums[1, d] += best + int(draft.d2t[best]) == int(row.argmax())
            full = torch.softmax(row / tau, -1)[draft.t2d]
            sums[2, d] += torch.minimum(full, torch.softmax(z.detach() / tau, -1)).sum()
            sums[3, d] += 1
    return loss, sums
