"""EAGLE-3's options: several layers, the norms of EAGLE-3.1, top-k distillation, resuming."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import eagle3_cases as cases
from specforge_ext.config import defaults, parse
from specforge_ext.methods.eagle3 import Eagle3Config, Eagle3Method
from specforge_ext.methods.eagle3.export import engine_configs
from specforge_ext.methods.eagle3.model import Eagle3Draft
from specforge_ext.records import DraftCheckpoint, PackedBatch, StepLoss, TargetWeights
from specforge_ext.runs.local import _identity_defaults
from specforge_ext.runs.recipe import load
from specforge_ext.trainer.loop import check_identity

ALL = {"num_layers": 3, "fc_norm": True, "norm_output": True}


def run(
    method: Eagle3Method, draft: Eagle3Draft, packed: PackedBatch
) -> tuple[StepLoss, dict[str, Tensor]]:
    draft.zero_grad(set_to_none=True)
    result = method.step(draft, packed, cases.AT)
    result.loss_sum.backward()
    return result, cases.gradients(draft)


def assert_near(got: dict[str, Tensor], expected: dict[str, Tensor], *, tolerance: float) -> None:
    """Largest difference of each tensor against its own largest value."""
    assert set(got) == set(expected)
    for name, value in expected.items():
        scale = float(value.abs().max()) or 1.0
        error = float((got[name].double() - value.double()).abs().max()) / scale
        assert error <= tolerance, (name, error)


def dense_logits(
    p: dict[str, Tensor], draft: Eagle3Draft, weights: TargetWeights, sample: PackedBatch
) -> list[Tensor]:
    """Draft logits [S, Vd] float64 of every row of one sample at every step, with all options."""
    config, shape = draft.config, draft.shape.layer
    n, rows = sample.num_tokens, torch.arange(sample.num_tokens)

    def norm(x: Tensor, name: str) -> Tensor:
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + shape.rms_norm_eps) * p[name]

    def rope(x: Tensor, positions: Tensor) -> Tensor:
        half = shape.head_dim // 2
        frequencies = 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
        turn = torch.polar(torch.ones(n, half).double(), positions[:, None] * frequencies)[:, None]
        turned = torch.complex(x[..., :half], x[..., half:]) * turn
        return torch.cat((turned.real, turned.imag), -1)

    aux = sample.features["aux"].double()
    if config.fc_norm:
        chunks = aux.split(cases.HIDDEN, -1)
        aux = torch.cat([norm(c, f"fc_norm.{i}.weight") for i, c in enumerate(chunks)], -1)
    hidden = aux @ p["fc.weight"].T
    names = ["midlayer", *(f"layers.{i}" for i in range(1, config.num_layers))]
    keys: list[list[Tensor]] = [[] for _ in names]
    values: list[list[Tensor]] = [[] for _ in names]
    visible, logits = [], []
    for i in range(config.ttt_length):
        tokens = torch.cat((sample.input_ids[1 + i :], torch.zeros(n, dtype=torch.int64)))[:n]
        visible.append(rows[:, None] == rows if i else rows[:, None] >= rows)
        for layer, name in enumerate(names):
            x = norm(hidden, f"{name}.{'input_layernorm' if layer else 'hidden_norm'}.weight")
            if not layer:
                e = norm(weights.embed_tokens.double()[tokens], f"{name}.input_layernorm.weight")
                x = torch.cat((e, x), -1)
            q, k, v = (
                (x @ p[f"{name}.self_attn.{part}_proj.weight"].T).reshape(n, -1, shape.head_dim)
                for part in "qkv"
            )
            keys[layer].append(rope(k, rows + i))
            values[layer].append(v)
            groups = shape.num_heads // shape.num_kv_heads
            all_k, all_v = (
                torch.cat(cache[layer]).repeat_interleave(groups, 1) for cache in (keys, values)
            )
            scores = torch.einsum("qhd,khd->hqk", rope(q, rows + i), all_k) / shape.head_dim**0.5
            scores = scores.masked_fill(~torch.cat(visible, 1), float("-inf"))
            seen = torch.einsum("hqk,khd->qhd", torch.softmax(scores, -1), all_v).flatten(1)
            hidden = hidden + seen @ p[f"{name}.self_attn.o_proj.weight"].T
            y = norm(hidden, f"{name}.post_attention_layernorm.weight")
            gate, up = (y @ p[f"{name}.mlp.{part}_proj.weight"].T for part in ("gate", "up"))
            hidden = (
                hidden + (gate * torch.sigmoid(gate) * up) @ p[f"{name}.mlp.down_proj.weight"].T
            )
        normed = norm(hidden, "norm.weight")
        logits.append(normed @ p["lm_head.weight"].T)
        if config.norm_output:
            hidden = normed
    return logits


def dense_loss(
    parameters: dict[str, Tensor], draft: Eagle3Draft, weights: TargetWeights, packed: PackedBatch
) -> Tensor:
    """The weighted sum of soft cross entropies, and of their parts of the top_k words."""
    config, loss = draft.config, torch.zeros((), dtype=torch.float64)
    for sample in cases.separate(packed):
        logits = dense_logits(parameters, draft, weights, sample)
        target = sample.features["last"].double() @ weights.lm_head.double().T
        for i in range(config.ttt_length):
            for t in range(sample.num_tokens - 1 - i):
                row = target[t + i + 1]
                if not sample.loss_mask[t + i] or not draft.t2d[row.argmax()]:
                    continue
                p = torch.softmax(row[draft.t2d] / config.temperature, -1)
                terms = -p * torch.log_softmax(logits[i][t] / config.temperature, -1)
                row_loss = terms.sum()
                if config.top_k is not None:
                    top = terms[p.topk(min(config.top_k, p.numel())).indices]
                    row_loss = row_loss + config.top_k_weight * top.sum()
                loss = loss + config.step_decay**i * row_loss
    return loss


@pytest.mark.parametrize("compaction", [True, False])
@pytest.mark.parametrize(
    ("lengths", "ttt_length", "options"),
    [
        ((17, 5, 1, 13), 4, {"num_layers": 2}),  # samples of one token, shorter than the depth
        ((21,), 3, ALL),
        ((9, 12), 1, {"num_layers": 2, "fc_norm": True}),  # one step: the last layer is compacted
        ((3, 14), 5, {"norm_output": True}),
        ((6, 2, 7, 4, 11), 2, {"num_layers": 4}),
        ((16, 9), 3, {"fc_norm": True, "aux_layer_ids": (3, 6, 8)}),
        ((18, 7), 3, {"top_k": 5, "top_k_weight": 0.7, "num_layers": 2}),
        ((13,), 2, {"top_k": 100, "temperature": 1.6}),  # every word of the draft's 23
        ((13, 8), 7, {"top_k": 1, "temperature": 0.8}),
    ],
)
def test_step_is_the_dense_definition(
    lengths: Sequence[int], ttt_length: int, options: dict[str, object], compaction: bool
) -> None:
    method, draft, weights = cases.build(ttt_length=ttt_length, compaction=compaction, **options)
    packed = cases.batch(lengths, seed=5)
    parameters = cases.double_parameters(draft)
    expected = dense_loss(parameters, draft, weights, packed)
    assert expected.item() > 0
    expected.backward()
    result, got = run(method, draft, packed)
    assert result.loss_sum.item() == pytest.approx(expected.item(), rel=3e-6)
    assert_near(
        got, {k: p.grad for k, p in parameters.items() if p.grad is not None}, tolerance=4e-5
    )


def test_definition_is_the_one_layer_definition() -> None:
    _, draft, weights = cases.build(ttt_length=3)
    packed = cases.batch((12, 7))
    parameters = cases.double_parameters(draft)
    mine = dense_loss(parameters, draft, weights, packed)
    theirs = cases.dense_step(parameters, draft, weights, packed).loss
    assert mine.item() == pytest.approx(theirs.item(), rel=1e-12)


@pytest.mark.parametrize("options", [{"num_layers": 2}, ALL], ids=str)
def test_packed_is_separate(options: dict[str, object]) -> None:
    method, draft, _ = cases.build(ttt_length=3, loss="lk_alpha", **options)
    packed = cases.batch((19, 1, 8, 23))
    whole, got = run(method, draft, packed)
    parts = [run(method, draft, sample) for sample in cases.separate(packed)]
    assert whole.loss_sum.item() == pytest.approx(
        sum(p.loss_sum.item() for p, _ in parts), rel=1e-6
    )
    assert_near(got, {k: torch.stack([g[k] for _, g in parts]).sum(0) for k in got}, tolerance=3e-6)


@pytest.mark.parametrize("loss", ["soft_ce", "lk_lambda"])
@pytest.mark.parametrize("lengths", [(40, 3, 21), (30,), (2, 2, 2, 2, 2, 2, 2, 2)], ids=str)
def test_compaction_changes_nothing_but_work(lengths: Sequence[int], loss: str) -> None:
    packed = cases.batch(lengths, density=0.3, seed=1)
    built = [cases.build(compaction=on, loss=loss, ttt_length=5, **ALL) for on in (True, False)]
    (compact, got), (full, expected) = (run(*b[:2], packed) for b in built)
    assert compact.loss_sum.item() == pytest.approx(full.loss_sum.item(), rel=1e-6)
    assert_near(got, expected, tolerance=3e-6)
    for name, value in full.metrics.items():
        torch.testing.assert_close(compact.metrics[name], value, rtol=1e-6, atol=1e-9)


def test_what_cannot_matter_is_not_read() -> None:
    """Beyond each sample's last scored row; what lies before it is read by the lower layers."""
    method, draft, _ = cases.build(ttt_length=4, **ALL)
    packed = cases.batch((30, 11, 26), density=0.3)
    clean, expected = run(method, draft, packed)
    aux, begin = packed.features["aux"].clone(), 0
    for n in packed.lengths:
        scored = packed.loss_mask[begin : begin + n].nonzero()
        aux[begin + (int(scored[-1]) + 1 if len(scored) else 0) : begin + n] = float("nan")
        begin += n
    assert aux.isnan().any(1).sum() > 5
    poisoned, got = run(method, draft, cases.with_features(packed, aux=aux))
    assert poisoned.loss_sum.item() == clean.loss_sum.item()
    assert all(torch.equal(got[name], value) for name, value in expected.items())


