"""Checkpoints of drafts between formats: there and back bit for bit, or refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import block_cases as blocks
from convert_cases import assert_same_bits, config_of, dflash, eagle3, foreign, rewrite
from specforge_ext.cli import main
from specforge_ext.export import FORMATS, convert, read_strict

IDS = "eagle_aux_hidden_state_layer_ids"
MODELOPT_SECTION = {"use_last_layernorm": True, "next_layer_regular": True}


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(
    "options",
    [{}, {"aux_layer_ids": (1, 4, 6)}, {"vocab_size": None}],
    ids=["default layers", "named layers", "whole vocabulary"],
)
@pytest.mark.parametrize("engine", ["sglang", "vllm"])
def test_eagle3_there_and_back(
    tmp_path: Path, form: str, options: dict[str, Any], engine: str
) -> None:
    source, target, method, weights = eagle3(tmp_path, engine, **options)
    there, back = tmp_path / "there", tmp_path / "back"
    convert(source, there, to=form, target=target, depth=4)
    # Only a folder with an embedding of its own needs the target again, to see that it is its.
    convert(there, back, to=engine, target=target)
    if engine == "vllm" and form in ("speculators", "specforge"):  # vLLM may have an embedding
        assert torch.equal(
            load_file(back / "model.safetensors")["embed_tokens.weight"], weights.embed_tokens
        )
        rewrite(back, tensors=lambda held: {k: v for k, v in held.items() if "embed" not in k})
    assert_same_bits(source, back)
    method.restore(read_strict(back, method), weights)


@pytest.mark.parametrize("form", ["sglang", "vllm", "speculators"])
def test_eagle3_with_all_options_there_and_back(tmp_path: Path, form: str) -> None:
    source, target, _, _ = eagle3(
        tmp_path, num_layers=3, fc_norm=True, norm_output=True, aux_layer_ids=(1, 2, 4, 6)
    )
    convert(source, tmp_path / "there", to=form, target=target, depth=4)
    convert(tmp_path / "there", tmp_path / "back", to="sglang", target=target)
    assert_same_bits(source, tmp_path / "back")


@pytest.mark.parametrize("form", FORMATS)
def test_dflash_there_and_back(tmp_path: Path, form: str) -> None:
    source, target, method, weights = dflash(tmp_path)
    convert(source, tmp_path / "there", to=form, target=target)
    convert(tmp_path / "there", tmp_path / "back", to="sglang")
    assert_same_bits(source, tmp_path / "back")
    method.restore(read_strict(tmp_path / "back", method), weights)


@pytest.mark.parametrize("form", ["sglang", "vllm", "specforge", "modelopt"])
def test_dflash_with_sliding_layers_there_and_back(tmp_path: Path, form: str) -> None:
    source, _, _, _ = dflash(tmp_path, **blocks.MIXED)
    convert(source, tmp_path / "there", to=form)
    assert_same_bits(source, tmp_path / "there")
    with pytest.raises(ValueError, match=r"layer_types: wanted full_attention only, since specul"):
        convert(source, tmp_path / "no", to="speculators", target=tmp_path / "target")


def test_layers_are_named_as_each_format_counts_them(tmp_path: Path) -> None:
    source, target, _, _ = eagle3(tmp_path, aux_layer_ids=(1, 4, 6))
    for form in FORMATS:
        convert(source, tmp_path / form, to=form, target=target, depth=4)
    named = {form: config_of(tmp_path / form) for form in FORMATS}
    assert {form: config.get(IDS) for form, config in named.items()} == {
        "sglang": None, "vllm": [1, 4, 6], "speculators": [1, 4, 6], "specforge": None,
        "modelopt": None,
    }  # fmt: skip
    assert {f: c["eagle_config"][IDS] for f, c in named.items() if "eagle_config" in c} == {
        "sglang": [0, 3, 5], "specforge": [0, 3, 5], "modelopt": [0, 3, 5],
    }  # fmt: skip


def test_a_directory_for_both_servers_only_where_the_targets_depth_is_known(tmp_path: Path) -> None:
    source, target, _, _ = eagle3(tmp_path)
    convert(source, tmp_path / "both", to="sglang", target=target)
    convert(source, tmp_path / "one", to="sglang")
    assert "eagle_config" not in config_of(tmp_path / "both")
    assert config_of(tmp_path / "one")["eagle_config"][IDS] == [1, 3, 4]


def test_nobodys_layers_want_a_format(tmp_path: Path) -> None:
    source, target, _, _ = eagle3(tmp_path, aux_layer_ids=(1, 4, 6))
    foreign(source)
    with pytest.raises(ValueError, match=f"--from: wanted one of .*{IDS} are counted from 0 by"):
        convert(source, tmp_path / "out", to="vllm", target=target)
    done = convert(source, tmp_path / "out", to="vllm", source_format="specforge", target=target)
    assert config_of(tmp_path / "out")[IDS] == [1, 4, 6]
    assert str(done) == "eagle3: specforge -> vllm, 15 tensors"
    foreign(source, eagle_config={**MODELOPT_SECTION, IDS: [0, 3, 5]})
    assert convert(source, tmp_path / "again", to="vllm", target=target).source == "modelopt"


def test_norm_output_of_specforge_is_another(tmp_path: Path) -> None:
    source, target, _, _ = eagle3(tmp_path)
    foreign(source, norm_output=True)
    with pytest.raises(ValueError, match=r"norm_output is another thing in SpecForge"):
        convert(source, tmp_path / "out", to="vllm", target=target)
    for form, kept in (("specforge", False), ("sglang", True)):
        convert(source, tmp_path / form, to="vllm", source_format=form, target=target)
        assert ("norm_output" in config_of(tmp_path / form)) == kept
    foreign(source, norm_output=False)
    with pytest.raises(ValueError, match=r"norm_output: wanted true or no such key, got false"):
        convert(source, tmp_path / "out", to="vllm", source_format="specforge", target=target)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logit_scale": 0.5}, r"logit_scale: wanted no such key, .*got 0.5 .--ignore logit_scale"),
        ({"quantization_config": {"bits": 4}}, "quantization_config: wanted no such key"),
        ({"eagle_config": {"bias": True}}, "eagle_config. bias: wanted no such key"),
        ({"eagle_config": {"parallel_draft_step": 4}}, "parallel_draft_step: wanted 1, got 4"),
        ({"eagle_config": {IDS: [0, 3, 4]}}, r"one set of layers.*\[2, 4, 5\].*\[1, 4, 5\]"),
        ({IDS: [1, 3, 4]}, r"one set of layers, got .as hidden_states indices, read as vllm"),
        ({IDS: "2"}, f"{IDS}: wanted a list of layers, got '2'"),
        ({IDS: [4, 2]}, f"{IDS}: wanted ascending layers, got "),
        ({"hidden_act": "gelu"}, "hidden_act: wanted 'silu', got 'gelu'"),
        ({"attention_bias": True}, "attention_bias: wanted False, got True"),
        ({"norm_before_fc": True}, "norm_before_fc: wanted False, got True"),
        ({"fc_norm": "yes"}, "fc_norm: wanted true or false, got 'yes'"),
        ({"norm_before_residual": True}, "norm_before_residual: wanted a draft without it, since"),
        ({"num_aux_hidden_states": 4}, "num_aux_hidden_states: wanted 3, one for each"),
        ({"rms_norm_eps": None}, "rms_norm_eps: wanted a positive number, got None"),
        ({"vocab_size": "61"}, "vocab_size: wanted a positive count, got '61'"),
        ({"rope_theta": 5e5}, r"rope_theta: wanted one base, got \[10000.0, 500000.0\]"),
        ({"rope_theta": None, "rope_parameters": None}, r"rope_theta: wanted one base, got \[\]"),
        (
            {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
            "rope_scaling: wanted what rope_parameters says",
        ),
        (
            {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            "partial_rotary_factor: wanted 1 .*, got 0.5",
        ),
        ({"architectures": ["LlamaForCausalLM"]}, r"an EAGLE-3 or a DFlash draft, got 'eagle3'"),
        ({"eagle_config": 3}, "eagle_config: wanted a mapping, got 3"),
    ],
)
def test_eagle3_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    source, _, _, _ = eagle3(tmp_path)
    rewrite(source, config=change)
    with pytest.raises(ValueError, match=message):
        convert(source, tmp_path / "out", to="sglang")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "form", "message"),
    [
        ({"num_layers": 2}, "specforge", "several layers: wanted a draft without it, since specfo"),
        ({"norm_output": True}, "specforge", "norm_output: wanted a draft without it"),
        ({"fc_norm": True}, "modelopt", "fc_norm: wanted a draft without it, since modelopt"),
        ({"aux_layer_ids": (2, 5)}, "specforge", "other than three features: wanted"),
    ],
)
def test_what_a_format_has_not(
    tmp_path: Path, options: dict[str, Any], form: str, message: str
) -> None:
    source, target, _, _ = eagle3(tmp_path, **options)
    with pytest.raises(ValueError, match=message):
        convert(source, tmp_path / "out", to=form, target=target)


def test_an_embedding_of_the_drafts_own(tmp_path: Path) -> None:
    """SGLang takes the target's: the draft's own is left out only if it is that."""
    source, target, _, weights = eagle3(tmp_path)
    with pytest.raises(ValueError, match=r"--target: wanted .*, whose embedding speculators check"):
        convert(source, tmp_path / "no", to="speculators", depth=4)
    with pytest.raises(ValueError, match="--depth: wanted the tokens to draft a step"):
        convert(source, tmp_path / "no", to="speculators", target=target)
    done = convert(
        source, tmp_path / "there", to="speculators", target=target, target_name="org/t", depth=4
    )
    assert done.notes == ("embedding: the target's, added",)
    verifier = config_of(tmp_path / "there")["speculators_config"]["verifier"]
    assert verifier == {"name_or_path": "org/t", "architectures": ["Qwen3ForCausalLM"]}
    with pytest.raises(ValueError, match=r"--target: wanted .* whether the draft's own embedding"):
        convert(tmp_path / "there", tmp_path / "no", to="sglang")
    done = convert(tmp_path / "there", tmp_path / "back", to="sglang", target=target)
    assert done.notes == ("embedding: the target's, left out",)
    key = "embed_tokens.weight"
    rewrite(tmp_path / "there", tensors=lambda held: {**held, key: held[key] + 1})
    with pytest.raises(ValueError, match=r"embed_tokens.weight: wanted the target's, which"):
        convert(tmp_path / "there", tmp_path / "no", to="sglang", target=target)
    convert(tmp_path / "there", tmp_path / "vllm", to="vllm", target=target)
    held = load_file(tmp_path / "vllm" / "model.safetensors")[key]
    assert torch.equal(held, weights.embed_tokens + 1)


def test_an_embedding_is_not_rounded(tmp_path: Path) -> None:
    source, target, _, _ = eagle3(tmp_path)
    halved = ("d2t", "t2d")
    rewrite(
        source,
        tensors=lambda held: {k: v if k in halved else v.bfloat16() for k, v in held.items()},
    )
    with pytest.raises(ValueError, match=r"wanted the target's torch.float32 without rounding"):
        convert(source, tmp_path / "out", to="specforge", target=target)
    convert(source, tmp_path / "out", to="sglang", target=target)
    assert config_of(tmp_path / "out")["torch_dtype"] == "bfloat16"  # as the tensors are
    rewrite(source, tensors=lambda held: {**held, "norm.weight": held["norm.weight"].float()})
    with pytest.raises(ValueError, match=r"tensors: wanted one of .* got .'bfloat16', 'float32'"):
        convert(source, tmp_path / "out", to="sglang", target=target)


def test_the_draft_fits_the_target(tmp_path: Path) -> None:
    source, target, _, _ = eagle3(tmp_path)
    rewrite(source, config={"max_position_embeddings": 64})
    done = convert(source, tmp_path / "out", to="vllm", target=target)
    assert done.notes == ("max_position_embeddings: raised from 64 to the target's 512",)
    scaling = {"rope_type": "dynamic", "factor": 2.0}
    rewrite(source, config={"rope_parameters": {**scaling, "rope_theta": 1e4}})
    with pytest.raises(ValueError, match=r"got 64, which 'dynamic' RoPE computes with"):
        convert(source, tmp_path / "no", to="vllm", target=target)
    rewrite(target, config={"hidden_size": 32})
    with pytest.raises(ValueError, match="hidden_size: wanted the target's 32, got 24"):
        convert(source, tmp_path / "no", to="vllm", target=target)


def test_tensors_are_checked(tmp_path: Path) -> None:
    source, _, _, _ = eagle3(tmp_path)
    rewrite(source, tensors=lambda held: {**held, "fc.bias": torch.zeros(24)})
    with pytest.raises(ValueError, match=r"fc.bias: unknown key"):
        convert(source, tmp_path / "out", to="sglang")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dflash_config": {"use_swa": True}}, "dflash_config. use_swa: wanted no such key"),
        ({"dflash_config": {"causal": True}}, "dflash_config. causal: wanted False, got True"),
        ({"dflash_config": {"mask_token_id": 99}}, "mask_token_id: wanted an id below 61, got 99"),
        ({"dflash_config": {"block_size": 9}}, r"block_size: wanted one, got \['5', '9'\]"),
        ({"sliding_window": 8}, "sliding_window: wanted none, since no layer of layer_types"),
        ({"layer_types": ["full_attention"]}, "layer_types: wanted 2 of full_attention and slid"),
        ({"is_causal": True}, "is_causal: wanted no such key"),
        ({"num_target_layers": None}, "--target: wanted .* since the draft does not say its depth"),
    ],
)
def test_dflash_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    source, _, _, _ = dflash(tmp_path)
    if "dflash_config" in change:
        section = config_of(source)["dflash_config"] | change["dflash_config"]
        change = {"dflash_config": section}
    rewrite(source, config=change)
    with pytest.raises(ValueError, match=message):
        convert(source, tmp_path / "out", to="vllm")


def test_dflash_refuses_causality_beside_sliding_layers(tmp_path: Path) -> None:
    """What exports of an earlier form of this project said; vLLM took it for all layers."""
    source, _, _, _ = dflash(tmp_path, **blocks.MIXED)
    section = {**config_of(source)["dflash_config"], "causal": False}
    rewrite(source, config={"dflash_config": section})
    with pytest.raises(ValueError, match="causal: wanted no such key beside sliding layers"):
        convert(source, tmp_path / "out", to="vllm")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"draft_vocab_size": 32}, "draft_vocab_size: wanted 61, got 32"),
        ({"sample_from_anchor": True}, "sample_from_anchor: wanted no such key"),
        ({"aux_hidden_state_layer_ids": [0, 2]}, r"wanted indices from 1 on, got \[0, 2\]"),
        ({"transformer_layer_config": None}, "transformer_layer_config: wanted a mapping, got No"),
        ({"speculators_model_type": "dspark"}, "wanted an EAGLE-3 or a DFlash draft, got 'dflash'"),
    ],
)
def test_dflash_of_speculators_is_refused(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    source, target, _, _ = dflash(tmp_path)
    with pytest.raises(ValueError, match="--depth: wanted 4, the block's, or none, got 3"):
        convert(source, tmp_path / "there", to="speculators", target=target, depth=3)
    convert(source, tmp_path / "there", to="speculators", target=target)
    rewrite(tmp_path / "there", config=change)
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "there", tmp_path / "no", to="sglang", target=target)


def test_speculators_without_a_word_about_the_residual(tmp_path: Path) -> None:
    source, target, _, _ = eagle3(tmp_path)
    convert(source, tmp_path / "there", to="speculators", target=target, depth=4)
    rewrite(tmp_path / "there", config={"norm_before_residual": None})
    with pytest.raises(ValueError, match=r"norm_before_residual: wanted it said, since specul"):
        convert(tmp_path / "there", tmp_path / "no", to="sglang", target=target)


def test_the_norm_of_later_layers_has_two_names(tmp_path: Path) -> None:
    source, _, _, _ = eagle3(tmp_path, num_layers=2)
    kept = load_file(source / "model.safetensors")
    names = [f"layers.1.{name}.weight" for name in ("hidden_norm", "input_layernorm")]
    for name in names:
        rewrite(
            source,
            tensors=lambda held, name=name: {k: v for k, v in kept.items() if k != name},
        )
        convert(source, tmp_path / "out", to="vllm")
        held = load_file(tmp_path / "out" / "model.safetensors")
        assert all(torch.equal(held[n], kept[n]) for n in names)
    rewrite(source, tensors=lambda held: {**kept, names[0]: kept[names[0]] + 1})
    with pytest.raises(ValueError, match=r"layers.1.hidden_norm.weight: wanted the values of lay"):
        convert(source, tmp_path / "out", to="vllm")


def test_a_normalised_residual_is_for_vllm_only(tmp_path: Path) -> None:
    source, target, method, weights = eagle3(tmp_path)
    convert(source, tmp_path / "there", to="speculators", target=target, depth=4)
    rewrite(tmp_path / "there", config={"norm_before_residual": True})
    convert(tmp_path / "there", tmp_path / "vllm", to="vllm", target=target)
    assert config_of(tmp_path / "vllm")["norm_before_residual"] is True
    rewrite(
        tmp_path / "vllm",
        tensors=lambda held: {k: v for k, v in held.items() if "embed" not in k},
    )
    with pytest.raises(ValueError, match="norm_before_residual: wanted False, got True"):
        method.restore(read_strict(tmp_path / "vllm", method), weights)
    with pytest.raises(
        ValueError, match="norm_before_residual: wanted a draft without it, since s"
    ):
        convert(tmp_path / "there", tmp_path / "no", to="sglang", target=target)


def test_a_training_state(tmp_path: Path) -> None:
    source, target, _, _ = eagle3(tmp_path, aux_layer_ids=(1, 4, 6))
    tensors = load_file(source / "model.safetensors")
    run = tmp_path / "run-step4"
    run.mkdir()
    torch.save({"draft_state_dict": tensors, "global_step": 4}, run / "training_state.pt")
    rewrite(source, config={"specforge_ext": None})
    config = source / "config.json"
    with pytest.raises(ValueError, match=r"--config: wanted the draft's config.json, which "):
        convert(run, tmp_path / "out", to="sglang", target=target)
    convert(run, tmp_path / "out", to="sglang", target=target, config=config)
    for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items():
        assert torch.equal(tensor, tensors[name]), name
    assert config_of(tmp_path / "out")["eagle_config"][IDS] == [0, 3, 5]
    torch.save({"model": tensors}, run / "training_state.pt")
    with pytest.raises(ValueError, match="wanted SpecForge's draft_state_dict, found none"):
        convert(run, tmp_path / "out", to="sglang", config=config)
    torch.save({"draft_state_dict": Path()}, run / "training_state.pt")
    with pytest.raises(ValueError, match="wanted tensors and plain values only"):
        convert(run, tmp_path / "out", to="sglang", config=config)
    with pytest.raises(ValueError, match="--config: wanted none beside a directory with its own"):
        convert(source, tmp_path / "out", to="sglang", config=config)


def test_arguments(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target, _, _ = eagle3(tmp_path)
    out = tmp_path / "out"
    for arguments, message in (
        ({"to": "gguf"}, "--to: wanted one of sglang, vllm, .*, got 'gguf'"),
        ({"to": "vllm", "source_format": "hf"}, "--from: wanted one of .*, got 'hf'"),
        ({"to": "vllm", "target_name": "x"}, "--target-name: wanted --target beside it, got 'x'"),
    ):
        with pytest.raises(ValueError, match=message):
            convert(source, out, **arguments)
    with pytest.raises(ValueError, match="DEST: wanted another directory than SOURCE"):
        convert(source, source, to="vllm")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("not a draft")
    with pytest.raises(ValueError, match=r"DEST: wanted a new directory, .*mine has 'notes\.txt'"):
        convert(source, tmp_path / "mine", to="vllm")
    with pytest.raises(ValueError, match=r"wanted a directory to write, got the file .*notes\.txt"):
        convert(source, tmp_path / "mine" / "notes.txt", to="vllm")
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["notes.txt"]
    with pytest.raises(ValueError, match=r"config.json architectures: wanted a list, got None"):
        rewrite(target, config={"architectures": None})
        convert(source, out, to="vllm", target=target)
    assert main(["convert", str(source), str(out), "--to", "vllm"]) == 0
    assert "eagle3: vllm -> vllm, 15 tensors" in capsys.readouterr().out
    rewrite(source, config={"logit_scale": 0.5})
    assert main(["convert", str(source), str(out), "--to", "vllm"]) == 1
    assert "convert: config.json logit_scale: wanted no such key" in capsys.readouterr().err
    ignoring = ["convert", str(source), str(out), "--to", "vllm", "--ignore", "logit_scale"]
    assert main(ignoring) == 0
