"""Small targets with layers for multi-token prediction of every form, and the whole step written
out densely in float64.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

import eagle3_cases as cases
from specforge_ext.methods.mtp import MtpConfig, MtpMethod
from specforge_ext.methods.mtp.model import MtpDraft
from specforge_ext.records import DraftVocab, PackedBatch, TargetWeights

FORMS = ("deepseek", "qwen3_next")
_OUTER = {
    "deepseek": ("model.layers.8.", "", "enorm", "hnorm", "eh_proj", "shared_head.norm"),
    "qwen3_next": (
        "mtp.", "layers.0.", "pre_fc_norm_embedding", "pre_fc_norm_hidden", "fc", "norm",
    ),
}  # fmt: skip


def checkpoint(
    form: str, *, qk_norm: bool = True, bias: bool = False, gate: bool = False, seed: int = 4
) -> dict[str, Tensor]:
    """The tensors of a layer, large enough for every path to matter, beside some of the target's.

    Written out here a second time, so that a wrong name in the method does not agree with itself.
    """
    generator = torch.Generator().manual_seed(seed)
    spec = cases.target().spec
    hidden, ffn, dim = spec.hidden_size, spec.intermediate_size, spec.head_dim
    q, kv = spec.num_heads * dim, spec.num_kv_heads * dim
    q_rows = q * (1 + gate)
    prefix, layer, embedding_norm, hidden_norm, fuse, norm = _OUTER[form]
    shapes: dict[str, tuple[int, ...]] = {
        f"{embedding_norm}.weight": (hidden,),
        f"{hidden_norm}.weight": (hidden,),
        f"{fuse}.weight": (hidden, 2 * hidden),
        f"{norm}.weight": (hidden,),
        f"{layer}input_layernorm.weight": (hidden,),
        f"{layer}post_attention_layernorm.weight": (hidden,),
        f"{layer}self_attn.q_proj.weight": (q_rows, hidden),
        f"{layer}self_attn.k_proj.weight": (kv, hidden),
        f"{layer}self_attn.v_proj.weight": (kv, hidden),
        f"{layer}self_attn.o_proj.weight": (hidden, q),
        f"{layer}mlp.gate_proj.weight": (ffn, hidden),
        f"{layer}mlp.up_proj.weight": (ffn, hidden),
        f"{layer}mlp.down_proj.weight": (hidden, ffn),
    }
    if qk_norm:
        shapes |= {f"{layer}self_attn.{part}_norm.weight": (dim,) for part in "qk"}
    if bias:
        rows = {"q": q_rows, "k": kv, "v": kv}
        shapes |= {f"{layer}self_attn.{part}_proj.bias": (rows[part],) for part in "qkv"}
    out = {
        f"{prefix}{name}": torch.randn(shape, generator=generator) * 0.3 for name, shape in
        shapes.items()
    }  # fmt: skip
    if form != "qwen3_next":  # whose norms scale by 1 + weight
        out |= {name: x + 1 for name, x in out.items() if "norm" in name}
    out["model.layers.7.mlp.up_proj.weight"] = torch.zeros(ffn, hidden)
    if form == "deepseek":
        out[f"{prefix}embed_tokens.weight"] = torch.zeros(spec.vocab_size, hidden)
        out[f"{prefix}shared_head.head.weight"] = torch.zeros(spec.vocab_size, hidden)
    return out


def target(tensors: Mapping[str, Tensor], *, rotary: float = 1.0) -> TargetWeights:
    weights = cases.target()
    spec = replace(weights.spec, partial_rotary_factor=rotary)
    return replace(weights, spec=spec, checkpoint=tensors)


def build(
    form: str = "deepseek",
    *,
    tensors: Mapping[str, Tensor] | None = None,
    rotary: float = 1.0,
    **config: object,
) -> tuple[MtpMethod, MtpDraft, TargetWeights]:
    weights = target(checkpoint(form) if tensors is None else tensors, rotary=rotary)
    method = MtpMethod(MtpConfig.model_validate(config))
    draft = method.build(weights, DraftVocab.full(cases.VOCAB), seed=0)
    return method, draft, weights


def batch(lengths: Sequence[int], *, seed: int = 0, density: float = 0.5) -> PackedBatch:
    packed = cases.batch(lengths, seed=seed, density=density)
    return replace(packed, features={"last": packed.features["last"]})


def dense_logits(
    p: Mapping[str, Tensor],
    form: str,
    weights: TargetWeights,
    sample: PackedBatch,
    steps: int,
    *,
    zero_first: bool = False,
) -> list[Tensor]:
    """Logits [S, V] float64 of every row of one sample at every step. p: a checkpoint's tensors in
    float64; what kind of layer they are of follows from which there are.
    """
    prefix, inner, embedding_norm, hidden_norm, fuse, output_norm = _OUTER[form]
    spec, n, dim = weights.spec, sample.num_tokens, weights.spec.head_dim
    layer = f"{prefix}{inner}"
    rotary = int(dim * spec.partial_rotary_factor)

    def norm(x: Tensor, name: str) -> Tensor:
        scale = p[f"{name}.weight"] + (form == "qwen3_next")
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + spec.rms_norm_eps) * scale

    def rope(x: Tensor, positions: Tensor) -> Tensor:
        half = rotary // 2
        frequencies = 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
        turn = torch.polar(torch.ones(n, half).double(), positions[:, None] * frequencies)[:, None]
        turned = torch.complex(x[..., :half], x[..., half:rotary]) * turn
        return torch.cat((turned.real, turned.imag, x[..., rotary:]), -1)

    def project(x: Tensor, part: str) -> Tensor:
        out = x @ p[f"{layer}self_attn.{part}_proj.weight"].T
        return out + p.get(f"{layer}self_attn.{part}_proj.bias", torch.zeros(()))

    def normed_heads(x: Tensor, part: str) -> Tensor:
        name = f"{layer}self_attn.{part}_norm"
        return norm(x, name) if f"{name}.weight" in p else x

    hidden = sample.features["last"].double()
    keys, values, masks, logits = [], [], [], []
    rows, groups = torch.arange(n), spec.num_heads // spec.num_kv_heads
    for i in range(steps):
        tokens = torch.cat((sample.input_ids[1 + i :], torch.zeros(n, dtype=torch.int64)))[:n]
        embedding = weights.embed_tokens.double()[tokens]
        if zero_first and i == 0:
            embedding[0] = 0
        parts = [
            norm(embedding, f"{prefix}{embedding_norm}"), norm(hidden, f"{prefix}{hidden_norm}")
        ]  # fmt: skip
        stream = torch.cat(parts, -1) @ p[f"{prefix}{fuse}.weight"].T
        x = norm(stream, f"{layer}input_layernorm")
        q, gate = project(x, "q").reshape(n, spec.num_heads, -1), None
        if q.shape[-1] == 2 * dim:
            q, gate = q[..., :dim], q[..., dim:]
        k, v = (project(x, part).reshape(n, -1, dim) for part in "kv")
        q = rope(normed_heads(q, "q"), rows + i)
        keys.append(rope(normed_heads(k, "k"), rows + i))
        values.append(v)
        masks.append(rows[:, None] == rows if i else rows[:, None] >= rows)
        k_all, v_all = (torch.cat(y).repeat_interleave(groups, 1) for y in (keys, values))
        scores = torch.einsum("qhd,khd->hqk", q, k_all) / dim**0.5
        scores = scores.masked_fill(~torch.cat(masks, 1), float("-inf"))
        attended = torch.einsum("hqk,khd->qhd", torch.softmax(scores, -1), v_all)
        if gate is not None:
            attended = attended * torch.sigmoid(gate)
        stream = stream + attended.flatten(1) @ p[f"{layer}self_attn.o_proj.weight"].T
        y = norm(stream, f"{layer}post_attention_layernorm")
        a, b = (y @ p[f"{layer}mlp.{part}_proj.weight"].T for part in ("gate", "up"))
        stream = stream + (a * torch.sigmoid(a) * b) @ p[f"{layer}mlp.down_proj.weight"].T
        hidden = norm(stream, f"{prefix}{output_norm}")
        logits.append(hidden @ weights.lm_head.double().T)
    return logits


def dense_step(
    p: Mapping[str, Tensor], form: str, weights: TargetWeights, packed: PackedBatch, c: MtpConfig
) -> tuple[Tensor, Tensor]:
    """(loss, [4, L]: sums of loss, correct, accepted and rows by step) of soft_ce or labels."""
    sums = torch.zeros(4, c.num_steps, dtype=torch.float64)
    loss = torch.zeros((), dtype=torch.float64)
    for sample in cases.separate(packed):
        zero = c.zero_first_embedding
        logits = dense_logits(p, form, weights, sample, c.num_steps, zero_first=zero)
        teacher = sample.features["last"].double() @ weights.lm_head.double().T / c.temperature
        n = sample.num_tokens
        for i in range(c.num_steps):
            for t in range(n - 1 - i):
                u = t + i
                if not sample.loss_mask[u] or (c.loss == "labels" and u + 2 >= n):
                    continue
                z, q = logits[i][t] / c.temperature, torch.softmax(teacher[u + 1], -1)
                best = int(teacher[u + 1].argmax())
                if c.loss == "labels":
                    best = int(sample.input_ids[u + 2])
                    row = -torch.log_softmax(z, -1)[best]
                else:
                    row = -(q * torch.log_softmax(z, -1)).sum()
                    sums[2, i] += torch.minimum(q, torch.softmax(z.detach(), -1)).sum()
                loss = loss + c.step_decay**i * row
                sums[0, i] += row.detach()
                sums[1, i] += int(z.argmax()) == best
                sums[3, i] += 1
    return loss, sums


LAYERS = 3


def write_target(path: Path, *, shards: bool = False, linear: bool = False) -> dict[str, Tensor]:
    """A tiny Qwen 3.5 text model with its MTP layer, as a folder; the layer's tensors.

    Attention is full in all layers, or every second one has the gated delta rule. Each layer adds
    little to the residual stream, so that text is not noise. shards: several files and an index.
    """
    config = Qwen3_5TextConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        layer_types=[
            "linear_attention" if linear and not i % 2 else "full_attention" for i in range(LAYERS)
        ],
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        max_position_embeddings=256,
        mtp_num_hidden_layers=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    model = Qwen3_5ForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.dim() > 1 else 1)
    model.save_pretrained(path)
    weights = path / "model.safetensors"
    tensors = load_file(weights)
    last = f"model.layers.{LAYERS - 1}."
    if linear:
        last = "model.layers.1."
    layer = {
        f"mtp.layers.0.{name.removeprefix(last)}": tensor.clone()
        for name, tensor in tensors.items()
        if name.startswith(last)
    }
    generator = torch.Generator().manual_seed(1)
    for name in ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden"):
        layer[f"mtp.{name}.weight"] = 0.1 * torch.randn(32, generator=generator)
    layer["mtp.fc.weight"] = 0.3 * torch.randn(32, 64, generator=generator)
    tensors |= layer
    if not shards:
        save_file(tensors, weights, metadata={"format": "pt"})
        return layer
    weights.unlink()
    names = sorted(tensors)
    table = {name: f"model-{i % 3 + 1:05}-of-00003.safetensors" for i, name in enumerate(names)}
    # MTP layers lie at the end of real checkpoints, in few of the files.
    table |= {name: "model-00003-of-00003.safetensors" for name in layer}
    for file in set(table.values()):
        save_file({n: tensors[n] for n in names if table[n] == file}, path / file)
    index = json.dumps({"metadata": {}, "weight_map": table})
    (path / "model.safetensors.index.json").write_text(index)
    return layer
