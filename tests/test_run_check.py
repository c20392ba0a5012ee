"""`specforge-ext check`: what it says of every recipe; its estimates against what is measured."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from specforge_ext import cli
from specforge_ext.assets import demo_target_path, target_config
from specforge_ext.engines import ENGINES
from specforge_ext.methods import METHODS, EstimatesWork, LimitsDepth, Method
from specforge_ext.records import (
    DTYPES,
    FeatureLayout,
    PackedBatch,
    StepContext,
    TargetWeights,
    lengths_to_cu_seqlens,
)
from specforge_ext.runs.check import META, check, size
from specforge_ext.runs.estimate import Batch, memory, num_parameters
from specforge_ext.runs.recipe import RECIPES, load
from specforge_ext.trainer import Trainer, TrainerConfig, open_world

NAMES = sorted(path.stem for path in RECIPES.glob("*.yaml"))
FACTOR = 1.25
"""Between estimated and measured bytes of activations, either way, when every token is scored."""
SHAPES = {
    "llama3.1-8b-eagle3": (4096, 32, 128256, 12288 + 4096),
    "qwen3-8b-eagle3": (4096, 36, 151936, 12288 + 4096),
    "qwen3-8b-dflash": (4096, 36, 151936, 5 * 4096),
    "qwen3-30b-a3b-eagle3": (2048, 48, 151936, 4 * 2048),
    "kimi-k2-eagle3": (7168, 61, 163840, 4 * 7168),
}
"""Hidden size, layers, vocabulary of the target; values a token of the features."""


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def meta_weights(dtype: str = "float32") -> TargetWeights:
    factory = ENGINES.get("hf")
    weights: TargetWeights = factory.read_weights(
        factory.Config(model="demo", dtype=dtype), device=META, last_layer=True
    )
    return weights


@pytest.fixture(scope="module")
def weights() -> TargetWeights:
    factory = ENGINES.get("hf")
    out: TargetWeights = factory.read_weights(
        factory.Config(model="demo", dtype="float32"), device=torch.device("cpu"), last_layer=True
    )
    return out


@pytest.mark.parametrize("name", NAMES)
def test_shipped_recipes_are_fine(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data").mkdir()
    for split in ("train", "heldout"):
        (tmp_path / "data" / f"{split}.jsonl").write_text("")
    monkeypatch.chdir(tmp_path)
    result = check(load(name, []), ranks=4)
    assert result.problems == ()
    assert result.render().splitlines()[-1] == "OK"
    assert result.memory and all(m.activations > 0 for m in result.memory.values())
    if name in SHAPES:
        hidden, layers, vocab, width = SHAPES[name]
        text = dict(result.facts)
        assert f"hidden {hidden}, {layers} layers" in text["target"]
        assert f"vocabulary {vocab}" in text["target"]
        itemsize = 2
        assert f"{width * itemsize:,} decoded" in text["wire"]
    kimi = name == "kimi-k2-eagle3"
    assert [note for note in result.notes if "kimi_k2" in note] == list(result.notes), result.notes
    assert len(result.notes) == kimi


def test_numbers_of_a_known_draft() -> None:
    """Llama 3.1 8B: fc, a layer of two streams, norms, and a head of 32000 words, by hand."""
    hidden, inner, kv = 4096, 14336, 1024
    layer = 2 * hidden * (hidden + 2 * kv) + hidden * hidden + 3 * hidden * inner + 3 * hidden
    wanted = 3 * hidden * hidden + layer + hidden + 32000 * hidden
    text = dict(check(load("llama3.1-8b-eagle3", [])).facts)
    assert text["draft"].startswith(f"eagle3, {wanted:,} trained parameters, up to ")
    assert text["wire"].startswith(f"{4 * hidden * 2 + 5:,} bytes a token")
    encoded = dict(check(load("llama3.1-8b-eagle3", ["store.encoding=fp8_e4m3_row"])).facts)
    assert encoded["wire"].startswith(f"{4 * hidden + 4 * 4 + 5:,} bytes a token")


def test_shards_shrink_with_ranks_and_nothing_else_of_the_draft() -> None:
    one, four = (check(load("qwen3-8b-eagle3", []), ranks=n).memory[""] for n in (1, 4))
    for part in ("parameters", "gradients", "moments"):
        assert getattr(one, part) == 4 * getattr(four, part)
    for part in ("gathered", "target", "loss"):
        assert getattr(one, part) == getattr(four, part)
    assert one.total == sum(vars(one).values())


def test_checkpointing_saves_activations() -> None:
    for name in ("llama3.1-8b-eagle3", "qwen3-8b-dflash"):
        less, more = (
            check(load(name, [f"trainer.activation_checkpointing={on}"])).memory[""]
            for on in ("true", "false")
        )
        assert less.activations < 0.7 * more.activations


PROBLEMS = {
    ("demo", "method.aux_layer_ids=[2, 9]"): (
        r"method\.aux_layer_ids: wanted ascending ids from 0 to 8, got \[2, 9\]"
    ),
    (
        "demo",
        "method.draft_vocab_size=4096",
    ): (r"method\.draft_vocab_size: wanted 1\.\.2048, got 4096"),
    (
        "demo",
        "method.num_heads=3",
    ): (r"method\.num_heads: wanted a multiple of num_kv_heads 2, got 3"),
    ("demo", "method.intermediate_size=96"): r"method\.warm_start 'target': .*wants \[96, 128\]",
    ("demo", "engine.model=/nowhere"): (
        r"engine\.model: wanted a directory with config\.json, got '/nowhere'"
    ),
    ("demo", "data.train.prefix_tokens=1000"): (
        r"data\.train: wanted prompts of at most 1024 tokens, .*, got up to 1096"
    ),
    ("demo", "store.capacity_bytes=6000000"): (
        r"store\.capacity_bytes: wanted at least \d+ for 3 steps of 1024 tokens .*, got 6000000"
    ),
    ("demo-dflash", "method.mask_token_id=2048"): (
        r"method\.mask_token_id: wanted less than 2048, got 2048"
    ),
    ("kimi-k2-eagle3", "method.rope_scaling=target"): (
        r"method\.rope_scaling\.rope_type: wanted one of .*, got 'yarn'"
    ),
    ("kimi-k2-eagle3", "method.warm_start=target"): (
        r"method\.warm_start 'target': wanted 'input_layernorm.weight' of the target's last layer"
    ),
}


@pytest.mark.parametrize(("name", "assignment"), PROBLEMS)
def test_problems_carry_their_key(
    name: str, assignment: str, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = PROBLEMS[name, assignment]
    result = check(load(name, [assignment]))
    assert len(result.problems) == 1, result.problems
    with pytest.raises(ValueError, match=wanted):
        raise ValueError(result.problems[0])
    assert cli.main(["check", name, assignment]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "1 problem(s)"


def test_several_problems_are_all_said() -> None:
    result = check(load("demo", ["data.train.prefix_tokens=1000", "method.aux_layer_ids=[9]"]))
    assert [text.split(":")[0] for text in result.problems] == [
        "data.train",
        "method.aux_layer_ids",
    ]


NOTES = {
    "store.capacity_bytes=6600000": r"1536 tokens .*; the last step of an epoch may be that large",
    "order.batch_tokens=100": r"order\.batch_tokens: is 100; a prompt of up to 128 tokens does not",
    "order.micro_batch_tokens=64": r"order\.micro_batch_tokens: is 64; a prompt of up to 128",
}


@pytest.mark.parametrize("assignment", NOTES)
def test_notes(assignment: str) -> None:
    result = check(load("demo", [assignment]))
    assert result.problems == ()
    with pytest.raises(ValueError, match=NOTES[assignment]):
        raise ValueError(" ".join(result.notes))


def test_data_that_is_not_here(tmp_path: Path) -> None:
    """A note: the recipe may be for another machine."""
    paths = f"data.heldout={{kind: jsonl, paths: [{tmp_path}/gone]}}"
    result = check(load("demo", [paths]))
    assert result.problems == ()
    assert result.notes == (
        f"data.heldout.paths: wanted a JSONL file, found none at '{tmp_path}/gone'",
    )


def test_depth_is_refused_before_training() -> None:
    """By whatever reads the recipe, the run as well."""
    with pytest.raises(
        ValueError, match=r"evaluate\.depth: wanted at most 5, which is what dflash .*, got 6"
    ):
        load("demo-dflash", ["evaluate.depth=6"])
    load("demo-dflash", ["evaluate.depth=5"])
    load("demo-dflash", ["evaluate.depth=6", "evaluate.num_prompts=0"])
    with pytest.raises(ValueError, match=r"at most 4, which is what peagle proposes"):
        load("demo-peagle", ["evaluate.depth=5"])
    load("demo", ["evaluate.depth=30"])


def test_what_methods_say_of_depth_is_what_their_drafters_do(weights: TargetWeights) -> None:
    for name in METHODS:
        method: Method = METHODS.get(name)(METHODS.get(name).Config(**SMALL.get(name, {})))
        if not isinstance(method, LimitsDepth):
            continue
        vocab = method.vocab([], weights.spec)
        drafter = method.drafter(method.build(weights, vocab, seed=0))
        drafter.start(1, 4)
        layout = method.layout(weights.spec)
        ones = torch.ones(1, 2, dtype=torch.int64)
        features = {f.name: torch.zeros(1, 2, f.width) for f in layout.features}
        drafter.observe(ones, features, torch.arange(2)[None], ones.bool())
        most = method.max_depth
        proposed = drafter.propose(most, temperature=0, generator=None)
        assert proposed.tokens.shape == (1, most)
        with pytest.raises(ValueError, match=f"{most}"):
            drafter.propose(most + 1, temperature=0, generator=None)


def test_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check", "demo", "--ranks", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split(maxsplit=1) == ["recipe", "demo, 2 rank(s)"]
    assert lines[-1] == "OK"
    assert cli.main(["check", "demo", "trainr.lr=1"]) == 2
    assert "problem: unknown key 'trainr'" in capsys.readouterr().err
    assert cli.main(["check", "--ranks", "0"]) == 2
    assert "--ranks: wanted 1 or more, got 0" in capsys.readouterr().err


def test_shape_alone_equals_that_of_the_weights(weights: TargetWeights) -> None:
    meta = meta_weights()
    # generation_config.json may add end tokens; drafts do not depend on them.
    assert vars(meta.spec) | {"eos_token_ids": ()} == vars(weights.spec) | {"eos_token_ids": ()}
    for name in ("embed_tokens", "lm_head", "final_norm"):
        ours, theirs = getattr(meta, name), getattr(weights, name)
        assert ours.is_meta and (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
    assert {n: (t.shape, t.dtype) for n, t in meta.last_layer.items()} == {
        n: (t.shape, t.dtype) for n, t in weights.last_layer.items()
    }


def test_a_directory_needs_no_weights(tmp_path: Path) -> None:
    shutil.copy(demo_target_path() / "config.json", tmp_path / "config.json")
    result = check(load("demo", [f"engine.model={tmp_path}"]))
    assert result.problems == ()
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "vocab_size": 3000}))
    assert "vocabulary 3000" in check(load("demo", [f"engine.model={tmp_path}"])).render()


def test_public_configs_name_their_source() -> None:
    for name in ("Qwen/Qwen3-8B", "Qwen/Qwen3-30B-A3B", "moonshotai/Kimi-K2-Instruct-0905"):
        config = target_config(name)
        assert config is not None and "config.json" in str(config["source"])
    assert target_config("nobody/nothing") is None


def test_sizes_are_readable() -> None:
    assert [size(n) for n in (0, 1023, 1024, 3 << 29, 5 << 40, 5 << 50)] == [
        "0 B", "1023 B", "1.00 KiB", "1.50 GiB", "5.00 TiB", "5120.00 TiB",
    ]  # fmt: skip


# What follows measures.

SMALL: dict[str, dict[str, Any]] = {
    "eagle3": {"draft_vocab_size": 2048, "ttt_length": 3},
    "peagle": {"draft_vocab_size": 2048, "num_depths": 4},
    "dflash": {"num_layers": 2, "layer_ids": [2, 5, 7], "num_anchors": 64, "block_size": 6},
    "domino": {
        **{"num_layers": 2, "layer_ids": [2, 5, 7], "num_anchors": 64, "block_size": 6},
        **{"gru_hidden_dim": 128, "emb_dim": 64},
    },
    "dspark": {
        **{"num_layers": 2, "layer_ids": [2, 5, 7], "num_anchors": 64, "block_size": 6},
        "markov_rank": 64,
    },
    "mtp": {},
}
OPTIONS = [
    ("eagle3", {}),
    ("eagle3", {"ttt_length": 1, "num_layers": 2}),
    ("peagle", {}),
    ("dflash", {}),
    ("dflash", {"num_layers": 1, "num_anchors": 16, "block_size": 12}),
    ("domino", {}),
    ("domino", {"num_layers": 1, "gru_hidden_dim": 256}),
    ("dspark", {}),
    ("dspark", {"num_layers": 1, "markov_head": "gated"}),
    ("dspark", {"num_layers": 1, "markov_head": "rnn"}),
    ("mtp", {}),
    ("mtp", {"num_steps": 1, "loss": "labels"}),
]
LENGTH = 128


def batch(layout: FeatureLayout, num_samples: int) -> PackedBatch:
    """Every token but the last of a sample is scored."""
    lengths = (LENGTH,) * num_samples
    generator = torch.Generator().manual_seed(0)
    total = sum(lengths)
    return PackedBatch(
        sample_ids=tuple(f"s{i}" for i in range(num_samples)),
        lengths=lengths,
        input_ids=torch.randint(2048, (total,), generator=generator),
        loss_mask=torch.tensor([1] * (LENGTH - 1) + [0], dtype=torch.uint8).repeat(num_samples),
        positions=torch.arange(LENGTH).repeat(num_samples),
        features={
            f.name: torch.randn(total, f.width, generator=generator).to(DTYPES[f.dtype])
            for f in layout.features
        },
        cu_seqlens=lengths_to_cu_seqlens(lengths),
    )


def saved_bytes(method: Method, weights: TargetWeights, num_samples: int, *, bf16: bool) -> int:
    """Of all tensors that autograd keeps; parameters, the target's and the batch's left out."""
    draft = method.build(weights, method.vocab([], weights.spec), seed=0)
    if bf16:  # as FSDP2 hands them to the forward
        draft.to(torch.bfloat16)
    data = batch(method.layout(weights.spec), num_samples)
    given = {t.untyped_storage().data_ptr() for t in (*draft.parameters(), *draft.buffers())}
    given |= {t.untyped_storage().data_ptr() for t in data.features.values()}
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    autocast = torch.autocast("cpu", dtype=torch.bfloat16) if bf16 else nullcontext()
    with autocast, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        method.step(draft, data, StepContext(0, 1, 0))
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    return sum(n for address, n in storages.items() if address not in given)


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("name", "more"), OPTIONS)
def test_activations_are_as_estimated(
    name: str, more: dict[str, Any], bf16: bool, weights: TargetWeights
) -> None:
    """What two samples more keep, so that constants (a head's gradient, tables) fall out."""
    method: Method = METHODS.get(name)(METHODS.get(name).Config(**{**SMALL[name], **more}))
    assert isinstance(method, EstimatesWork)
    if bf16:
        weights = TargetWeights(
            spec=weights.spec,
            embed_tokens=weights.embed_tokens.bfloat16(),
            lm_head=weights.lm_head.bfloat16(),
            final_norm=weights.final_norm,
            last_layer={name: x.bfloat16() for name, x in weights.last_layer.items()},
        )
    few, many = (saved_bytes(method, weights, n, bf16=bf16) for n in (2, 4))
    work = method.work(
        weights.spec, tokens=2 * LENGTH, longest=LENGTH, itemsize=2 if bf16 else 4, recompute=False
    )
    assert (many - few) / FACTOR <= work.saved_bytes <= FACTOR * (many - few), work.saved_bytes / (
        many - few
    )
    assert few - (many - few) <= FACTOR * work.head_bytes + (1 << 20)


class NoData:
    total_steps = 1

    def iterate(self, start_step: int) -> Iterator[Any]:
        return iter(())


@pytest.mark.parametrize("name", sorted(SMALL))
def test_parameters_optimizer_and_target_are_exact(
    name: str, weights: TargetWeights, tmp_path: Path
) -> None:
    method: Method = METHODS.get(name)(METHODS.get(name).Config(**SMALL[name]))
    meta = meta_weights()
    vocab = method.vocab([], meta.spec)
    with META:
        sizes = method.build(meta, vocab, seed=0)
    shape = Batch(tokens=LENGTH, longest=LENGTH, held=1, feature_bytes=4)
    config = TrainerConfig()
    estimate = memory(method, sizes, meta, config, shape, ranks=1, device=torch.device("cpu"))
    draft = method.build(weights, method.vocab([], weights.spec), seed=0)
    assert num_parameters(sizes) == num_parameters(draft)
    # The demo's head is its embedding.
    assert weights.lm_head.data_ptr() == weights.embed_tokens.data_ptr()
    frozen = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for t in (
            *draft.buffers(), weights.embed_tokens, weights.lm_head, weights.final_norm,
        )
    }  # fmt: skip
    assert estimate.target == sum(frozen.values())
    with open_world(device="cpu", timeout_s=30) as world:
        trainer = Trainer(config, method, draft, NoData(), output_dir=tmp_path, world=world)
        tensors = trainer._tensors()
        held = {
            kind: sum(t.nbytes for n, t in tensors.items() if n.startswith(kind))
            for kind in ("draft.", "optimizer.")
        }
    assert (estimate.parameters, estimate.moments) == (held["draft."], held["optimizer."])
    assert estimate.gradients == estimate.parameters