def test_rows_of_lower_layers_that_later_rows_attend_to_are_run() -> None:
    """An unscored row between scored ones matters through the second layer's keys too."""
    mask = torch.zeros(12, dtype=torch.uint8)
    mask[9] = 1
    packed = replace(cases.batch((12,)), loss_mask=mask)
    for num_layers in (1, 2):
        method, draft, _ = cases.build(ttt_length=1, vocab_size=None, num_layers=num_layers)
        with torch.no_grad():
            draft.midlayer.self_attn.q_proj.weight.zero_()  # layer 0 attends evenly
            draft.midlayer.self_attn.v_proj.weight.zero_()  # and adds nothing
        aux = packed.features["aux"].clone().requires_grad_()
        method.step(draft, cases.with_features(packed, aux=aux), cases.AT).loss_sum.backward()
        assert aux.grad is not None
        reaches = aux.grad.abs().sum(1) > 0
        # Through layer 1's keys, which come from layer 0's feed-forward block.
        assert reaches.tolist() == [num_layers == 2] * 9 + [True, False, False]


def test_nothing_scored_is_zero_with_zero_gradients() -> None:
    method, draft, _ = cases.build(**ALL)
    result, got = run(method, draft, cases.batch((7, 5), density=0.0))
    assert result.loss_sum.item() == 0 and all((g == 0).all() for g in got.values())


