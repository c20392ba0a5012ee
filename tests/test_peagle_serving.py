"""P-EAGLE after training: decoding, exported checkpoints, settings."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import eagle3_cases as cases
import peagle_cases as peagle
from specforge_ext.config import parse
from specforge_ext.methods import METHODS, Method
from specforge_ext.methods.peagle import PEagleConfig, PEagleMethod
from specforge_ext.methods.peagle.drafter import PEagleDrafter
from specforge_ext.methods.peagle.model import PEagleDraft
from specforge_ext.records import DraftCheckpoint, PackedBatch, TargetWeights

DEPTH = 6


def test_the_registered_method_is_a_method() -> None:
    method: Method = METHODS.get("peagle")(PEagleConfig())
    assert method.name == "peagle"


def observe(drafter: PEagleDrafter, samples: list[PackedBatch], rows: list[range]) -> None:
    """One call; sequence b gets its rows[b], at the end of the columns, garbage in the others."""
    width = max(len(r) for r in rows)
    shape = (len(samples), width)
    tokens = torch.randint(0, cases.VOCAB, shape)
    positions, valid = torch.randint(0, 99, shape), torch.zeros(shape, dtype=torch.bool)
    aux = torch.full((*shape, 3 * cases.HIDDEN), float("nan"))
    for b, (sample, r) in enumerate(zip(samples, rows, strict=True)):
        if len(r):
            columns = slice(width - len(r), width)
            tokens[b, columns] = sample.input_ids[r.start + 1 : r.stop + 1]
            positions[b, columns] = torch.tensor(list(r))
            aux[b, columns] = sample.features["aux"][r.start : r.stop]
            valid[b, columns] = True
    drafter.observe(tokens, {"aux": aux}, positions, valid)


@pytest.mark.parametrize("num_layers", [1, 3])
def test_proposal_is_the_training_rows(num_layers: int) -> None:
    """Logits at depths 0..5 from row t are those of the training rows (t, 0..5), at several t."""
    method, draft, _ = peagle.build(num_layers=num_layers, num_depths=DEPTH)
    samples = cases.separate(cases.batch((30, 22)))
    parameters = {name: p.detach().double() for name, p in draft.named_parameters()}
    drafter = method.drafter(draft)
    drafter.start(2, 64)
    seen = [0, 0]
    for step in ([5, 9], [3, 1], [0, 2], [7, 0]):
        rows = [range(a, a + n) for a, n in zip(seen, step, strict=True)]
        observe(drafter, samples, rows)
        seen = [r.stop for r in rows]
        got = drafter.logits(DEPTH)
        for b, t in enumerate(seen):
            training = [(s, 0) for s in range(t)] + [(t - 1, d) for d in range(1, DEPTH)]
            logits = peagle.dense_logits(parameters, draft, samples[b], training)
            torch.testing.assert_close(got[b].double(), logits[t - 1 :], rtol=2e-5, atol=2e-5)


def test_greedy_proposal_is_one_pass_and_leaves_no_trace() -> None:
    method, draft, _ = peagle.build()
    samples = cases.separate(cases.batch((12, 12)))
    drafter = method.drafter(draft)
    drafter.start(2, 16)
    observe(drafter, samples, [range(0, 6), range(0, 4)])
    proposal = drafter.propose(4, temperature=0, generator=None)
    assert proposal.probs is None and proposal.tokens.shape == (2, 4)
    best = drafter.logits(4).argmax(-1)
    assert torch.equal(best + draft.d2t[best], proposal.tokens)
    longer = drafter.propose(7, temperature=0, generator=None)
    assert torch.equal(longer.tokens[:, :4], proposal.tokens)
    assert drafter.propose(0, temperature=0, generator=None).tokens.shape == (2, 0)


def test_sampled_proposal_has_its_probabilities() -> None:
    method, draft, _ = peagle.build()
    (sample,) = cases.separate(cases.batch((12,)))
    drafter = method.drafter(draft)
    drafter.start(2000, 8)
    observe(drafter, [sample] * 2000, [range(0, 5)] * 2000)
    proposal = drafter.propose(2, temperature=0.7, generator=torch.Generator().manual_seed(0))
    assert proposal.probs is not None and proposal.probs.shape == (2000, 2, cases.VOCAB)
    assert (proposal.probs[..., ~draft.t2d] == 0).all()
    wanted = torch.softmax(drafter.logits(2) / 0.7, -1)
    torch.testing.assert_close(proposal.probs[..., draft.t2d], wanted, rtol=1e-5, atol=1e-7)
    for k in range(2):
        share = torch.bincount(proposal.tokens[:, k], minlength=cases.VOCAB) / 2000
        assert float((share - proposal.probs[0, k]).abs().max()) < 0.04  # 3.5 deviations


def test_drafter_errors_name_what_is_wrong() -> None:
    method, draft, _ = peagle.build(num_depths=5)
    (sample,) = cases.separate(cases.batch((12,)))
    drafter = method.drafter(draft)
    with pytest.raises(ValueError, match=r"wanted start\(\) first"):
        drafter.propose(1, temperature=0, generator=None)
    drafter.start(2, 4)
    with pytest.raises(ValueError, match=r"wanted at most 4 columns.*got 5"):
        observe(drafter, [sample] * 2, [range(0, 5)] * 2)
    observe(drafter, [sample] * 2, [range(0, 3), range(0)])
    with pytest.raises(ValueError, match=r"sequences \[1\] have no row"):
        drafter.propose(1, temperature=0, generator=None)
    with pytest.raises(ValueError, match=r"temperature: wanted 0 or more, got -1"):
        drafter.propose(1, temperature=-1, generator=None)
    with pytest.raises(ValueError, match=r"depth: wanted 0..5 .*num_depths.*, got 6"):
        drafter.propose(6, temperature=0, generator=None)


@pytest.mark.parametrize("vocab_size", [23, None])
def test_schema_is_what_is_exported(vocab_size: int | None) -> None:
    method, draft, weights = peagle.build(vocab_size=vocab_size, num_layers=3)
    checkpoint = method.export(draft, weights.spec, dtype=torch.float32)
    schema = method.schema(checkpoint.config)
    assert {name: tuple(t.shape) for name, t in checkpoint.tensors.items()} == {
        name: shape for name, (shape, _) in schema.items()
    }
    restored = method.restore(checkpoint, weights)
    packed = cases.batch((14, 9), density=0.9)
    losses = [method.step(d, packed, peagle.AT).loss_sum for d in (draft, restored)]
    assert losses[0].item() > 0 and torch.equal(*losses)
    half = method.export(draft, weights.spec, dtype=torch.bfloat16)
    assert half.tensors["mask_hidden"].dtype == torch.bfloat16


def test_config_json_is_what_vllm_reads() -> None:
    method, draft, weights = peagle.build(mask_token_id=9, aux_layer_ids=(3, 8))
    config = method.export(draft, weights.spec, dtype=torch.bfloat16).config
    assert config["architectures"] == ["Eagle3LlamaForCausalLM"]
    assert config["mask_token_id"] == config["pard_token"] == config["ptd_token_id"] == 9
    assert config["num_hidden_layers"] == 2 and config["num_aux_hidden_states"] == 2
    key = "eagle_aux_hidden_state_layer_ids"
    assert method.engine_configs(config, weights.spec) == {"vllm": {**config, key: [3, 8]}}


@pytest.mark.peer
def test_specforge_loads_the_export_strictly() -> None:
    module = pytest.importorskip(
        "specforge.modeling.draft.peagle", reason="`make peers` installs SpecForge"
    )
    from transformers import LlamaConfig

    method, draft, weights = peagle.build(num_layers=3)
    checkpoint = method.export(draft, weights.spec, dtype=torch.float32)
    theirs = module.PEagleDraftModel(LlamaConfig(**checkpoint.config, pad_token_id=0))
    theirs.load_state_dict(checkpoint.tensors, strict=True)
    hidden = torch.randn(3, cases.HIDDEN)
    torch.testing.assert_close(theirs.compute_logits(hidden), draft.logits(hidden))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("vocab_size", 64, "vocab_size: wanted the target's 61, got 64"),
        ("num_hidden_layers", 4, "num_hidden_layers: wanted 2, got 4"),
        ("mask_token_id", 1, "mask_token_id: wanted 60, got 1"),
        ("pard_token", None, "pard_token: wanted 60, got None"),
        ("specforge_ext", {"aux_layer_ids": [1, 2, 3]}, r"wanted \[2, 4, 5\], got \[1, 2, 3\]"),
    ],
)
def test_restore_refuses(key: str, value: object, message: str) -> None:
    method, draft, weights = peagle.build()
    checkpoint = method.export(draft, weights.spec, dtype=torch.float32)
    with pytest.raises(ValueError, match=message):
        method.restore(
            DraftCheckpoint(checkpoint.tensors, {**checkpoint.config, key: value}), weights
        )


def test_settings_are_checked() -> None:
    with pytest.raises(ValueError, match=r"peagle.num_depth: .*did you mean 'num_depths'"):
        parse(PEagleConfig, {"num_depth": 3}, where="peagle")
    with pytest.raises(ValueError, match=r"down_sample_ratio: .*greater than 0.*got 0"):
        parse(PEagleConfig, {"down_sample_ratio": 0})
    with pytest.raises(ValueError, match="mask_token_id: wanted less than 61, got 61"):
        peagle.build(mask_token_id=61)
    with pytest.raises(ValueError, match="wanted 12 of the target's 61, got a vocabulary of 23"):
        PEagleMethod(PEagleConfig(draft_vocab_size=12)).build(
            cases.target(), cases.vocab(23), seed=0
        )


def test_layout_is_that_of_eagle3() -> None:
    aux, last = PEagleMethod(PEagleConfig()).layout(cases.target().spec).features
    assert (aux.name, aux.layer_ids, aux.width) == ("aux", (2, 4, 5), 72)
    assert (last.name, last.layer_ids, last.final_norm) == ("last", (8,), True)


def fresh(weights: TargetWeights, *, seed: int = 0, **config: object) -> PEagleDraft:
    method = PEagleMethod(PEagleConfig.model_validate({"draft_vocab_size": 23, **config}))
    return method.build(weights, cases.vocab(23), seed=seed)


def test_fresh_weights() -> None:
    weights = cases.target()
    one, same, other = (fresh(weights, seed=s) for s in (3, 3, 4))
    assert torch.equal(one.lm_head.weight, same.lm_head.weight)
    assert torch.equal(one.mask_hidden, same.mask_hidden)
    assert not torch.equal(one.mask_hidden, other.mask_hidden)
    assert torch.equal(one.embed_tokens.weight, weights.embed_tokens)
    with torch.no_grad():
        one.embed_tokens.weight.zero_()  # a copy: the target's stays
    assert weights.embed_tokens.abs().max() > 0
    trained = set(dict(one.named_parameters()))
    assert set(one.state_dict()) == trained and {"embed_tokens.weight", "mask_hidden"} <= trained


def test_warm_start_of_several_layers_is_that_of_one() -> None:
    """Further layers start as the identity."""
    weights, packed = cases.target(), cases.batch((15, 9), density=0.9)
    losses: list[Tensor] = []
    for num_layers in (1, 3):
        draft = fresh(weights, warm_start="target", num_layers=num_layers)
        method = PEagleMethod(draft.config)
        losses.append(method.step(draft, packed, peagle.AT).loss_sum.detach())
    torch.testing.assert_close(*losses)
    with pytest.raises(ValueError, match=r"warm_start 'target': wanted 'input_layernorm.weight'"):
        fresh(replace(weights, last_layer={}), warm_start="target")
