"""Settings of block drafts, exported checkpoints, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import block_cases as cases
from specforge_ext.config import parse
from specforge_ext.export import read_strict, write
from specforge_ext.methods import METHODS, Method
from specforge_ext.methods._block.config import default_layer_ids, layer_ids, mask_token_id
from specforge_ext.methods.dflash import DFlashConfig
from specforge_ext.records import DraftCheckpoint, DraftVocab


def test_the_registered_method_is_a_method() -> None:
    method: Method = METHODS.get("dflash")(DFlashConfig())
    assert method.name == "dflash"


@pytest.mark.parametrize(
    ("target", "layers", "outputs"),
    [(36, 5, [1, 9, 17, 25, 33]), (12, 3, [1, 5, 9]), (32, 1, [16]), (8, 5, [1, 2, 3, 4, 5])],
)
def test_default_layers_are_those_of_the_published_drafts(
    target: int, layers: int, outputs: list[int]
) -> None:
    assert default_layer_ids(target, layers) == tuple(i + 1 for i in outputs)


def test_layer_ids_must_be_the_targets() -> None:
    spec = cases.target().spec
    with pytest.raises(ValueError, match=r"5 draft layers .* with 4 is \[2, 2, 2, 2, 2\]"):
        default_layer_ids(4, 5)
    for ids in ((0, 3), (3, 3), (4, 2), (2, 9), ()):
        with pytest.raises(ValueError, match=r"layer_ids: wanted ascending ids from 1 to 8, got"):
            layer_ids(DFlashConfig(layer_ids=ids), spec)
    assert layer_ids(DFlashConfig(layer_ids=(1, 8)), spec) == (1, 8)


def test_mask_token_is_the_last_with_an_embedding() -> None:
    embedding = torch.ones(9, 4)
    assert mask_token_id(DFlashConfig(), embedding) == 8
    embedding[6:] = 0
    assert mask_token_id(DFlashConfig(), embedding) == 5
    assert mask_token_id(DFlashConfig(mask_token_id=0), embedding) == 0
    with pytest.raises(ValueError, match="mask_token_id: wanted less than 9, got 9"):
        mask_token_id(DFlashConfig(mask_token_id=9), embedding)
    with pytest.raises(ValueError, match="whose embedding is not all zeros, got 7"):
        mask_token_id(DFlashConfig(mask_token_id=7), embedding)
    with pytest.raises(ValueError, match="wanted an embedding that is not all zeros, found none"):
        mask_token_id(DFlashConfig(), embedding * 0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"block_size": 1}, "method.block_size: .* greater than or equal to 2, got 1"),
        ({"num_layers": 2, "layer_types": ["full_attention"]}, "one of each of the 2 layers"),
        ({"sliding_window": 64}, "together with a sliding_attention layer in layer_types, got 64"),
        ({"num_layers": 1, "layer_types": ["sliding_attention"]}, "got None with .'sliding"),
        (
            {"num_layers": 1, "layer_types": ["sliding_attention"], "sliding_window": 15},
            "sliding_window: wanted at least block_size 16, got 15",
        ),
        ({"dpace": "suffix", "gamma": 7.0}, "gamma: wanted none beside dpace, got 7.0"),
        ({"dpace": "all"}, "method.dpace: .*got 'all'"),
        ({"blok_size": 4}, "did you mean 'block_size'"),
    ],
)
def test_settings_that_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(DFlashConfig, settings, where="method")


def test_the_vocabulary_is_the_whole_one() -> None:
    method, _, weights = cases.build()
    assert method.vocab([], weights.spec).is_full
    part = DraftVocab(torch.arange(cases.VOCAB) < 9, torch.zeros(9, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"wanted the target's whole vocabulary of 61 .*, got 9"):
        method.build(weights, part, seed=0)


def test_initial_weights_follow_the_seed() -> None:
    method, _, weights = cases.build()
    vocab = DraftVocab.full(cases.VOCAB)
    one, same, other = (method.build(weights, vocab, seed=s) for s in (1, 1, 2))
    assert torch.equal(one.fc.weight, same.fc.weight)
    assert not torch.equal(one.fc.weight, other.fc.weight)
    assert torch.equal(one.norm.weight, torch.ones(cases.HIDDEN))


KEYS = {"fc.weight", "hidden_norm.weight", "norm.weight"} | {
    f"layers.{i}.{name}.weight"
    for i in range(2)
    for name in (
        "input_layernorm", "post_attention_layernorm", "self_attn.q_proj", "self_attn.k_proj",
        "self_attn.v_proj", "self_attn.o_proj", "self_attn.q_norm", "self_attn.k_norm",
        "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
    )
}  # fmt: skip


def test_exported_draft_is_the_trained_one(tmp_path: Path) -> None:
    method, draft, weights = cases.build(**cases.MIXED, gamma=5.0)
    checkpoint = method.export(draft, weights.spec, dtype=torch.float32)
    assert set(checkpoint.tensors) == KEYS
    configs = method.engine_configs(checkpoint.config, weights.spec)
    assert configs == {"": checkpoint.config}
    write(checkpoint, tmp_path / "export")
    restored = method.restore(read_strict(tmp_path / "export", method), weights)
    packed = cases.batch((24, 9))
    ours, theirs = (method.step(d, packed, cases.AT).loss_sum for d in (draft, restored))
    assert torch.equal(ours, theirs) and ours.item() > 0


def test_config_json() -> None:
    scaling = {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 256, "partial_rotary_factor": 0.5,
    }  # fmt: skip
    weights = cases.target()
    weights = replace(weights, spec=replace(weights.spec, rope_scaling=scaling, rope_theta=5e5))
    method, draft, _ = cases.build(weights=weights, **cases.MIXED)
    config = method.export(draft, weights.spec, dtype=torch.bfloat16).config
    # The draft turns whole heads, whatever the target does: SpecForge copied the target's factor.
    scaling.pop("partial_rotary_factor")
    assert config == {
        "architectures": ["DFlashDraftModel"],
        "model_type": "qwen3",
        "vocab_size": 61,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "num_hidden_layers": 2,
        "num_target_layers": 8,
        "block_size": 5,
        "layer_types": ["sliding_attention", "full_attention"],
        "use_sliding_window": True,
        "sliding_window": 5,
        "max_window_layers": 2,
        "dflash_config": {"mask_token_id": 60, "target_layer_ids": [1, 5]},
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 5e5,
        "rope_scaling": scaling,
        "rope_parameters": {**scaling, "rope_theta": 5e5},
        "max_position_embeddings": 512,  # the target's, not the length of training texts
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": [2],
        "torch_dtype": "bfloat16",
        "specforge_ext": {"method": "dflash"},
    }
    # vLLM takes `causal` for all layers, so it is said where no layer slides only.
    _, full, _ = cases.build(weights=weights)
    full_config = method.export(full, weights.spec, dtype=torch.bfloat16).config
    assert full_config["dflash_config"] == {**config["dflash_config"], "causal": False}
    restored = method.restore(method.export(draft, weights.spec, dtype=torch.float32), weights)
    assert torch.equal(restored.rope.inv_freq, draft.rope.inv_freq)
    assert restored.block_shape == replace(draft.block_shape, rope_scaling=scaling)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 64}, "vocab_size: wanted the target's 61, got 64"),
        ({"hidden_size": "24"}, "hidden_size: wanted a positive count, got '24'"),
        ({"rms_norm_eps": None}, "rms_norm_eps: wanted a positive number, got None"),
        ({"rope_parameters": None}, "rope_parameters: wanted a mapping, got None"),
        ({"block_size": 4}, "block_size: wanted 5, got 4"),
        ({"layer_types": ["full_attention"]}, "layer_types: wanted 2 of full_attention and"),
        ({"layer_types": ["sliding_attention"] * 2}, "sliding_window: wanted a positive count"),
        (
            {"layer_types": ["sliding_attention"] * 2, "sliding_window": 9},
            r"layer_types and sliding_window: wanted \(None, None\), got \(9, 9\)",
        ),
        (
            {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            "partial_rotary_factor: wanted 1 .*, got 0.5",
        ),
        ({"dflash_config": None}, "dflash_config: wanted a mapping, got None"),
        ({"dflash_config": {}}, "target_layer_ids: wanted a list of ids, got None"),
        (
            {"dflash_config": {"target_layer_ids": [1, 4], "mask_token_id": 60}},
            r"target_layer_ids \+ 1: wanted \(2, 6\), got \(2, 5\)",
        ),
        (
            {"dflash_config": {"target_layer_ids": [1, 5], "mask_token_id": 61}},
            "mask_token_id: wanted an id below 61, got 61",
        ),
    ],
)
def test_restore_refuses(change: dict[str, object], message: str) -> None:
    method, draft, weights = cases.build()
    checkpoint = method.export(draft, weights.spec, dtype=torch.float32)
    changed = DraftCheckpoint(checkpoint.tensors, {**checkpoint.config, **change})
    with pytest.raises(ValueError, match=message):
        method.restore(changed, weights)


def test_another_draft_is_a_type_error() -> None:
    method, _, weights = cases.build()
    calls: list[Callable[[torch.nn.Module], object]] = [
        method.drafter,
        method.shard_units,
        lambda other: method.export(other, weights.spec, dtype=torch.float32),
    ]
    for call in calls:
        with pytest.raises(TypeError, match="dflash: wanted DFlashDraft, got Linear"):
            call(torch.nn.Linear(2, 2))


def test_warm_start_is_the_targets_last_layer() -> None:
    method, _, weights = cases.build(warm_start="target", layer_ids=(2, 7))
    draft = method.build(weights, DraftVocab.full(cases.VOCAB), seed=0)
    for layer in draft.layers:
        for name, parameter in layer.named_parameters():
            assert torch.equal(parameter, weights.last_layer[name]), name
    assert torch.equal(draft.norm.weight, weights.final_norm)
    assert torch.equal(draft.hidden_norm.weight, weights.last_layer["input_layernorm.weight"])
    features = torch.randn(3, cases.FEATURES)
    near = draft.fc(features) - features[:, -cases.HIDDEN :]
    assert float(near.detach().abs().max()) < 0.05


def test_warm_start_wants_the_targets_shape() -> None:
    weights = cases.target()
    norms = {"self_attn.q_norm.weight", "self_attn.k_norm.weight"}
    without = {name: t for name, t in weights.last_layer.items() if name not in norms}
    method, _, _ = cases.build(warm_start="target")
    vocab = DraftVocab.full(cases.VOCAB)
    draft = method.build(replace(weights, last_layer=without), vocab, seed=0)
    assert torch.equal(draft.layers[0].self_attn.q_norm.weight, torch.ones(8))
    without.pop("mlp.up_proj.weight")
    with pytest.raises(ValueError, match=r"wanted 'mlp.up_proj.weight' of the target's last layer"):
        method.build(replace(weights, last_layer=without), vocab, seed=0)
    with pytest.raises(
        ValueError, match=r"'mlp.gate_proj.weight' has shape \[40, 24\].* \[7, 24\]"
    ):
        cases.build(intermediate_size=7, warm_start="target")