def test_gradient_by_finite_differences() -> None:
    """Along one direction of all parameters, float32 loss against its own gradient."""
    method, draft, _ = cases.build(ttt_length=3, top_k=4, **ALL)
    packed = cases.batch((14, 6))
    _, gradients = run(method, draft, packed)
    generator = torch.Generator().manual_seed(0)
    direction = {k: torch.randn(g.shape, generator=generator) for k, g in gradients.items()}
    slope = sum(float((gradients[k] * direction[k]).sum()) for k in gradients)

    def loss_at(step: float) -> float:
        with torch.no_grad():
            for name, parameter in draft.named_parameters():
                parameter.add_(direction[name], alpha=step)
            value = method.step(draft, packed, cases.AT).loss_sum.item()
            for name, parameter in draft.named_parameters():
                parameter.sub_(direction[name], alpha=step)
        return value

    step = 2e-4
    assert (loss_at(step) - loss_at(-step)) / (2 * step) == pytest.approx(slope, rel=5e-3)


def observed(
    method: Eagle3Method, draft: Eagle3Draft, samples: list[PackedBatch], cuts: list[list[int]]
) -> tuple[list[Tensor], list[int]]:
    """Look-ahead logits of each sample after its rows came in several calls."""
    drafter = method.drafter(draft)
    drafter.start(len(samples), 40)
    seen = [0] * len(samples)
    for cut in cuts:
        width = max(cut)
        shape = (len(samples), width)
        tokens, positions = torch.randint(0, cases.VOCAB, shape), torch.randint(0, 99, shape)
        valid = torch.zeros(shape, dtype=torch.bool)
        aux = torch.full((*shape, 3 * cases.HIDDEN), float("nan"))
        for b, (sample, n) in enumerate(zip(samples, cut, strict=True)):
            if n:
                rows, columns = slice(seen[b], seen[b] + n), slice(width - n, width)
                tokens[b, columns] = sample.input_ids[rows.start + 1 : rows.stop + 1]
                positions[b, columns] = torch.arange(rows.start, rows.stop)
                aux[b, columns] = sample.features["aux"][rows]
                valid[b, columns] = True
                seen[b] += n
        drafter.observe(tokens, {"aux": aux}, positions, valid)
    depth = draft.config.ttt_length
    following = torch.stack(
        [s.input_ids[t + 1 : t + depth] for s, t in zip(samples, seen, strict=True)]
    )
    return list(drafter.logits_along(following)), seen


