"""The engine `hf` against transformers itself, on tiny random models of both families."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from specforge_ext.config import parse
from specforge_ext.engines import ENGINES
from specforge_ext.engines.base import TargetOutput
from specforge_ext.engines.columns import Visibility
from specforge_ext.engines.feature_batches import plan_batches
from specforge_ext.engines.generate import choose, noise
from specforge_ext.engines.hf import HfConfig, HfDecoder, HfEngine
from specforge_ext.engines.hf_columns import TransformersModel
from specforge_ext.engines.hf_model import spec_of, wrap_model
from specforge_ext.engines.lean import LeanModel, why_not_lean
from specforge_ext.records import FeatureLayout, FeatureSpec, Prompt

VOCAB, HIDDEN, LAYERS = 61, 32, 5
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.15,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def llama() -> Any:
    return LlamaForCausalLM(LlamaConfig(**SHAPE, head_dim=8, rope_parameters=dict(LLAMA3_ROPE)))


def qwen3() -> Any:
    return Qwen3ForCausalLM(Qwen3Config(**SHAPE, head_dim=16, tie_word_embeddings=True))


def mistral(*, window: int = 100) -> Any:
    return MistralForCausalLM(MistralConfig(**SHAPE, head_dim=8, sliding_window=window))


def randomised(build: Callable[[], Any]) -> Any:
    """A model whose norms are not all ones, so that a forgotten norm shows."""
    torch.manual_seed(0)
    model = build().eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter.data, 0.5, 1.5)
    return model


@pytest.fixture(scope="module", params=[llama, qwen3, mistral], ids=lambda f: f.__name__)
def model(request: pytest.FixtureRequest) -> Any:
    return randomised(request.param)


@pytest.fixture(scope="module")
def engine(model: Any) -> HfEngine:
    config = HfConfig(
        model="tiny", dtype="float32", max_batch_tokens=40, generate_batch_size=4, device="cpu"
    )
    return HfEngine(wrap_model(model, name="tiny"), config)


def layout(*, dtype: str = "float32") -> FeatureLayout:
    return FeatureLayout(
        (
            FeatureSpec("aux", (3, 0, 2), 3 * HIDDEN, dtype),
            FeatureSpec("raw", (LAYERS,), HIDDEN, dtype),
            FeatureSpec("last", (LAYERS,), HIDDEN, dtype, final_norm=True),
        )
    )


def prompts(lengths: list[int], seed: int = 0) -> list[Prompt]:
    generator = torch.Generator().manual_seed(seed)
    return [
        Prompt(
            f"{seed}-{i}",
            torch.randint(VOCAB, (n,), generator=generator, dtype=torch.int32),
            torch.ones(n, dtype=torch.uint8),
        )
        for i, n in enumerate(lengths)
    ]


def prefixes(lengths: list[int], seed: int = 0) -> list[Tensor]:
    return [prompt.input_ids for prompt in prompts(lengths, seed)]


def greedy(model: Any, prefix: Tensor, num_tokens: int) -> list[int]:
    """The definition: a full forward for every token, no cache."""
    ids = prefix.to(torch.int64)[None]
    for _ in range(num_tokens):
        with torch.no_grad():
            ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], dim=1)
    return ids[0, len(prefix) :].tolist()


def reference_features(model: Any, prompt: Prompt) -> dict[str, Tensor]:
    raw: list[Tensor] = []
    hook = model.model.layers[-1].register_forward_hook(lambda _m, _a, out: raw.append(out))
    with torch.no_grad():
        out = model(input_ids=prompt.input_ids.long()[None], output_hidden_states=True)
    hook.remove()
    states = [state[0] for state in out.hidden_states]
    return {
        "aux": torch.cat([states[3], states[0], states[2]], dim=-1),
        "raw": raw[0][0],
        "last": states[-1],
    }


def assert_near(got: Tensor, wanted: Tensor, tolerance: float) -> None:
    """Rounding grows with the residual stream: errors are relative to its largest value."""
    assert got.shape == wanted.shape
    assert float((got - wanted).abs().max() / wanted.abs().max()) <= tolerance


# Features


def test_features_equal_the_hidden_states_of_transformers(model: Any, engine: HfEngine) -> None:
    given = prompts([7, 1, 30, 8, 19, 64, 2, 3])  # 64: longer than max_batch_tokens; 1: one row
    samples = list(engine.features(given, layout()))
    assert [s.prompt.sample_id for s in samples] == [p.sample_id for p in given]
    for prompt, sample in zip(given, samples, strict=True):
        for name, wanted in reference_features(model, prompt).items():
            assert_near(sample.features[name], wanted, 1e-6)


def test_features_are_of_the_layout_and_own_their_memory(engine: HfEngine) -> None:
    for sample in engine.features(prompts([5, 9]), layout(dtype="bfloat16")):
        for spec in layout().features:
            tensor = sample.features[spec.name]
            assert tensor.shape == (len(sample.prompt), spec.width)
            assert tensor.dtype == torch.bfloat16
            assert tensor.is_contiguous() and not tensor.requires_grad
            assert tensor.untyped_storage().nbytes() == tensor.numel() * 2


def test_features_repeat_bit_for_bit(engine: HfEngine) -> None:
    given = prompts([7, 3, 30, 8, 19])
    first, second = (list(engine.features(given, layout())) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert all(torch.equal(a.features[name], b.features[name]) for name in a.features)


def test_alone_in_its_batch_a_prompt_does_not_feel_the_others(model: Any) -> None:
    config = HfConfig(model="tiny", max_batch_tokens=1)
    engine = HfEngine(wrap_model(model, name="tiny"), config)
    given = prompts([9, 9, 4])
    together = list(engine.features(given, layout()))
    alone = [next(engine.features([prompt], layout())) for prompt in given]
    for a, b in zip(together, alone, strict=True):
        assert all(torch.equal(a.features[name], b.features[name]) for name in a.features)


def test_first_sample_comes_before_the_last_is_computed(
    engine: HfEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    forwards = 0
    original = type(engine._target).last_hidden

    def counted(self: Any, input_ids: Tensor, **kwargs: Any) -> Tensor:
        nonlocal forwards
        forwards += 1
        return original(self, input_ids, **kwargs)

    monkeypatch.setattr(type(engine._target), "last_hidden", counted)
    stream = engine.features(prompts([20] * 10), layout())
    next(stream)
    assert forwards == 1
    list(stream)
    assert forwards == 5


def test_plan_holds_every_prompt_once_within_the_limit() -> None:
    rng = random.Random(0)
    for _ in range(50):
        lengths = [rng.randint(1, 30) for _ in range(rng.randint(0, 40))]
        batches = plan_batches(lengths, 32)
        assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
        assert all(len(b) == 1 or len(b) * max(lengths[i] for i in b) <= 32 for b in batches)
        assert [min(b) for b in batches] == sorted(min(b) for b in batches)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (FeatureSpec("aux", (1, 2), 2, "float32"), r"layout.aux.width: wanted 64 \(2 layers of 32"),
        (FeatureSpec("aux", (6,), HIDDEN, "float32"), r"layout.aux.layer_ids: wanted 0..5"),
        (FeatureSpec("aux", (1,), HIDDEN, "float32", True), r"final_norm: wanted layer_ids \(5,\)"),
    ],
)
def test_layout_that_the_target_cannot_give(
    engine: HfEngine, spec: FeatureSpec, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        engine.features(prompts([3]), FeatureLayout((spec,)))
    with pytest.raises(ValueError, match=message):
        engine.decoder().start(1, FeatureLayout((spec,)))


def test_prompts_that_do_not_fit_are_refused_at_once(engine: HfEngine) -> None:
    with pytest.raises(ValueError, match=r"0-0: wanted 1..128 tokens .* got 129"):
        engine.features(prompts([129]), layout())
    with pytest.raises(ValueError, match=r"0-0: wanted 1..128 tokens .* got 0"):
        engine.features(prompts([0]), layout())
    outside = Prompt(
        "x", torch.tensor([3, 61], dtype=torch.int32), torch.ones(2, dtype=torch.uint8)
    )
    with pytest.raises(ValueError, match=r"x: wanted token ids in 0..60, got 3..61"):
        engine.features([outside], layout())


# Generation


def test_greedy_text_is_that_of_transformers(model: Any, engine: HfEngine) -> None:
    given = prefixes([5, 5, 1, 9, 5, 5, 5, 5, 13])  # batches of 4: ragged ones and an even one
    texts = engine.generate(given, max_new_tokens=12, temperature=0, seed=0, stop_at_eos=False)
    assert [t.tolist() for t in texts] == [greedy(model, p, 12) for p in given]
    assert all(t.dtype == torch.int32 for t in texts)


def test_text_ends_with_the_end_token(model: Any) -> None:
    target = wrap_model(model, name="tiny")
    ends = (2, 3, 5)
    target = replace(target, spec=replace(target.spec, eos_token_ids=ends))
    engine = HfEngine(target, HfConfig(model="tiny", generate_batch_size=8))
    given = prefixes([4, 6, 6, 3, 8, 2] * 4, seed=1)
    long = engine.generate(given, max_new_tokens=60, temperature=2.0, seed=3, stop_at_eos=False)
    short = engine.generate(given, max_new_tokens=60, temperature=2.0, seed=3)
    num_ended = 0
    for whole, cut in zip(long, short, strict=True):
        said = whole.tolist()
        end = next((i for i, token in enumerate(said) if token in ends), None)
        num_ended += end is not None
        assert cut.tolist() == (said if end is None else said[: end + 1])
    assert num_ended > len(given) // 3


def test_text_does_not_depend_on_the_company(model: Any) -> None:
    given = prefixes([4, 9, 9, 4, 7, 1], seed=2)
    target = wrap_model(model, name="tiny")

    def texts(batch: int, order: list[int]) -> list[list[int]]:
        engine = HfEngine(target, HfConfig(model="tiny", generate_batch_size=batch))
        shuffled = [given[i] for i in order]
        out = engine.generate(shuffled, max_new_tokens=15, temperature=0.8, seed=5)
        return [out[order.index(i)].tolist() for i in range(len(given))]

    forward = list(range(6))
    assert texts(1, forward) == texts(2, forward[::-1]) == texts(6, [3, 1, 5, 0, 2, 4])


def test_equal_prefixes_and_other_seeds_give_other_text(engine: HfEngine) -> None:
    prefix = prefixes([6])[0]
    out = engine.generate([prefix] * 3, max_new_tokens=20, temperature=1.0, seed=0)
    again = engine.generate([prefix] * 3, max_new_tokens=20, temperature=1.0, seed=0)
    other = engine.generate([prefix], max_new_tokens=20, temperature=1.0, seed=1)
    texts = [tuple(t.tolist()) for t in out]
    assert len(set(texts)) == 3
    assert texts == [tuple(t.tolist()) for t in again]
    assert tuple(other[0].tolist()) not in texts


def test_choose_follows_the_distribution() -> None:
    logits = torch.tensor([1.0, -torch.inf, 0.0, 2.0])
    uniform = (torch.arange(10000, dtype=torch.float64) + 0.5) / 10000
    drawn = choose(logits.expand(10000, 4), 0.7, uniform)
    shares = torch.bincount(drawn, minlength=4) / 10000
    torch.testing.assert_close(shares, torch.softmax(logits / 0.7, -1), atol=2e-4, rtol=0)
    edges = choose(logits.expand(2, 4), 0.7, torch.tensor([0.0, 1.0], dtype=torch.float64))
    assert edges.tolist() == [0, 3]
    assert choose(logits[None], 0, uniform[:1]).tolist() == [3]


def test_noise_depends_on_prefix_and_seed_alone() -> None:
    a, b = prefixes([5, 6])
    rows = noise([a, b, a], 8, seed=1)
    assert torch.equal(rows[1], noise([b], 8, seed=1)[0])
    assert torch.equal(rows[0], noise([b, a.long()], 8, seed=1)[1])
    assert not torch.equal(rows[0], rows[2])
    assert not torch.equal(rows[0], noise([a], 8, seed=2)[0])


def test_no_prefixes_no_text(engine: HfEngine) -> None:
    assert engine.generate([], max_new_tokens=3, temperature=0, seed=0) == []


def test_generate_refuses_what_makes_no_sense(engine: HfEngine) -> None:
    given = prefixes([5])
    with pytest.raises(ValueError, match="temperature: wanted 0 or more, got -1"):
        engine.generate(given, max_new_tokens=1, temperature=-1, seed=0)
    with pytest.raises(ValueError, match="max_new_tokens: wanted 1 or more, got 0"):
        engine.generate(given, max_new_tokens=0, temperature=0, seed=0)
    with pytest.raises(
        ValueError, match=r"prefixes\[0\]: wanted 1..4 tokens .*124 to come.* got 5"
    ):
        engine.generate(given, max_new_tokens=124, temperature=0, seed=0)


# Cached decoding


def decode_with_holes(decoder: Any, model: Any, given: list[Tensor], num_tokens: int) -> None:
    """Greedy decoding where each round appends wrong guesses that are dropped, at uneven speeds.

    Checks every token and every kept feature row against full forwards without a cache.
    """
    rng = random.Random(7)
    batch, width = len(given), max(map(len, given))
    decoder.start(batch, layout())
    valid = torch.arange(width) < torch.tensor([len(p) for p in given])[:, None]
    ids = torch.nn.utils.rnn.pad_sequence([p.long() for p in given], True)
    out = decoder.forward(ids, torch.arange(width).expand(batch, width), valid)
    assert out.logits.dtype == torch.float32 and out.logits.shape == (batch, width, VOCAB)
    rows = [{k: v[b][valid[b]] for k, v in out.features.items()} for b in range(batch)]
    texts = [p.tolist() for p in given]
    nexts = [int(out.logits[b, len(given[b]) - 1].argmax()) for b in range(batch)]
    while min(len(t) - len(p) for t, p in zip(texts, given, strict=True)) < num_tokens:
        # Columns of a round: 1 or 2 true tokens, and wrong guesses after them at true positions.
        kept = [rng.randint(0, 2) for _ in range(batch)]
        tokens = torch.randint(VOCAB, (batch, 3))
        positions = torch.tensor([[len(t) + j for j in range(3)] for t in texts])
        keep = torch.arange(3) < torch.tensor(kept)[:, None]
        for b in range(batch):
            truth = greedy(model, torch.tensor(texts[b]), 2)
            assert truth[0] == nexts[b]
            tokens[b, : kept[b]] = torch.tensor(truth[: kept[b]])
        # A row that keeps none leaves its first column to padding now and then.
        valid = torch.ones(batch, 3, dtype=torch.bool)
        valid[:, 2] = torch.tensor([rng.random() < 0.5 for _ in range(batch)])
        out = decoder.forward(tokens, positions, valid)
        decoder.drop(keep)
        for b, num in enumerate(kept):
            if num:
                texts[b] += tokens[b, :num].tolist()
                nexts[b] = int(out.logits[b, num - 1].argmax())
                rows[b] = {k: torch.cat([v, out.features[k][b, :num]]) for k, v in rows[b].items()}
    for b, text in enumerate(texts):
        whole = Prompt("", torch.tensor(text, dtype=torch.int32), torch.ones(len(text)).byte())
        for name, wanted in reference_features(model, whole).items():
            assert_near(rows[b][name], wanted, 5e-6)


def test_decoding_with_holes_is_plain_greedy(model: Any, engine: HfEngine) -> None:
    torch.manual_seed(1)
    decode_with_holes(engine.decoder(), model, prefixes([4, 7, 1]), 8)


def test_transformers_path_decodes_the_lean_families_too(model: Any) -> None:
    torch.manual_seed(1)
    target = wrap_model(model, name="tiny")
    decode_with_holes(HfDecoder(TransformersModel(target), target), model, prefixes([4, 7]), 5)


@pytest.mark.parametrize("build", [llama, qwen3])
def test_lean_forward_equals_transformers(build: Callable[[], Any]) -> None:
    model = randomised(build)
    target = wrap_model(model, name="tiny")
    assert why_not_lean(target) is None
    ids, positions = torch.randint(VOCAB, (3, 20)), torch.arange(20).expand(3, 20)
    lean = LeanModel(target)
    lean.start(3, 2)  # too small: the cache must grow
    with torch.no_grad():
        wanted = model.model(input_ids=ids).last_hidden_state
        parts = [lean.append(ids[:, :12], positions[:, :12], mask=None).last_hidden]
        for i in range(12, 20):
            out = lean.append(ids[:, i : i + 1], positions[:, i : i + 1], mask=None)
            parts.append(out.last_hidden)
    assert_near(torch.cat(parts, 1), wanted, 5e-6)
    with pytest.raises(ValueError, match="mask: wanted one for several columns"):
        lean.append(ids[:, :2], positions[:, :2], mask=None)


def test_what_stands_in_invalid_columns_changes_nothing(engine: HfEngine) -> None:
    outs = []
    for filler in (0, 60):
        decoder = engine.decoder()
        decoder.start(1, layout())
        ids = torch.tensor([[5, filler, 9, filler, 11]])
        valid = torch.tensor([[True, False, True, False, True]])
        outs.append(decoder.forward(ids, torch.tensor([[0, 40, 1, 7, 2]]), valid))
    assert torch.equal(outs[0].logits[:, ::2], outs[1].logits[:, ::2])
    assert outs[0].logits.isfinite().all()


@pytest.mark.parametrize("lean", [True, False])
def test_selected_sequences_go_on_as_if_alone(model: Any, engine: HfEngine, lean: bool) -> None:
    """Bit for bit, but for how matrix products of another number of rows round."""
    target = wrap_model(model, name="tiny")

    def decoder() -> Any:
        return engine.decoder() if lean else HfDecoder(TransformersModel(target), target)

    ids, columns = torch.randint(VOCAB, (4, 9)), torch.arange(9)
    valid = columns < torch.tensor([[5], [6], [2], [6]])
    rows = torch.tensor([0, 2])
    some, alone = decoder(), decoder()
    for one, chosen in ((some, slice(None)), (alone, rows)):
        one.start(len(ids[chosen]), layout())
        given = ids[chosen, :6], columns[:6].expand(4, -1)[chosen], valid[chosen, :6]
        one.forward(*given)
        one.drop(given[2] & (columns[:6] != 4))
    some.select(rows)
    places = torch.tensor([[4, 5, 6], [2, 3, 4]])
    given = ids[rows, 6:], places, torch.ones(2, 3, dtype=torch.bool)
    got, wanted = some.forward(*given), alone.forward(*given)
    some.drop(given[2])
    assert_near(got.logits, wanted.logits, 1e-6)
    for name, feature in wanted.features.items():
        assert_near(got.features[name], feature, 1e-6)


def test_drop_of_more_columns_than_there_are() -> None:
    visible = Visibility(2, torch.device("cpu"))
    visible.append(torch.ones(2, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="keep: wanted at most 3 columns, got 4"):
        visible.drop(torch.ones(2, 4, dtype=torch.bool))


def test_sliding_window_is_refused_beyond_the_window() -> None:
    model = randomised(lambda: mistral(window=40))
    engine = HfEngine(wrap_model(model, name="tiny"), HfConfig(model="tiny"))
    with pytest.raises(ValueError, match=r"at most sliding_window = 40 columns .* got 41"):
        engine.generate(prefixes([36]), max_new_tokens=10, temperature=0, seed=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")
def test_cuda_equals_cpu(model: Any) -> None:
    given = prefixes([5, 9, 9, 3])
    engines = [
        HfEngine(wrap_model(copy.deepcopy(model).to(d), name=d), HfConfig(model="tiny"))
        for d in ("cpu", "cuda")
    ]
    texts = [e.generate(given, max_new_tokens=12, temperature=0, seed=0) for e in engines]
    assert [t.tolist() for t in texts[0]] == [t.tolist() for t in texts[1]]
    pairs = zip(*(e.features(prompts([7, 20, 3]), layout()) for e in engines), strict=True)
    for host, device in pairs:
        for name, wanted in host.features.items():
            assert device.features[name].is_cuda
            assert_near(device.features[name].cpu(), wanted, 1e-4)
    decode_with_holes(OnHost(engines[1].decoder()), model, given[:2], 6)


class OnHost:
    """A decoder whose outputs come back to the CPU."""

    def __init__(self, decoder: Any) -> None:
        self.start, self.drop, self._decoder = decoder.start, decoder.drop, decoder

    def forward(self, *args: Tensor) -> TargetOutput:
        out = self._decoder.forward(*args)
        return TargetOutput(out.logits.cpu(), {k: v.cpu() for k, v in out.features.items()})


def test_the_way_of_decoding_is_logged(model: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="specforge_ext.engines.hf"):
        HfEngine(wrap_model(model, name="tiny"), HfConfig(model="tiny"))
    kind = model.config.model_type
    wanted = "by transformers: model_type 'mistral' is none of llama, qwen3"
    assert (wanted if kind == "mistral" else "tiny is decoded by the lean forward") in caplog.text


def test_outputs_may_enter_autograd(engine: HfEngine) -> None:
    """Inference tensors could not be saved for a backward pass."""
    text = engine.generate(prefixes([3]), max_new_tokens=2, temperature=0, seed=0)[0]
    sample = next(engine.features(prompts([3]), layout()))
    decoder = engine.decoder()
    decoder.start(1, layout())
    out = decoder.forward(*(torch.zeros(1, 1, dtype=torch.int64),) * 2, torch.ones(1, 1).bool())
    for tensor in (text, *sample.features.values(), out.logits, *out.features.values()):
        assert not tensor.is_inference() and not tensor.requires_grad


# Opening


def test_open_from_a_directory(model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    config = parse(HfConfig, {"model": str(tmp_path), "dtype": "bfloat16", "device": "cpu"})
    engine = ENGINES.get("hf").open(config)
    spec = engine.spec
    assert (spec.vocab_size, spec.hidden_size, spec.num_layers) == (VOCAB, HIDDEN, LAYERS)
    assert (spec.num_heads, spec.num_kv_heads) == (4, 2)
    assert (spec.dtype, spec.bos_token_id, spec.eos_token_ids) == ("bfloat16", 1, (2,))
    assert spec.head_dim == model.config.head_dim
    engine.generate(prefixes([5]), max_new_tokens=2, temperature=0, seed=0)


def test_weights_are_the_models_own(model: Any, engine: HfEngine) -> None:
    weights = engine.weights(device=torch.device("cpu"), last_layer=True)
    assert torch.equal(weights.embed_tokens, model.model.embed_tokens.weight)
    assert torch.equal(weights.lm_head, model.lm_head.weight)
    assert torch.equal(weights.final_norm, model.model.norm.weight)
    assert weights.last_layer.keys() == model.model.layers[-1].state_dict().keys()
    assert "self_attn.q_proj.weight" in weights.last_layer
    assert not weights.lm_head.requires_grad
    assert engine.weights(device=torch.device("cpu")).last_layer == {}
    hidden = next(engine.features(prompts([6]), layout())).features
    with torch.no_grad():
        logits = model(input_ids=prompts([6])[0].input_ids.long()[None]).logits[0]
    torch.testing.assert_close(hidden["last"] @ weights.lm_head.T, logits, atol=1e-4, rtol=1e-4)


def test_spec_keeps_the_rope_scaling() -> None:
    spec = wrap_model(randomised(llama), name="tiny").spec
    assert spec.rope_theta == 10000.0
    assert spec.rope_scaling == {k: v for k, v in LLAMA3_ROPE.items() if k != "rope_theta"}
    assert wrap_model(randomised(qwen3), name="tiny").spec.rope_scaling is None


def test_spec_reads_the_old_spelling_of_rope() -> None:
    old = AutoConfig.for_model("llama", **SHAPE)
    values = {**old.to_dict(), "rope_theta": 5e5, "model_type": "llama"}
    del values["rope_parameters"]

    class OldConfig:
        def __init__(self, **values: Any) -> None:
            self.__dict__.update(values)

    scaled = OldConfig(**values, rope_scaling={"type": "linear", "factor": 2.0})
    spec = spec_of(scaled, name="old", dtype=torch.float32, eos=())
    assert (spec.rope_theta, spec.rope_scaling) == (5e5, {"rope_type": "linear", "factor": 2.0})
    plain = spec_of(OldConfig(**values, rope_scaling=None), name="o", dtype=torch.float32, eos=())
    assert plain.rope_scaling is None
    with pytest.raises(ValueError, match="wanted 'rope_theta'"):
        spec_of(OldConfig(vocab_size=3), name="old", dtype=torch.float32, eos=())


def test_open_refuses_with_the_reason(tmp_path: Path) -> None:
    def opened(model: str, device: str = "cpu") -> None:
        HfEngine.open(HfConfig(model=model, device=device))

    with pytest.raises(ValueError, match=r"model: wanted a directory with config.json, got '/no/"):
        opened("/no/such/model")
    with pytest.raises(ValueError, match="model: wanted a directory"):
        opened(str(tmp_path))
    randomised(qwen3).config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"model: wanted a directory or a hub name .*(?s:.*)"):
        opened(str(tmp_path))
    with pytest.raises(ValueError, match=r"wanted auto, cpu or cuda.*, got 'abacus'"):
        opened(str(tmp_path), device="abacus")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="device: wanted 'cuda', but torch finds no CUDA"):
            opened(str(tmp_path), device="cuda")


def test_unfit_architectures_are_named() -> None:
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=11, n_embd=8, n_layer=2, n_head=2))
    with pytest.raises(ValueError, match="model 'gpt2': wanted 'rope_theta'"):
        wrap_model(gpt2, name="gpt2")

    class Scaled(Qwen3ForCausalLM):  # type: ignore[misc]
        def forward(self, **kwargs: Any) -> Any:
            out = super().forward(**kwargs)
            out.logits = 2 * out.logits
            return out

    with pytest.raises(ValueError, match=r"wanted logits equal to lm_head\(norm\(h\)\)"):
        wrap_model(Scaled(Qwen3Config(**SHAPE)), name="scaled")
    broken = randomised(qwen3)
    broken.model.norm = torch.nn.LayerNorm(HIDDEN)
    with pytest.raises(ValueError, match=r"wanted an RMSNorm named 'norm' .* got LayerNorm"):
        wrap_model(broken, name="layernorm")


def test_config_is_checked() -> None:
    with pytest.raises(ValueError, match=r"dtype: Input should be .* got 'int4'"):
        parse(HfConfig, {"model": "m", "dtype": "int4"})
    with pytest.raises(ValueError, match="unknown key 'generate_batchsize'"):
        parse(HfConfig, {"model": "m", "generate_batchsize": 3})
