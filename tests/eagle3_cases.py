"""Small targets and batches for the EAGLE-3 tests, and the whole step written out densely in
float64.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from specforge_ext.methods._ttt_plan import TttPlan, build_plan
from specforge_ext.methods.eagle3 import Eagle3Config, Eagle3Method, build_draft_vocab
from specforge_ext.methods.eagle3.model import Eagle3Draft
from specforge_ext.records import (
    DraftVocab,
    PackedBatch,
    StepContext,
    TargetSpec,
    TargetWeights,
    lengths_to_cu_seqlens,
)

HIDDEN, FFN, VOCAB = 24, 40, 61
AT = StepContext(step=0, total_steps=1, seed=0)


def target(*, seed: int = 0, heads: int = 4, kv_heads: int = 2, head_dim: int = 8) -> TargetWeights:
    """A random target of 8 layers in float32; its last layer is there, with Qwen's q_norm and
    k_norm.
    """
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape: int, std: float = 0.3) -> Tensor:
        return torch.randn(*shape, generator=generator) * std

    spec = TargetSpec(
        name="tiny",
        model_type="qwen3",
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=FFN,
        num_layers=8,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=1e-6,
        rope_theta=10000.0,
        rope_scaling=None,
        max_position_embeddings=512,
        dtype="float32",
        bos_token_id=1,
        eos_token_ids=(2,),
    )
    q, kv = heads * head_dim, kv_heads * head_dim
    shapes = {
        "self_attn.q_proj.weight": (q, HIDDEN),
        "self_attn.k_proj.weight": (kv, HIDDEN),
        "self_attn.v_proj.weight": (kv, HIDDEN),
        "self_attn.o_proj.weight": (HIDDEN, q),
        "self_attn.q_norm.weight": (head_dim,),
        "self_attn.k_norm.weight": (head_dim,),
        "mlp.gate_proj.weight": (FFN, HIDDEN),
        "mlp.up_proj.weight": (FFN, HIDDEN),
        "mlp.down_proj.weight": (HIDDEN, FFN),
        "input_layernorm.weight": (HIDDEN,),
        "post_attention_layernorm.weight": (HIDDEN,),
    }
    return TargetWeights(
        spec=spec,
        embed_tokens=rand(VOCAB, HIDDEN),
        lm_head=rand(VOCAB, HIDDEN),
        final_norm=rand(HIDDEN) + 1,
        last_layer={name: rand(*s) + float(len(s) == 1) for name, s in shapes.items()},
    )


def vocab(size: int | None = 23, *, seed: int = 0) -> DraftVocab:
    counts = torch.randint(0, 9, (VOCAB,), generator=torch.Generator().manual_seed(seed))
    return build_draft_vocab(counts, size)


def build(
    *, vocab_size: int | None = 23, weights: TargetWeights | None = None, **config: object
) -> tuple[Eagle3Method, Eagle3Draft, TargetWeights]:
    """A method and a draft whose matrices are large enough for every path to matter."""
    weights = weights or target()
    method = Eagle3Method(Eagle3Config.model_validate({"draft_vocab_size": vocab_size, **config}))
    draft = method.build(weights, vocab(vocab_size), seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return method, draft, weights


def batch(lengths: Sequence[int], *, seed: int = 0, density: float = 0.5) -> PackedBatch:
    """Samples whose loss mask comes in runs, 0 at the last position."""
    generator, rng = torch.Generator().manual_seed(seed), random.Random(seed)
    masks = []
    for n in lengths:
        mask: list[int] = []
        while len(mask) < n:
            mask += [int(rng.random() < density)] * rng.randint(1, 6)
        masks.append(torch.tensor([*mask[: n - 1], 0][:n], dtype=torch.uint8))
    total = sum(lengths)
    return PackedBatch(
        sample_ids=tuple(f"s{k}" for k in range(len(lengths))),
        lengths=tuple(lengths),
        input_ids=torch.randint(0, VOCAB, (total,), generator=generator),
        loss_mask=torch.cat(masks),
        positions=torch.cat([torch.arange(n) for n in lengths]),
        features={
            "aux": torch.randn(total, 3 * HIDDEN, generator=generator),
            "last": torch.randn(total, HIDDEN, generator=generator),
        },
        cu_seqlens=lengths_to_cu_seqlens(lengths),
    )


def with_features(packed: PackedBatch, **features: Tensor) -> PackedBatch:
    return replace(packed, features={**packed.features, **features})


def separate(packed: PackedBatch) -> list[PackedBatch]:
    """Each sample of the batch as a batch of its own."""
    out, begin = [], 0
    for name, n in zip(packed.sample_ids, packed.lengths, strict=True):
        rows = slice(begin, begin + n)
        out.append(
            PackedBatch(
                sample_ids=(name,),
                lengths=(n,),
                input_ids=packed.input_ids[rows],
                loss_mask=packed.loss_mask[rows],
                positions=packed.positions[rows],
                features={key: value[rows] for key, value in packed.features.items()},
                cu_seqlens=lengths_to_cu_seqlens([n]),
            )
        )
        begin += n
    return out


@dataclass(frozen=True)
class DenseResult:
    """loss: differentiable in `parameters`; the others are per step. logits[i]: [S, Vd] of one
    sample.
    """

    loss: Tensor
    step_loss: Tensor
    correct: Tensor
    accepted: Tensor
    rows: Tensor
    scored: Tensor


def dense_step(
    parameters: dict[str, Tensor], draft: Eagle3Draft, weights: TargetWeights, packed: PackedBatch
) -> DenseResult:
    """The definition, sample by sample, with explicit [S, (i + 1) S] masks. parameters: float64."""
    depth = draft.config.ttt_length
    sums = torch.zeros(5, depth, dtype=torch.float64)
    loss = torch.zeros((), dtype=torch.float64)
    for sample in separate(packed):
        logits = dense_logits(parameters, draft, weights, sample)
        n = sample.num_tokens
        teacher = sample.features["last"].double() @ weights.lm_head.double().T
        for i in range(depth):
            for t in range(n - 1 - i):
                if not sample.loss_mask[t + i]:
                    continue
                sums[4, i] += 1
                row = teacher[t + i + 1]
                if not draft.t2d[row.argmax()]:
                    continue
                p, z = torch.softmax(row[draft.t2d], -1), logits[i][t]
                row_loss = -(p * torch.log_softmax(z, -1)).sum()
                loss = loss + draft.config.step_decay**i * row_loss
                sums[0, i] += row_loss.detach()
                student = int(z.argmax())
                sums[1, i] += student + int(draft.d2t[student]) == int(row.argmax())
                full = torch.softmax(row, -1)[draft.t2d]
                sums[2, i] += torch.minimum(full, torch.softmax(z.detach(), -1)).sum()
                sums[3, i] += 1
    return DenseResult(loss, *sums)


def dense_logits(
    parameters: dict[str, Tensor], draft: Eagle3Draft, weights: TargetWeights, sample: PackedBatch
) -> list[Tensor]:
    """Draft logits [S, Vd] float64 of every row of one sample at every step."""
    p, shape = parameters, draft.shape.layer
    n, heads, kv_heads, dim = (
        sample.num_tokens, shape.num_heads, shape.num_kv_heads, shape.head_dim,
    )  # fmt: skip

    def norm(x: Tensor, name: str) -> Tensor:
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + shape.rms_norm_eps) * p[name]

    def rope(x: Tensor, positions: Tensor) -> Tensor:
        half = dim // 2
        frequencies = 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
        turn = torch.polar(torch.ones(n, half).double(), positions[:, None] * frequencies)[:, None]
        turned = torch.complex(x[..., :half], x[..., half:]) * turn
        return torch.cat((turned.real, turned.imag), -1)

    embed = weights.embed_tokens.double()
    hidden = sample.features["aux"].double() @ p["fc.weight"].T
    keys, values, masks, logits = [], [], [], []
    rows = torch.arange(n)
    for i in range(draft.config.ttt_length):
        tokens = torch.cat((sample.input_ids[1 + i :], torch.zeros(n, dtype=torch.int64)))[:n]
        e = norm(embed[tokens], "midlayer.input_layernorm.weight")
        x = torch.cat((e, norm(hidden, "midlayer.hidden_norm.weight")), -1)
        q, k, v = (
            (x @ p[f"midlayer.self_attn.{name}_proj.weight"].T).reshape(n, -1, dim)
            for name in "qkv"
        )
        keys.append(rope(k, rows + i))
        values.append(v)
        masks.append(rows[:, None] == rows if i else rows[:, None] >= rows)
        k_all = torch.cat(keys).repeat_interleave(heads // kv_heads, 1)
        v_all = torch.cat(values).repeat_interleave(heads // kv_heads, 1)
        scores = torch.einsum("qhd,khd->hqk", rope(q, rows + i), k_all) / dim**0.5
        scores = scores.masked_fill(~torch.cat(masks, 1), float("-inf"))
        attended = torch.einsum("hqk,khd->qhd", torch.softmax(scores, -1), v_all).flatten(1)
        hidden = hidden + attended @ p["midlayer.self_attn.o_proj.weight"].T
        y = norm(hidden, "midlayer.post_attention_layernorm.weight")
        gate, up = (y @ p[f"midlayer.mlp.{name}_proj.weight"].T for name in ("gate", "up"))
        gated = gate * torch.sigmoid(gate) * up
        hidden = hidden + gated @ p["midlayer.mlp.down_proj.weight"].T
        logits.append(norm(hidden, "norm.weight") @ p["lm_head.weight"].T)
    return logits


def double_parameters(draft: Eagle3Draft) -> dict[str, Tensor]:
    return {
        name: parameter.detach().double().requires_grad_()
        for name, parameter in draft.named_parameters()
    }


def gradients(draft: Eagle3Draft) -> dict[str, Tensor]:
    """The gradients, which must all be there."""
    out = {}
    for name, parameter in draft.named_parameters():
        assert parameter.grad is not None, name
        out[name] = parameter.grad.clone()
    return out


def plan(draft: Eagle3Draft, mask: Tensor, lengths: Sequence[int]) -> TttPlan:
    return build_plan(
        mask,
        lengths,
        ttt_length=draft.config.ttt_length,
        compaction=draft.config.compaction,
        device=torch.device("cpu"),
    )
