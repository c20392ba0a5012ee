"""Exported checkpoints, the draft's vocabulary, settings and warm starts."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

import eagle3_cases as cases
from specforge_ext.config import parse
from specforge_ext.methods import METHODS, Method
from specforge_ext.methods.eagle3 import (
    Eagle3Config,
    Eagle3Method,
    build_draft_vocab,
    count_scored_tokens,
    default_aux_layer_ids,
)
from specforge_ext.methods.eagle3.export import engine_configs
from specforge_ext.records import DraftCheckpoint, DraftVocab, Prompt

KEYS = {
    "fc.weight", "lm_head.weight", "norm.weight", "d2t", "t2d",
    "midlayer.hidden_norm.weight", "midlayer.input_layernorm.weight",
    "midlayer.post_attention_layernorm.weight",
    "midlayer.self_attn.q_proj.weight", "midlayer.self_attn.k_proj.weight",
    "midlayer.self_attn.v_proj.weight", "midlayer.self_attn.o_proj.weight",
    "midlayer.mlp.gate_proj.weight", "midlayer.mlp.up_proj.weight",
    "midlayer.mlp.down_proj.weight",
}  # fmt: skip


def test_the_registered_method_is_a_method() -> None:
    method: Method = METHODS.get("eagle3")(Eagle3Config())
    assert method.name == "eagle3"


def test_exported_draft_is_the_trained_one() -> None:
    method, draft, weights = cases.build()
    checkpoint = method.export(draft, weights.spec, dtype=torch.float32)
    assert set(checkpoint.tensors) == KEYS
    restored = method.restore(checkpoint, weights)
    packed = cases.batch((14, 9))
    assert torch.equal(
        method.step(restored, packed, cases.AT).loss_sum,
        method.step(draft, packed, cases.AT).loss_sum,
    )


def test_exported_in_bfloat16() -> None:
    method, draft, weights = cases.build()
    checkpoint = method.export(draft, weights.spec, dtype=torch.bfloat16)
    assert checkpoint.config["torch_dtype"] == "bfloat16"
    assert checkpoint.tensors["fc.weight"].dtype == torch.bfloat16
    restored = method.restore(checkpoint, weights)
    assert torch.equal(restored.fc.weight, draft.fc.weight.bfloat16().float())


@pytest.mark.parametrize("vocab_size", [23, None])
def test_schema_is_what_is_exported(vocab_size: int | None) -> None:
    method, draft, weights = cases.build(vocab_size=vocab_size)
    checkpoint = method.export(draft, weights.spec, dtype=torch.bfloat16)
    schema = method.schema(checkpoint.config)
    assert {name: tuple(t.shape) for name, t in checkpoint.tensors.items()} == {
        name: shape for name, (shape, _) in schema.items()
    }
    fixed = {name: dtype for name, (_, dtype) in schema.items() if dtype is not None}
    full = vocab_size is None
    assert fixed == ({} if full else {"d2t": torch.int64, "t2d": torch.bool})
    restored = method.restore(checkpoint, weights)
    assert torch.equal(restored.d2t, draft.d2t) and torch.equal(restored.t2d, draft.t2d)


def test_config_json() -> None:
    scaling = {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 256,
    }  # fmt: skip
    weights = cases.target()
    weights = replace(weights, spec=replace(weights.spec, rope_scaling=scaling, rope_theta=5e5))
    method, draft, _ = cases.build(weights=weights)
    config = method.export(draft, weights.spec, dtype=torch.bfloat16).config
    assert config == {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "vocab_size": 61,
        "draft_vocab_size": 23,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "num_hidden_layers": 1,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 5e5,
        "rope_scaling": scaling,
        "rope_parameters": {**scaling, "rope_theta": 5e5},
        "max_position_embeddings": 512,
        "attention_bias": False,
        "mlp_bias": False,
        "norm_before_residual": False,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": [2],
        "torch_dtype": "bfloat16",
        "specforge_ext": {"method": "eagle3", "aux_layer_ids": [2, 4, 5], "ttt_length": 7},
    }
    restored = method.restore(method.export(draft, weights.spec, dtype=torch.float32), weights)
    assert torch.equal(restored.rope.inv_freq, draft.rope.inv_freq)


def test_layer_ids_mean_what_each_engine_reads() -> None:
    key = "eagle_aux_hidden_state_layer_ids"
    method, draft, weights = cases.build()
    config = method.export(draft, weights.spec, dtype=torch.bfloat16).config
    assert engine_configs(config, num_target_layers=8) == {"": config}
    method, draft, weights = cases.build(aux_layer_ids=(1, 4, 8))
    config = method.export(draft, weights.spec, dtype=torch.bfloat16).config
    assert key not in config
    configs = engine_configs(config, num_target_layers=8)
    assert configs == {
        "sglang": {**config, "eagle_config": {"use_aux_hidden_state": True, key: [0, 3, 7]}},
        "vllm": {**config, key: [1, 4, 8]},
    }


def test_embedding_as_a_feature_is_not_for_sglang() -> None:
    method, draft, weights = cases.build(aux_layer_ids=(0, 4, 8))
    config = method.export(draft, weights.spec, dtype=torch.bfloat16).config
    with pytest.raises(ValueError, match=r"SGLang cannot capture the embedding.*\[0, 4, 8\]"):
        engine_configs(config, num_target_layers=8)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("vocab_size", 64, "vocab_size: wanted the target's 61, got 64"),
        ("hidden_size", "24", "hidden_size: wanted a positive count, got '24'"),
        ("rms_norm_eps", None, "rms_norm_eps: wanted a positive number, got None"),
        ("rope_parameters", None, "rope_parameters: wanted a mapping, got None"),
        ("specforge_ext", {"aux_layer_ids": [1, 2, 3]}, r"wanted \[2, 4, 5\], got \[1, 2, 3\]"),
        ("specforge_ext", {}, "specforge_ext.aux_layer_ids: wanted a list of ids, got None"),
    ],
)
def test_restore_refuses(key: str, value: object, message: str) -> None:
    method, draft, weights = cases.build()
    checkpoint = method.export(draft, weights.spec, dtype=torch.float32)
    with pytest.raises(ValueError, match=message):
        method.restore(
            DraftCheckpoint(checkpoint.tensors, {**checkpoint.config, key: value}), weights
        )


def test_restore_refuses_an_inconsistent_vocabulary() -> None:
    method, draft, weights = cases.build()
    checkpoint = method.export(draft, weights.spec, dtype=torch.float32)
    tensors = {**checkpoint.tensors, "d2t": checkpoint.tensors["d2t"] + 1}
    with pytest.raises(ValueError, match=r"d2t: wanted i \+ d2t\[i\]"):
        method.restore(DraftCheckpoint(tensors, checkpoint.config), weights)


def test_vocabulary_is_the_most_frequent() -> None:
    counts = torch.tensor([3, 9, 3, 0, 9, 3])
    made = build_draft_vocab(counts, 4)
    assert made.target_ids.tolist() == [0, 1, 2, 4]  # 5 ties with 0 and 2: the lower ids win
    assert made.d2t.tolist() == [0, 0, 0, 1]
    assert made.t2d.tolist() == [True, True, True, False, True, False]
    assert build_draft_vocab(counts, None).is_full


def test_vocabulary_of_a_real_size_is_instant() -> None:
    counts = torch.randint(0, 100, (151936,), generator=torch.Generator().manual_seed(0))
    begin = time.perf_counter()
    made = build_draft_vocab(counts, 32000)
    assert time.perf_counter() - begin < 2  # a quadratic builder takes minutes
    assert int(counts[~made.t2d].max()) <= int(counts[made.t2d].min())


def test_only_scored_tokens_are_counted() -> None:
    ids = torch.tensor([5, 5, 2, 1], dtype=torch.int32)
    prompt = Prompt("a", ids, torch.tensor([0, 1, 1, 0], dtype=torch.uint8))
    assert count_scored_tokens([prompt, prompt], vocab_size=6).tolist() == [0, 0, 2, 0, 0, 2]
    with pytest.raises(ValueError, match=r"input_ids of a: wanted ids in \[0, 5\), got 2..5"):
        count_scored_tokens([prompt], vocab_size=5)


@pytest.mark.parametrize("size", [0, 7])
def test_vocabulary_refuses(size: int) -> None:
    with pytest.raises(ValueError, match=f"draft_vocab_size: wanted 1..6, got {size}"):
        build_draft_vocab(torch.ones(6), size)


def test_layout() -> None:
    spec = cases.target().spec
    layout = Eagle3Method(Eagle3Config()).layout(spec)
    aux, last = layout.features
    assert (aux.name, aux.layer_ids, aux.width) == ("aux", (2, 4, 5), 72)
    assert (last.name, last.layer_ids, last.width, last.final_norm) == ("last", (8,), 24, True)
    assert default_aux_layer_ids(36) == (2, 18, 33)
    with pytest.raises(ValueError, match=r"target with 6 layers is \[2, 3, 3\]; wanted ascending"):
        default_aux_layer_ids(6)
    for ids in ((4, 2), (2, 2), (2, 9), (), (-1, 3)):
        with pytest.raises(ValueError, match="wanted ascending ids from 0 to 8, got"):
            Eagle3Method(Eagle3Config(aux_layer_ids=ids)).layout(spec)


def test_settings_are_checked() -> None:
    with pytest.raises(ValueError, match=r"eagle3.ttt_lenght: .*did you mean 'ttt_length'"):
        parse(Eagle3Config, {"ttt_lenght": 3}, where="eagle3")
    with pytest.raises(ValueError, match=r"ttt_length: .*got 0"):
        parse(Eagle3Config, {"ttt_length": 0})


def test_build_refuses_another_vocabulary() -> None:
    weights = cases.target()
    with pytest.raises(
        ValueError, match="wanted 12 of the target's 61, got a vocabulary of 23 of 61"
    ):
        Eagle3Method(Eagle3Config(draft_vocab_size=12)).build(weights, cases.vocab(23), seed=0)


def test_same_seed_same_weights() -> None:
    method, weights = Eagle3Method(Eagle3Config()), cases.target()
    one, same, other = (method.build(weights, cases.vocab(None), seed=s) for s in (3, 3, 4))
    assert torch.equal(one.lm_head.weight, same.lm_head.weight)
    assert not torch.equal(one.lm_head.weight, other.lm_head.weight)


def test_target_tensors_are_neither_trained_nor_saved() -> None:
    _, draft, weights = cases.build()
    assert set(draft.state_dict()) == KEYS - {"d2t", "t2d"}
    assert torch.equal(draft.target_head[:23], weights.lm_head[draft.t2d])
    assert torch.equal(draft.target_head[23:], weights.lm_head[~draft.t2d])


def warm(weights: cases.TargetWeights, chosen: DraftVocab) -> cases.Eagle3Draft:
    config = Eagle3Config(draft_vocab_size=chosen.size, warm_start="target")
    return Eagle3Method(config).build(weights, chosen, seed=0)


def test_warm_start_runs_the_last_layer() -> None:
    """One token, so that attention is its own value: the target's last layer, final norm and
    head.
    """
    weights, chosen = cases.target(), cases.vocab(23)
    draft = warm(weights, chosen)
    aux = torch.randn(1, 3 * cases.HIDDEN) * torch.tensor([0.0, 0, 1]).repeat_interleave(
        cases.HIDDEN
    )
    drafter = Eagle3Method(Eagle3Config()).drafter(draft)
    drafter.start(1, 1)
    zero = torch.zeros(1, 1, dtype=torch.int64)
    drafter.observe(zero, {"aux": aux[None]}, zero, zero == 0)
    got = drafter.logits_along(zero[:, :0])[0, 0]

    layer = weights.last_layer

    def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, (cases.HIDDEN,), weight, 1e-6)

    h = aux[:, -cases.HIDDEN :]
    v = norm(h, layer["input_layernorm.weight"]) @ layer["self_attn.v_proj.weight"].T
    grouped = v.reshape(2, 8).repeat_interleave(2, 0).flatten()
    h = h + grouped @ layer["self_attn.o_proj.weight"].T
    y = norm(h, layer["post_attention_layernorm.weight"])
    mlp = F.silu(y @ layer["mlp.gate_proj.weight"].T) * (y @ layer["mlp.up_proj.weight"].T)
    h = h + mlp @ layer["mlp.down_proj.weight"].T
    expected = (norm(h, weights.final_norm) @ weights.lm_head.T)[0, chosen.t2d]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_warm_start_queries_have_the_size_that_qk_norm_gives() -> None:
    weights = cases.target()
    draft = warm(weights, cases.vocab(23))
    gain = weights.last_layer["input_layernorm.weight"]
    x = torch.randn(4000, cases.HIDDEN) * gain
    q = (x @ draft.midlayer.self_attn.q_proj.weight[:, cases.HIDDEN :].T).unflatten(1, (4, 8))
    raw = (x @ weights.last_layer["self_attn.q_proj.weight"].T).unflatten(1, (4, 8))
    wanted = F.rms_norm(raw, (8,)) * weights.last_layer["self_attn.q_norm.weight"]
    for norms in (q, wanted):
        assert norms.shape == (4000, 4, 8)
    ratio = q.square().mean((0, 2)) / wanted.square().mean((0, 2))
    assert ((ratio > 0.7) & (ratio < 1.4)).all()


def test_warm_start_refuses_what_does_not_fit() -> None:
    weights = cases.target()
    with pytest.raises(ValueError, match=r"wanted 'input_layernorm.weight' .* got \[\]"):
        warm(replace(weights, last_layer={}), cases.vocab(23))
    config = Eagle3Config(draft_vocab_size=23, warm_start="target", intermediate_size=48)
    message = r"'mlp.gate_proj.weight' has shape \[40, 24\], the draft's layer wants \[48, 24\]"
    with pytest.raises(ValueError, match=message):
        Eagle3Method(config).build(weights, cases.vocab(23), seed=0)