@pytest.mark.parametrize("options", [{"num_layers": 2}, {"norm_output": True}, ALL], ids=str)
def test_drafter_is_the_training_step(options: dict[str, object]) -> None:
    method, draft, weights = cases.build(ttt_length=4, **options)
    samples = cases.separate(cases.batch((26, 19)))
    parameters = {name: p.detach().double() for name, p in draft.named_parameters()}
    got, seen = observed(method, draft, samples, [[5, 9], [3, 1], [0, 2], [7, 0]])
    for b, sample in enumerate(samples):
        logits = dense_logits(parameters, draft, weights, sample)
        wanted = torch.stack([of_step[seen[b] - 1] for of_step in logits])
        torch.testing.assert_close(got[b].double(), wanted, rtol=2e-5, atol=2e-5)


def test_warm_start_of_several_layers_is_that_of_one() -> None:
    weights, packed = cases.target(), cases.batch((15, 9))
    losses = []
    for num_layers in (1, 3):
        config = Eagle3Config(draft_vocab_size=23, warm_start="target", num_layers=num_layers)
        method = Eagle3Method(config)
        draft = method.build(weights, cases.vocab(23), seed=0)
        result, got = run(method, draft, packed)
        losses.append(result.loss_sum.item())
        if num_layers > 1:  # and the further layers learn from the first step on
            assert got["layers.2.self_attn.o_proj.weight"].abs().max() > 0
            assert got["layers.2.mlp.down_proj.weight"].abs().max() > 0
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_export_holds_what_each_engine_reads() -> None:
    """Key by key: vLLM 0.32 reads layers.i.input_layernorm, SGLang 0.5.23 layers.i.hidden_norm."""
    method, draft, weights = cases.build(**ALL)
    checkpoint = method.export(draft, weights.spec, dtype=torch.float32)
    config = checkpoint.config
    assert (config["num_hidden_layers"], config["fc_norm"], config["norm_output"]) == (
        3,
        True,
        True,
    )
    assert engine_configs(config, num_target_layers=8) == {"": config}
    for i in (1, 2):
        norm = draft.stack[i].input_layernorm.weight
        for name in ("input_layernorm", "hidden_norm"):
            assert torch.equal(checkpoint.tensors[f"layers.{i}.{name}.weight"], norm)
    for i in range(3):
        assert f"fc_norm.{i}.weight" in checkpoint.tensors
    schema = method.schema(config)
    assert {n: tuple(t.shape) for n, t in checkpoint.tensors.items()} == {
        n: shape for n, (shape, _) in schema.items()
    }
    restored = method.restore(checkpoint, weights)
    packed = cases.batch((14, 9))
    losses = [method.step(d, packed, cases.AT).loss_sum for d in (draft, restored)]
    assert torch.equal(*losses)


def test_export_counts_other_numbers_of_features() -> None:
    """Both engines take the width of fc from this key, else three layers."""
    method, draft, weights = cases.build(aux_layer_ids=(2, 8), fc_norm=True)
    config = method.export(draft, weights.spec, dtype=torch.float32).config
    assert config["num_aux_hidden_states"] == 2
    method, draft, weights = cases.build()
    assert (
        "num_aux_hidden_states"
        not in method.export(draft, weights.spec, dtype=torch.float32).config
    )


