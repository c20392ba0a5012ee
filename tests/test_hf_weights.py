"""A few weights of a target read from its files, against the model that transformers opens."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.utils import hub

from specforge_ext.engines.checkpoint import INDEX, CheckpointTensors
from specforge_ext.engines.hf import HfConfig, HfEngine
from specforge_ext.records import TargetWeights

CPU = torch.device("cpu")
SHAPE: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
}
LINEAR: dict[str, Any] = {
    **{"linear_num_key_heads": 2, "linear_num_value_heads": 4},
    **{"linear_key_head_dim": 8, "linear_value_head_dim": 8},
    "layer_types": [*["linear_attention"] * 3, "full_attention"],
}
VISION: dict[str, Any] = {
    **{"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "patch_size": 2},
    **{"out_hidden_size": 32, "num_position_embeddings": 4, "deepstack_visual_indexes": [0]},
}


def of(kind: str, **more: Any) -> Callable[[bool], Any]:
    def build(tied: bool) -> Any:
        config = getattr(transformers, f"{kind}Config")
        model = getattr(transformers, f"{kind}ForCausalLM")
        return model(config(**SHAPE, **more, tie_word_embeddings=tied))

    return build


def multimodal(tied: bool) -> Any:
    """Its text model is under `model.language_model` in the files, and alone when it is opened."""
    text = {**SHAPE, **LINEAR, "tie_word_embeddings": tied}
    config = transformers.Qwen3_5Config(
        text_config=text, vision_config=VISION, tie_word_embeddings=tied
    )
    return transformers.Qwen3_5ForConditionalGeneration(config)


KINDS: dict[str, Callable[[bool], Any]] = {
    "llama": of("Llama"),
    "qwen3": of("Qwen3"),
    "mistral": of("Mistral"),
    "qwen3_moe": of("Qwen3Moe", **EXPERTS),
    "mixtral": of("Mixtral", **EXPERTS),
    "qwen3_5": multimodal,
}


def write(kind: str, path: Path, *, tied: bool = False, sharded: bool = False) -> Path:
    """In float32, no two of its tensors alike."""
    torch.manual_seed(0)
    model = KINDS[kind](tied)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter.data, 0.5, 1.5)
    model.save_pretrained(path, max_shard_size="20KB" if sharded else "1GB")
    assert (path / "model.safetensors.index.json").exists() == sharded
    return path


def config_of(path: Path, dtype: str = "float32") -> HfConfig:
    return HfConfig.model_validate({"model": str(path), "dtype": dtype, "device": "cpu"})


def read(path: Path, *, last_layer: bool = False, dtype: str = "float32") -> TargetWeights:
    return HfEngine.read_weights(config_of(path, dtype), device=CPU, last_layer=last_layer)


def assert_same(ours: TargetWeights, wanted: TargetWeights) -> None:
    assert asdict(ours.spec) == asdict(wanted.spec)
    for name in ("embed_tokens", "lm_head", "final_norm"):
        got, want = getattr(ours, name), getattr(wanted, name)
        assert got.dtype == want.dtype and torch.equal(got, want), name
        assert not got.requires_grad
    assert list(ours.last_layer) == list(wanted.last_layer)
    assert "self_attn.q_proj.bias" not in ours.last_layer
    for name, want in wanted.last_layer.items():
        got = ours.last_layer[name]
        assert got.dtype == want.dtype and torch.equal(got, want), name
    assert ours.checkpoint.keys() == wanted.checkpoint.keys()


@pytest.mark.parametrize("sharded", [False, True], ids=["file", "shards"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("kind", KINDS)
def test_bits_are_those_of_the_opened_model(
    kind: str, tied: bool, sharded: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(kind, tmp_path, tied=tied, sharded=sharded)
    dtype = "bfloat16" if sharded else "float32"
    wanted = HfEngine.open(config_of(path, dtype)).weights(device=CPU, last_layer=True)
    monkeypatch.setattr(HfEngine, "open", None)
    ours = read(path, last_layer=True, dtype=dtype)
    assert_same(ours, wanted)
    assert (ours.lm_head is ours.embed_tokens) == tied
    assert not read(path).last_layer


@pytest.mark.parametrize("kind", KINDS)
def test_norms_are_what_they_multiply_by(kind: str, tmp_path: Path) -> None:
    """A warm start hands them to a draft whose norms multiply by their weight itself."""
    weights = read(write(kind, tmp_path), last_layer=True)
    base = HfEngine.open(config_of(tmp_path))._target
    ones = torch.ones(SHAPE["hidden_size"])
    of_layer = base.layers[-1].input_layernorm
    for norm, factor in (
        (base.norm, weights.final_norm),
        (of_layer, weights.last_layer["input_layernorm.weight"]),
    ):
        torch.testing.assert_close(norm(ones[None])[0].detach(), factor, rtol=1e-5, atol=0)


def test_the_demo_target_and_further_end_tokens(tmp_path: Path) -> None:
    demo = HfConfig(model="demo", device="cpu")
    ours = HfEngine.read_weights(demo, device=CPU, last_layer=True)
    assert_same(ours, HfEngine.open(demo).weights(device=CPU, last_layer=True))
    path = write("qwen3", tmp_path)
    (path / "generation_config.json").write_text('{"eos_token_id": [7, 2]}')
    assert read(path).spec.eos_token_ids == (2, 7)
    (path / "generation_config.json").unlink()
    assert read(path).spec.eos_token_ids == (2,)


@pytest.mark.parametrize(
    "names",
    [
        lambda name: name.removeprefix("model."),
        lambda name: f"language_model.{name}",
        lambda name: name.replace("model.", "model.language_model."),
    ],
)
def test_what_wraps_the_names_does_not_count(names: Callable[[str], str], tmp_path: Path) -> None:
    path = write("llama", tmp_path)
    wanted = HfEngine.open(config_of(path)).weights(device=CPU, last_layer=True)
    change(path, lambda t: {names(name): tensor for name, tensor in t.items()})
    ours = read(path, last_layer=True)
    for name in ("embed_tokens", "lm_head", "final_norm"):
        assert torch.equal(getattr(ours, name), getattr(wanted, name))
    assert all(torch.equal(ours.last_layer[k], v) for k, v in wanted.last_layer.items())


def change(path: Path, edit: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    tensors = edit(load_file(path / "model.safetensors"))
    save_file(tensors, path / "model.safetensors", {"format": "pt"})


def without(tensors: dict[str, Tensor], part: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if part not in name}


def test_a_tied_head_may_be_what_the_files_have(tmp_path: Path) -> None:
    """As transformers does it: either one alone, or both, which then may differ."""
    path = write("qwen3", tmp_path, tied=True)
    embedding = load_file(path / "model.safetensors")["model.embed_tokens.weight"]
    change(path, lambda t: {**t, "lm_head.weight": embedding.clone()})
    both = read(path)
    assert both.lm_head is both.embed_tokens
    change(path, lambda t: without(t, "embed_tokens"))
    assert_same(read(path), HfEngine.open(config_of(path)).weights(device=CPU))
    change(path, lambda t: {**t, "model.embed_tokens.weight": embedding + 1})
    assert_same(read(path), HfEngine.open(config_of(path)).weights(device=CPU))
    assert not torch.equal(read(path).lm_head, read(path).embed_tokens)


def test_a_tensor_that_does_not_serve_is_named(tmp_path: Path) -> None:
    def refused(edit: Callable[[dict[str, Tensor]], dict[str, Tensor]], match: str) -> None:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        shutil.copytree(whole, folder)
        change(folder, edit)
        with pytest.raises(ValueError, match=match):
            dict(read(folder, last_layer=True).last_layer)

    whole = write("qwen3", tmp_path / "whole")
    at = r" in \S*model\.safetensors"
    refused(
        lambda t: without(t, "lm_head.weight"),
        rf"model '\S+': wanted lm_head\.weight{at}, found none",
    )
    refused(
        lambda t: t | {"model.norm.weight": torch.ones(3)},
        rf"model\.norm\.weight{at}: wanted \[32\], got \[3\]",
    )
    refused(
        lambda t: t | {"lm_head.weight": t["lm_head.weight"].to(torch.float8_e4m3fn)},
        rf"lm_head\.weight{at}: wanted float32, bfloat16 or float16, got torch\.float8",
    )
    refused(
        lambda t: (
            without(t, "model.norm.weight")
            | {f"{wrap}norm.weight": torch.ones(32) for wrap in ("", "language_model.")}
        ),
        rf"wanted one tensor for model\.norm\.weight{at}, got language_model\.norm\.weight, norm",
    )
    refused(
        lambda t: without(t, "layers.3.mlp.up_proj.weight"),
        rf"wanted model\.layers\.3\.mlp\.up_proj\.weight{at}, found none",
    )


def test_quantised_experts_are_refused_before_they_are_made_one(tmp_path: Path) -> None:
    path = write("qwen3_moe", tmp_path)
    name = "model.layers.3.mlp.experts.1.up_proj.weight"
    change(path, lambda t: {**t, name: t[name].to(torch.float8_e4m3fn)})
    layer = read(path, last_layer=True).last_layer
    assert layer["mlp.gate.weight"].shape == (4, 32)
    with pytest.raises(ValueError, match=r"experts\.1\.up_proj\.weight in .*: wanted float32"):
        layer["mlp.experts.gate_up_proj"]


def test_without_safetensors_the_whole_model_is_opened_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write("llama", tmp_path)
    wanted = read(path)
    torch.save(load_file(path / "model.safetensors"), path / "pytorch_model.bin")
    (path / "model.safetensors").unlink()
    with caplog.at_level("WARNING", "specforge_ext"):
        assert torch.equal(read(path).embed_tokens, wanted.embed_tokens)
    assert "has no safetensors files: each trainer opens the whole model" in caplog.text


def test_what_was_read_is_not_the_file(tmp_path: Path) -> None:
    path = write("llama", tmp_path)
    ours = read(path)
    before = ours.embed_tokens.clone()
    with (path / "model.safetensors").open("r+b") as file:
        file.seek(-(1 << 14), 2)
        file.write(b"\xff" * (1 << 14))
    assert torch.equal(ours.embed_tokens, before)


def write_sparse(path: Path) -> Path:
    """A Llama of 2.1 GiB, all zeros, that takes no room on the disk."""
    hidden, ffn = 64, 700_000
    config = transformers.LlamaConfig(
        **{**SHAPE, "hidden_size": hidden, "intermediate_size": ffn, "head_dim": 16}
    )
    config.save_pretrained(path)
    with torch.device("meta"):
        shapes = {
            k: list(v.shape) for k, v in transformers.LlamaForCausalLM(config).state_dict().items()
        }
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 4 * int(torch.tensor(shape).prod())
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (path / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    assert end > 2 << 30
    return path


def high_water_bytes() -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in x)
    return int(line.split()[1]) * 1024


def test_only_what_is_wanted_is_touched(tmp_path: Path) -> None:
    path = write_sparse(tmp_path)
    read(write("llama", tmp_path / "warm"))  # imports
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = high_water_bytes()
    weights = read(path, last_layer=True)
    assert weights.last_layer["self_attn.q_proj.weight"].shape == (64, 64)
    assert high_water_bytes() - before < 50 << 20
    assert weights.last_layer["mlp.up_proj.weight"].nbytes > 150 << 20
    assert high_water_bytes() - before > 150 << 20


def test_of_a_hub_model_only_the_shards_that_are_needed_are_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write("llama", tmp_path, sharded=True)
    fetched: set[str] = set()

    def cached_file(model: str, name: str, **options: Any) -> str | None:
        assert model == "some/model" and not options["local_files_only"]
        fetched.add(name)
        return str(path / name) if (path / name).exists() else None

    monkeypatch.setattr(hub, "cached_file", cached_file)
    tensors = CheckpointTensors("some/model", local=False)
    index = json.loads((path / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(tensors) == set(index) and fetched == {"model.safetensors", INDEX}
    assert tensors["lm_head.weight"].shape == (61, 32)
    assert fetched == {"model.safetensors", INDEX, index["lm_head.weight"]}
    (path / index["model.norm.weight"]).unlink()
    with pytest.raises(ValueError, match=r"index\.json: wanted the file 'model-\S+', found none"):
        tensors["model.norm.weight"]
