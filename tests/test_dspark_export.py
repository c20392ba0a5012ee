"""Settings of DSpark, exported checkpoints, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import block_cases
import dspark_cases as cases
from specforge_ext.config import parse
from specforge_ext.export import Observed, read_strict, verify_export, write
from specforge_ext.methods import METHODS, Method
from specforge_ext.methods.dspark import DSparkConfig
from specforge_ext.records import DraftCheckpoint, DraftVocab


def test_the_registered_method_is_a_method() -> None:
    method: Method = METHODS.get("dspark")(DSparkConfig())
    assert method.name == "dspark"


def test_the_layout_has_the_targets_last_state() -> None:
    method, _, weights = cases.build()
    hidden, last = method.layout(weights.spec).features
    assert (hidden.name, hidden.layer_ids, hidden.final_norm) == ("hidden", (2, 6), False)
    assert (last.name, last.layer_ids, last.final_norm) == ("last", (8,), True)
    assert last.width == block_cases.HIDDEN


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"markov_rank": 0}, "method.markov_rank: .* greater than 0, got 0"),
        ({"markov_head": "lstm"}, "method.markov_head: .*got 'lstm'"),
        ({"l1_weight": 0}, "method.l1_weight: .* greater than 0, got 0"),
        ({"ce_weight": -1}, "method.ce_weight: .* greater than or equal to 0, got -1"),
        ({"confidence_cut": 1.5}, "method.confidence_cut: .* less than or equal to 1, got 1.5"),
        (
            {"confidence_weight": 0, "confidence_cut": 0.5},
            "confidence_cut: wanted none where confidence_weight is 0 .*, got 0.5",
        ),
    ],
)
def test_settings_that_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(DSparkConfig, settings, where="method")


def test_the_vocabulary_is_the_whole_one() -> None:
    method, _, weights = cases.build()
    assert method.vocab([], weights.spec).is_full
    part = DraftVocab(torch.arange(block_cases.VOCAB) < 9, torch.zeros(9, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"wanted the target's whole vocabulary of 61 .*, got 9"):
        method.build(weights, part, seed=0)


def test_fresh_biases_are_zero() -> None:
    method, _, weights = cases.build(markov_head="rnn")
    draft = method.build(weights, DraftVocab.full(block_cases.VOCAB), seed=0)
    assert not draft.markov_head.joint_proj.bias.any()
    assert draft.confidence_head is not None and not draft.confidence_head.proj.bias.any()
    assert torch.equal(draft.norm.weight, torch.ones(block_cases.HIDDEN))


OWN = {
    "vanilla": {},
    "gated": {"gate_proj.weight": (6, 30), "gate_proj.bias": (6,)},
    "rnn": {"joint_proj.weight": (18, 36), "joint_proj.bias": (18,)},
}


@pytest.mark.parametrize("kind", cases.KINDS)
@pytest.mark.parametrize("confidence", [1.0, 0.0])
def test_exported_draft_is_the_trained_one(tmp_path: Path, kind: str, confidence: float) -> None:
    config = {**block_cases.MIXED, "gamma": 5.0, "markov_head": kind}
    method, draft, weights = cases.build(**config, confidence_weight=confidence)
    checkpoint = method.export(draft, weights.spec, dtype=torch.float32)
    shapes = {
        name: tuple(t.shape) for name, t in checkpoint.tensors.items() if "head." in name
    }  # of the heads
    wanted = {"markov_w1.weight": (61, 6), "markov_w2.weight": (61, 6), **OWN[kind]}
    heads = {f"markov_head.{name}": shape for name, shape in wanted.items()}
    if confidence:
        heads |= {"confidence_head.proj.weight": (1, 30), "confidence_head.proj.bias": (1,)}
    assert shapes == heads
    configs = method.engine_configs(checkpoint.config, weights.spec)
    assert configs == {"": checkpoint.config}
    write(checkpoint, tmp_path / "export")
    restored = method.restore(read_strict(tmp_path / "export", method), weights)
    packed = cases.batch((24, 9))
    ours, theirs = (method.step(d, packed, block_cases.AT).loss_sum for d in (draft, restored))
    assert torch.equal(ours, theirs) and ours.item() > 0


def test_verification_compares_the_lengths_too(tmp_path: Path) -> None:
    method, draft, weights = cases.build(confidence_cut=0.3)
    write(method.export(draft, weights.spec, dtype=torch.float32), tmp_path / "export")
    packed = cases.batch((9,))
    observed = Observed(
        packed.input_ids[None, 1:6],
        {"hidden": packed.features["hidden"][None, :5]},
        torch.arange(5)[None],
        torch.ones(1, 5, dtype=torch.bool),
    )
    check = verify_export(
        method, draft, tmp_path / "export", weights, observed, depth=4, dtype=torch.float32
    )
    assert check.ok and check.outputs == 4
    with torch.no_grad():
        assert draft.confidence_head is not None
        draft.confidence_head.proj.bias.add_(20)
    changed = verify_export(
        method, draft, tmp_path / "export", weights, observed, depth=4, dtype=torch.float32
    )
    assert changed.differences == ("confidence_head.proj.bias", "lengths")


def test_config_json() -> None:
    method, draft, weights = cases.build(markov_head="gated")
    config = method.export(draft, weights.spec, dtype=torch.bfloat16).config
    for key, wanted in {
        "architectures": ["Qwen3DSparkModel"],
        "model_type": "qwen3",
        "vocab_size": 61,
        "block_size": 5,
        "num_target_layers": 8,
        "markov_rank": 6,
        "markov_head_type": "gated",
        "enable_confidence_head": True,
        "confidence_head_with_markov": True,
        "sample_from_anchor": True,
        "max_position_embeddings": 512,
        "dflash_config": {"mask_token_id": 60, "target_layer_ids": [1, 5], "causal": False},
        "specforge_ext": {"method": "dspark"},
    }.items():
        assert config[key] == wanted, key
    method, draft, weights = cases.build(confidence_weight=0.0)
    config = method.export(draft, weights.spec, dtype=torch.bfloat16).config
    assert config["enable_confidence_head"] is False


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 64}, "vocab_size: wanted the target's 61, got 64"),
        ({"markov_rank": 7}, "markov_rank: wanted 6, got 7"),
        ({"markov_rank": None}, "markov_rank: wanted a positive count, got None"),
        ({"markov_head_type": "rnn"}, "markov_head_type: wanted 'vanilla', got 'rnn'"),
        ({"markov_head_type": "lstm"}, "markov_head_type: wanted one of .*, got 'lstm'"),
        ({"enable_confidence_head": False}, "enable_confidence_head: wanted True, got False"),
        ({"enable_confidence_head": None}, "enable_confidence_head: wanted true or false, got Non"),
        ({"confidence_head_with_markov": False}, "confidence_head_with_markov: wanted true"),
        ({"sample_from_anchor": False}, "sample_from_anchor: wanted true"),
    ],
)
def test_restore_refuses(change: dict[str, object], message: str) -> None:
    method, draft, weights = cases.build()
    checkpoint = method.export(draft, weights.spec, dtype=torch.float32)
    changed = DraftCheckpoint(checkpoint.tensors, {**checkpoint.config, **change})
    with pytest.raises(ValueError, match=message):
        method.restore(changed, weights)


def test_another_draft_is_a_type_error() -> None:
    method, _, _ = cases.build()
    with pytest.raises(TypeError, match="dspark: wanted DSparkDraft, got Linear"):
        method.drafter(torch.nn.Linear(2, 2))


def test_warm_start_is_the_targets_last_layer() -> None:
    method, _, weights = cases.build(warm_start="target", layer_ids=(2, 7))
    draft = method.build(weights, DraftVocab.full(block_cases.VOCAB), seed=0)
    for layer in draft.layers:
        for name, parameter in layer.named_parameters():
            assert torch.equal(parameter, weights.last_layer[name]), name