@pytest.mark.parametrize(
    ("stored", "asked", "message"),
    [
        ({"num_layers": 2}, {}, "num_hidden_layers: wanted 1, got 2"),
        ({"fc_norm": True}, {}, "fc_norm: wanted False, got True"),
        ({}, {"norm_output": True}, "norm_output: wanted True, got False"),
    ],
)
def test_restore_refuses_other_options(
    stored: dict[str, object], asked: dict[str, object], message: str
) -> None:
    method, draft, weights = cases.build(**stored)
    checkpoint = method.export(draft, weights.spec, dtype=torch.float32)
    other = Eagle3Method(Eagle3Config.model_validate({"draft_vocab_size": 23, **asked}))
    with pytest.raises(ValueError, match=f"config.json {message}"):
        other.restore(checkpoint, weights)


def test_restore_refuses_a_norm_that_is_two() -> None:
    method, draft, weights = cases.build(num_layers=2)
    checkpoint = method.export(draft, weights.spec, dtype=torch.float32)
    name = "layers.1.hidden_norm.weight"
    tensors = {**checkpoint.tensors, name: checkpoint.tensors[name] + 1}
    with pytest.raises(ValueError, match=r"layers.1.hidden_norm.weight: wanted the values of"):
        method.restore(DraftCheckpoint(tensors, checkpoint.config), weights)
    with pytest.raises(ValueError, match="fc_norm: wanted true or false, got 'yes'"):
        method.schema({**checkpoint.config, "fc_norm": "yes"})


def test_top_k_wants_soft_ce() -> None:
    with pytest.raises(ValueError, match=r"top_k: wanted loss 'soft_ce' beside it, got 'jsd'"):
        parse(Eagle3Config, {"top_k": 3, "loss": "jsd"})


def test_checkpoints_older_than_an_option_resume() -> None:
    """Their lack of it stands for its default; another value is another run."""
    here, older = Path("x"), Eagle3Config(ttt_length=5).model_dump(mode="json")
    new_keys = ("num_layers", "fc_norm", "norm_output", "top_k", "top_k_weight", "loss")
    for key in new_keys:
        del older[key]
    ours = Eagle3Config(ttt_length=5).model_dump(mode="json")
    known = {"method": defaults(Eagle3Config)}
    check_identity(here, {"method": older}, {"method": ours}, when_absent=known)
    assert _identity_defaults(load("demo", []))["method"] == known["method"]
    with pytest.raises(ValueError, match=r"wanted method\.fc_norm = True, got False"):
        changed = {"method": {**ours, "fc_norm": True}}
        check_identity(here, {"method": older}, changed, when_absent=known)
    with pytest.raises(ValueError, match=r"wanted method\.ttt_length = 5, got 7"):
        check_identity(
            here, {"method": {**older, "ttt_length": 7}}, {"method": ours}, when_absent=known
        )
    with pytest.raises(ValueError, match=r"wanted method\.other = None, got 1"):
        check_identity(here, {"method": {**older, "other": 1}}, {"method": ours}, when_absent=known)


@pytest.mark.parametrize("asked", ["target", "none"])
def test_rope_scaling_is_the_targets_or_none(asked: str) -> None:
    scaling = {"rope_type": "linear", "factor": 4.0}
    target = cases.target()
    weights = replace(target, spec=replace(target.spec, rope_scaling=scaling))
    method = Eagle3Method(Eagle3Config(rope_scaling=asked))  # type: ignore[arg-type]
    draft = method.build(weights, method.vocab([], weights.spec), seed=0)
    config = method.export(draft, weights.spec, dtype=torch.float32).config
    wanted = scaling if asked == "target" else None
    assert draft.shape.rope_scaling == config["rope_scaling"] == wanted
    plain = method.build(target, method.vocab([], target.spec), seed=0)
    ratio = plain.rope.inv_freq / draft.rope.inv_freq
    assert torch.allclose(ratio, torch.full_like(ratio, 4.0 if wanted else 1.0))
    with pytest.raises(ValueError, match=r"method\.rope_scaling: .*'target' or 'none', got 'yarn'"):
        parse(Eagle3Config, {"rope_scaling": "yarn"}, where="method")
