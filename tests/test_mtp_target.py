"""From a target's files to a layer, and back into them."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import eagle3_cases
import mtp_cases as cases
from specforge_ext import cli
from specforge_ext.engines.hf import HfConfig, HfEngine
from specforge_ext.evaluate import evaluate, plain_decode
from specforge_ext.export import merge, merge_export, read_strict, write
from specforge_ext.methods.mtp import MtpConfig, MtpMethod
from specforge_ext.methods.mtp.init import public_tensors
from specforge_ext.methods.mtp.model import MtpDraft
from specforge_ext.records import DraftVocab, PackedBatch, TargetWeights, lengths_to_cu_seqlens

CPU = torch.device("cpu")


def open_engine(path: Path) -> HfEngine:
    return HfEngine.open(HfConfig(model=str(path), dtype="float32", device="cpu"))


def build(weights: TargetWeights, **config: object) -> tuple[MtpMethod, MtpDraft]:
    method = MtpMethod(MtpConfig.model_validate(config))
    return method, method.build(weights, DraftVocab.full(weights.spec.vocab_size), seed=0)


@pytest.mark.parametrize(("shards", "linear"), [(False, False), (True, True)])
def test_the_layer_is_read_from_the_targets_files(
    tmp_path: Path, shards: bool, linear: bool, caplog: pytest.LogCaptureFixture
) -> None:
    layer = cases.write_target(tmp_path / "target", shards=shards, linear=linear)
    weights = open_engine(tmp_path / "target").weights(device=CPU, last_layer=True)
    assert weights.spec.partial_rotary_factor == 0.25
    with caplog.at_level(logging.INFO, "specforge_ext"):
        _, draft = build(weights)
    assert "the target's own qwen3_next layer (mtp.*)" in caplog.text
    found = public_tensors(draft)
    assert found.keys() == layer.keys()
    assert all(torch.equal(found[name], layer[name]) for name in layer)
    assert draft.layer.gate_proj is not None and draft.rope.head_dim == 4


def test_drafting_is_the_definition_and_lossless(tmp_path: Path) -> None:
    """Real text of a real target: what is proposed is the best of the dense float64 logits."""
    layer = cases.write_target(tmp_path / "target")
    engine = open_engine(tmp_path / "target")
    weights = engine.weights(device=CPU)
    method, draft = build(weights)
    prompts = [torch.tensor(p, dtype=torch.int32) for p in ([5, 9, 7, 30], [50, 61], [3] * 6)]
    text = engine.generate(prompts, max_new_tokens=10, temperature=0.8, seed=1, stop_at_eos=False)
    double = {name: x.double() for name, x in layer.items()}
    layout = method.layout(engine.spec)
    for prompt, more in zip(prompts, text, strict=True):
        ids = torch.cat((prompt, more)).long()[None]
        n = ids.shape[1]
        decoder = engine.decoder()
        decoder.start(1, layout)
        positions = torch.arange(n)[None]
        valid = torch.ones_like(ids, dtype=torch.bool)
        last = decoder.forward(ids, positions, valid).features["last"]
        drafter = method.drafter(draft)
        drafter.start(1, n)
        drafter.observe(ids[:, 1:-2], {"last": last[:, :-3]}, positions[:, :-3], valid[:, :-3])
        got = drafter.logits_along(ids[:, -2:])[0]
        sample = PackedBatch(
            ("s",), (n,), ids[0], torch.ones(n, dtype=torch.uint8), positions[0],
            {"last": last[0]}, lengths_to_cu_seqlens([n]),
        )  # fmt: skip
        dense = cases.dense_logits(double, "qwen3_next", weights, sample, 3)
        wanted = torch.stack([step[n - 4] for step in dense])
        torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=1e-4)
    plain = plain_decode(
        engine.decoder(), prompts,
        max_new_tokens=16, temperature=0, seed=0, eos_ids=(), device=CPU,
    )  # fmt: skip
    spoken = evaluate(
        engine.decoder(), method.drafter(draft), prompts, layout,
        depth=3, max_new_tokens=16, temperature=0, seed=0, eos_ids=(), device=CPU,
    )  # fmt: skip
    for ours, theirs in zip(spoken.tokens, plain.tokens, strict=True):
        assert ours.tolist() == theirs.tolist()


@pytest.mark.parametrize("shards", [False, True])
def test_export_goes_back_into_the_target(
    tmp_path: Path, shards: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    target, out = tmp_path / "target", tmp_path / "deep" / "merged"
    cases.write_target(target, shards=shards)
    engine = open_engine(target)
    method, draft = build(engine.weights(device=CPU))
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter.mul_(1.25).add_(0.01)
    write(method.export(draft, engine.spec, dtype=torch.float32), tmp_path / "export")
    before = {path.name: path.read_bytes() for path in target.iterdir()}
    arguments = ["merge", str(tmp_path / "export"), str(target), str(out)]
    assert cli.main(arguments) == 0
    assert "1 file(s) written" in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before
    assert {path.name for path in out.iterdir()} == before.keys()
    assert sum(not path.is_symlink() for path in out.iterdir()) == 1
    merged = open_engine(out)
    _, again = build(merged.weights(device=CPU))
    for name, parameter in draft.named_parameters():
        assert torch.equal(parameter, again.get_parameter(name)), name
    ids = [torch.tensor([4, 8, 15], dtype=torch.int32)]
    texts = [
        e.generate(ids, max_new_tokens=8, temperature=0, seed=0)[0].tolist()
        for e in (engine, merged)
    ]
    assert texts[0] == texts[1]
    assert cli.main(arguments) == 2
    assert "to be new" in capsys.readouterr().err
    restored = method.restore(read_strict(tmp_path / "export", method), engine.weights(device=CPU))
    assert all(torch.equal(p, restored.get_parameter(n)) for n, p in draft.named_parameters())


def test_merge_refuses_what_does_not_fit(tmp_path: Path) -> None:
    cases.write_target(tmp_path / "target")
    tensors = load_file(tmp_path / "target" / "model.safetensors")
    norm = tensors["mtp.norm.weight"]
    for wrong, match in (
        (
            {"mtp.other.weight": norm, "mtp.norm.weight": norm},
            "mtp.other.weight: the target has none",
        ),
        ({"fc.weight": norm, "d2t": norm}, "wanted an mtp export, .* got 2 .* not: d2t, fc.weight"),
        ({"mtp.norm.weight": norm[:3]}, r"wanted \[32\] torch.float32, got \[3\]"),
        ({"mtp.norm.weight": norm.bfloat16()}, "got \\[32\\] torch.bfloat16"),
    ):
        with pytest.raises(ValueError, match=match):
            merge(wrong, tmp_path / "target", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="found 0 files"):
        merge({}, tmp_path / "empty", tmp_path / "out")
    (tmp_path / "empty" / "model.safetensors.index.json").write_text('{"weight_map": 3}')
    with pytest.raises(ValueError, match="wanted a weight_map of names to files, got 3"):
        merge({}, tmp_path / "empty", tmp_path / "out")
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "model.safetensors").write_bytes(b"\x00" * 100)
    with pytest.raises(ValueError, match=r"cut/model\.safetensors: wanted a safetensors file"):
        merge_export(tmp_path / "cut", tmp_path / "target", tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("self_attn.kv_a_proj_with_mqa.weight", r"latent attention \(MLA\)"),
        ("mlp.experts.0.up_proj.weight", "a mixture of experts"),
        ("self_attn.q_proj.weight_scale_inv", "quantised weights"),
        ("linear_attn.in_proj.weight", "linear attention"),
    ],
)
def test_other_layers_are_refused_by_name_before_they_are_read(name: str, match: str) -> None:
    class Unreadable(dict[str, Tensor]):
        def __getitem__(self, key: str) -> Tensor:
            raise AssertionError(f"{key} was read")

    tensors = Unreadable(cases.checkpoint("deepseek"))
    tensors[f"model.layers.8.{name}"] = torch.zeros(1)
    with pytest.raises(ValueError, match=f"{match}.*would need"):
        build(cases.target(tensors))


def test_what_is_in_the_checkpoint_decides() -> None:
    tensors = cases.checkpoint("qwen3_next", gate=True)
    with pytest.raises(ValueError, match=r"form 'deepseek': the checkpoint .* 'qwen3_next'"):
        build(cases.target(tensors), form="deepseek")
    _, fresh = build(cases.target(tensors), form="deepseek", start="fresh")
    assert fresh.shape.form.name == "deepseek" and fresh.layer.gate_proj is None
    with pytest.raises(ValueError, match=r"found none under model\.layers\.8\., mtp\."):
        build(cases.target({}), start="checkpoint")
    other = {"model.mtp_layers.0.input_proj.weight": torch.zeros(1)}
    with pytest.raises(ValueError, match=r"wanted a layer with .*eh_proj or mtp.fc"):
        build(cases.target(other))
    assert build(cases.target(other), start="fresh")
    bare = replace(cases.target({}), last_layer={})
    with pytest.raises(ValueError, match="the target's last layer, whose kind"):
        build(bare)


def test_broken_layers_are_named() -> None:
    tensors = cases.checkpoint("deepseek")
    second = {**tensors, "model.layers.9.eh_proj.weight": torch.zeros(1)}
    with pytest.raises(ValueError, match=r"a second layer \(model.layers.9"):
        build(cases.target(second))
    for name, tensor, match in (
        ("model.layers.8.mlp.up_proj.weight", None, "mlp.up_proj.weight: missing"),
        ("model.layers.8.enorm.weight", None, "enorm.weight: missing"),
        ("model.layers.8.self_attn.sinks", torch.zeros(4), "self_attn.sinks: unknown"),
        ("model.layers.8.eh_proj.weight", torch.zeros(24, 24), r"wanted \[24, 48\], got"),
    ):
        changed = {key: x for key, x in tensors.items() if key != name}
        changed |= {} if tensor is None else {name: tensor}
        with pytest.raises(ValueError, match=match):
            build(cases.target(changed))


def test_exports_of_other_targets_are_refused() -> None:
    method, draft, weights = cases.build()
    checkpoint = method.export(draft, weights.spec, dtype=torch.float32)
    wrong = {
        "hidden_size": (48, "hidden_size: wanted the target's 24, got 48"),
        "num_target_layers": (9, "num_target_layers: wanted the target's 8"),
        "specforge_ext": ({"form": "mimo"}, "form: wanted one of deepseek, qwen3_next"),
    }
    for key, (value, match) in wrong.items():
        config = {**checkpoint.config, key: value}
        with pytest.raises(ValueError, match=match):
            method.restore(replace(checkpoint, config=config), weights)
    config = {**checkpoint.config, "specforge_ext": {"form": "deepseek", "qk_norm": 1}}
    with pytest.raises(ValueError, match="qk_norm: wanted true or false, got 1"):
        method.schema(config)
    with pytest.raises(ValueError, match="rms_norm_eps: wanted a positive number"):
        method.schema({**checkpoint.config, "rms_norm_eps": None})
    with pytest.raises(ValueError, match="head_dim: wanted a positive count"):
        method.schema({**checkpoint.config, "head_dim": 0})


def test_a_draft_vocabulary_is_refused() -> None:
    method = MtpMethod(MtpConfig())
    with pytest.raises(ValueError, match="the target's whole vocabulary of 61"):
        method.build(cases.target({}), eagle3_cases.vocab(23), seed=0)


def test_an_index_that_lies_is_refused(tmp_path: Path) -> None:
    cases.write_target(tmp_path / "target", shards=True)
    weights = open_engine(tmp_path / "target").weights(device=CPU)
    (tmp_path / "target" / "model-00003-of-00003.safetensors").unlink()
    with pytest.raises(ValueError, match=r"wanted the files \['model-00003-of-00003"):
        build(weights)
    (tmp_path / "target" / "model.safetensors.index.json").write_text("{}")
    weights = replace(weights, checkpoint=type(weights.checkpoint)(str(tmp_path / "target")))  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="wanted a weight_map"):
        build(weights)


def test_a_target_that_was_cut_is_refused(tmp_path: Path) -> None:
    """By who reads its tensors, and by who opens the model."""
    cases.write_target(tmp_path / "target")
    weights = open_engine(tmp_path / "target").weights(device=CPU)
    file = tmp_path / "target" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    weights = replace(weights, checkpoint=type(weights.checkpoint)(str(tmp_path / "target")))  # type: ignore[call-arg]
    with pytest.raises(ValueError, match=r"model\.safetensors: wanted a whole safetensors file"):
        build(weights)
    with pytest.raises(ValueError, match="model: wanted a directory or a hub name of a causal LM"):
        open_engine(tmp_path / "target")
