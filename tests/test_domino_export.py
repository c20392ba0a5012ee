"""Settings of Domino, exported checkpoints, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import block_cases
import domino_cases as cases
from specforge_ext.config import parse
from specforge_ext.export import read_strict, write
from specforge_ext.methods import METHODS, Method
from specforge_ext.methods.domino import DominoConfig
from specforge_ext.records import DraftCheckpoint, DraftVocab

OWN = {
    "prefix_gru.weight_ih_l0": (30, 24),
    "prefix_gru.weight_hh_l0": (30, 10),
    "embed_proj.0.weight": (7, 34),
    "embed_proj.2.weight": (61, 7),
}


def test_the_registered_method_is_a_method() -> None:
    method: Method = METHODS.get("domino")(DominoConfig())
    assert method.name == "domino"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lambda_start": 1.5}, "method.lambda_start: .* less than or equal to 1, got 1.5"),
        ({"lambda_decay_ratio": -1}, "method.lambda_decay_ratio: .* or equal to 0, got -1"),
        ({"emb_dim": 0}, "method.emb_dim: .* greater than 0, got 0"),
        ({"denominator": "mean"}, "method.denominator: .*got 'mean'"),
        ({"pure_draft_prefix_len": 1}, "method.pure_draft_prefix_len: .*nknown"),
        ({"gru_hiden_dim": 4}, "did you mean 'gru_hidden_dim'"),
    ],
)
def test_settings_that_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(DominoConfig, settings, where="method")


def test_the_vocabulary_is_the_whole_one() -> None:
    method, _, weights = cases.build()
    part = DraftVocab(torch.arange(cases.VOCAB) < 9, torch.zeros(9, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"domino: wanted the target's whole vocabulary of 61"):
        method.build(weights, part, seed=0)


@pytest.mark.parametrize("shift", [False, True])
def test_exported_draft_is_the_trained_one(tmp_path: Path, shift: bool) -> None:
    method, draft, weights = cases.build(**block_cases.MIXED, gamma=5.0, shift_label=shift)
    checkpoint = method.export(draft, weights.spec, dtype=torch.float32)
    configs = method.engine_configs(checkpoint.config, weights.spec)
    assert configs == {"sglang": checkpoint.config}  # there is none for vLLM
    write(checkpoint, tmp_path / "export")
    restored = method.restore(read_strict(tmp_path / "export", method), weights)
    packed = block_cases.batch((24, 9))
    ours, theirs = (method.step(d, packed, cases.AT).loss_sum for d in (draft, restored))
    assert torch.equal(ours, theirs) and ours.item() > 0


def test_keys_are_dflashs_and_the_projectors() -> None:
    method, draft, weights = cases.build()
    checkpoint = method.export(draft, weights.spec, dtype=torch.bfloat16)
    dflash, other, _ = block_cases.build(weights=weights)
    plain = dflash.export(other, weights.spec, dtype=torch.bfloat16)
    assert checkpoint.tensors.keys() == plain.tensors.keys() | OWN.keys()
    assert {name: tuple(checkpoint.tensors[name].shape) for name in OWN} == OWN
    assert all(t.dtype == torch.bfloat16 for t in checkpoint.tensors.values())
    section = {
        "mask_token_id": 60,
        "target_layer_ids": [1, 5],
        "causal": False,
        "projector_type": "domino",
        "pure_draft_prefix_len": 1,
        "shift_label": False,
        "gru_hidden_dim": 10,
        "emb_dim": 7,
    }
    own = {"dflash_config": section, "specforge_ext": {"method": "domino"}}
    assert checkpoint.config == {**plain.config, **own}
    assert checkpoint.config["architectures"] == ["DFlashDraftModel"]


@pytest.mark.parametrize("name", [*OWN])
def test_a_missing_or_misshapen_tensor_is_refused(tmp_path: Path, name: str) -> None:
    method, draft, weights = cases.build()
    checkpoint = method.export(draft, weights.spec, dtype=torch.float32)
    tensors = dict(checkpoint.tensors)
    whole = tensors.pop(name)
    write(DraftCheckpoint(tensors, checkpoint.config), tmp_path / "missing")
    with pytest.raises(ValueError, match=name):
        read_strict(tmp_path / "missing", method)
    tensors[name] = whole[1:].contiguous()
    write(DraftCheckpoint(tensors, checkpoint.config), tmp_path / "misshapen")
    with pytest.raises(ValueError, match=name):
        read_strict(tmp_path / "misshapen", method)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"projector_type": None}, "projector_type: wanted 'domino', got None"),
        ({"pure_draft_prefix_len": 2}, "pure_draft_prefix_len: wanted 1, got 2"),
        ({"shift_label": True}, "shift_label: wanted False, got True"),
        ({"gru_hidden_dim": "10"}, "gru_hidden_dim: wanted a positive count, got '10'"),
        ({"emb_dim": None}, "emb_dim: wanted a positive count, got None"),
        ({"target_layer_ids": [1, 4]}, r"target_layer_ids \+ 1: wanted \(2, 6\), got \(2, 5\)"),
    ],
)
def test_restore_refuses(change: dict[str, object], message: str) -> None:
    method, draft, weights = cases.build()
    checkpoint = method.export(draft, weights.spec, dtype=torch.float32)
    section = checkpoint.config["dflash_config"]
    assert isinstance(section, dict)
    config = {**checkpoint.config, "dflash_config": {**section, **change}}
    with pytest.raises(ValueError, match=f"config.json dflash_config.{message}"):
        method.restore(DraftCheckpoint(checkpoint.tensors, config), weights)


def test_dflash_does_not_take_it_for_its_own(tmp_path: Path) -> None:
    """It would draft without the correction."""
    method, draft, weights = cases.build()
    write(method.export(draft, weights.spec, dtype=torch.float32), tmp_path)
    dflash, _, _ = block_cases.build(weights=weights)
    with pytest.raises(ValueError, match=r"embed_proj\.0\.weight"):
        read_strict(tmp_path, dflash)


def test_another_draft_is_a_type_error() -> None:
    method, _, weights = cases.build()
    calls: list[Callable[[torch.nn.Module], object]] = [
        method.drafter,
        method.shard_units,
        lambda other: method.export(other, weights.spec, dtype=torch.float32),
    ]
    for call in calls:
        with pytest.raises(TypeError, match="domino: wanted DominoDraft, got Linear"):
            call(torch.nn.Linear(2, 2))


def test_initial_weights_follow_the_seed() -> None:
    method, _, weights = cases.build()
    vocab = DraftVocab.full(cases.VOCAB)
    one, same, other = (method.build(weights, vocab, seed=s) for s in (1, 1, 2))
    for name, parameter in one.named_parameters():
        assert torch.equal(parameter, dict(same.named_parameters())[name])
    assert not torch.equal(one.prefix_gru.weight_ih_l0, other.prefix_gru.weight_ih_l0)
    assert not torch.equal(one.project, other.project)
    assert not one.correct.any()
