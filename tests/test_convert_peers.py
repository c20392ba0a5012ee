"""Converted checkpoints in the packages whose formats they are: loaded by their own loaders, they
draft what ours draft; what their own writers write comes back bit for bit.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import block_cases as blocks
import eagle3_cases as cases
from convert_cases import assert_same_bits, config_of, dflash, eagle3, foreign
from specforge_ext.export import convert, read_strict
from specforge_ext.methods import Method
from specforge_ext.records import Proposal, TargetWeights

pytestmark = [
    pytest.mark.peer,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(
        any(importlib.util.find_spec(name) is None for name in ("specforge", "speculators")),
        reason="peers are not installed: run `make peers` (benchmarks/peers.txt)",
    ),
]
ROWS, DEPTH, ANCHOR, TOKENS = 9, 3, 9, 20


def proposed(
    method: Method, source: Path, weights: TargetWeights, feature: str, width: int, depth: int
) -> tuple[Proposal, Tensor, Tensor]:
    """What our drafter proposes at temperature 1, after ROWS rows; the features [1, TOKENS, F] and
    the tokens [1, TOKENS + 1] behind them.
    """
    generator = torch.Generator().manual_seed(5)
    features = torch.randn(1, TOKENS, width, generator=generator)
    tokens = torch.randint(0, cases.VOCAB, (1, TOKENS + 1), generator=generator)
    drafter = method.drafter(method.restore(read_strict(source, method), weights))
    drafter.start(1, ROWS)
    drafter.observe(
        tokens[:, 1 : ROWS + 1],
        {feature: features[:, :ROWS]},
        torch.arange(ROWS)[None],
        torch.ones(1, ROWS, dtype=torch.bool),
    )
    with torch.no_grad():
        proposal = drafter.propose(depth, temperature=1.0, generator=generator)
    return proposal, features, tokens


def assert_proposed(proposal: Proposal, logits: Tensor, held: dict[str, Tensor]) -> None:
    """logits: [depth, words of the draft]."""
    assert proposal.probs is not None
    words = torch.arange(logits.shape[1])
    if "d2t" in held:
        words = words + held["d2t"]
    wanted = torch.zeros_like(proposal.probs[0])
    wanted[:, words] = logits.softmax(-1)
    torch.testing.assert_close(proposal.probs[0], wanted, rtol=1e-4, atol=1e-6)
    assert float(wanted.max()) > 0.05  # not all alike


def speculators_model(folder: Path) -> Any:
    from speculators import SpeculatorModel, SpeculatorModelConfig

    config = SpeculatorModelConfig.from_pretrained(folder)
    config.transformer_layer_config._attn_implementation = "eager"
    return SpeculatorModel.from_pretrained(folder, config=config).eval()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"vocab_size": None, "aux_layer_ids": (1, 4, 6)},
        {"num_layers": 2, "fc_norm": True, "norm_output": True, "aux_layer_ids": (1, 2, 4, 6)},
    ],
    ids=["plain", "whole vocabulary", "all options"],
)
def test_speculators_eagle3(tmp_path: Path, options: dict[str, Any]) -> None:
    source, target, method, weights = eagle3(tmp_path, **options)
    convert(source, tmp_path / "there", to="speculators", target=target, depth=DEPTH)
    model = speculators_model(tmp_path / "there")
    ids = list(options.get("aux_layer_ids", (2, 4, 5)))
    assert model.config.eagle_aux_hidden_state_layer_ids == ids
    proposal, features, tokens = proposed(
        method, source, weights, "aux", len(ids) * cases.HIDDEN, DEPTH
    )
    # Its step k reads, at row t, token t + 1 + k: behind row ROWS - 1, what was proposed.
    following = torch.cat([tokens[:, 1 : ROWS + 1], proposal.tokens], 1)
    seen: list[Tensor] = []
    model.lm_head.register_forward_hook(lambda module, given, out: seen.append(out))
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        model(
            features[:, : following.shape[1]],
            following,
            torch.zeros_like(following),
            ttt_steps=DEPTH,
        )
    logits = torch.stack([out[0, ROWS - 1] for out in seen])
    assert_proposed(proposal, logits, load_file(source / "model.safetensors"))
    model.save_pretrained(tmp_path / "theirs")
    done = convert(tmp_path / "theirs", tmp_path / "back", to="sglang", target=target)
    assert done.source == "speculators"
    assert_same_bits(source, tmp_path / "back", but={"specforge_ext"})


@pytest.mark.parametrize(
    "options",
    [{}, {"vocab_size": None, "aux_layer_ids": (1, 4, 6)}, {"fc_norm": True}],
    ids=["plain", "whole vocabulary", "fc_norm"],
)
def test_specforge_eagle3(tmp_path: Path, options: dict[str, Any]) -> None:
    from specforge.modeling.auto import AutoDraftModel, AutoDraftModelConfig

    source, target, method, weights = eagle3(tmp_path, **options)
    convert(source, tmp_path / "there", to="specforge", target=target)
    # Not its from_pretrained: with this transformers that leaves its RoPE tables uninitialised.
    config = AutoDraftModelConfig.from_file(str(tmp_path / "there" / "config.json"))
    model = AutoDraftModel.from_config(config)
    model.load_state_dict(load_file(tmp_path / "there" / "model.safetensors"))
    proposal, features, tokens = proposed(method, source, weights, "aux", 3 * cases.HIDDEN, DEPTH)
    following = torch.cat([tokens[:, 1 : ROWS + 1], proposal.tokens], 1)
    cache: list[list[Tensor]] = [[], []]
    positions = torch.arange(ROWS)[None]
    mask = torch.full((1, 1, ROWS, ROWS), torch.finfo(torch.float32).min).triu(1)
    logits = []
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        hidden = model.project_hidden_states(features[:, :ROWS])
        for k in range(DEPTH):
            embeds = model.embed_input_ids(following[:, k : k + ROWS])
            hidden = model.backbone(embeds, hidden, cache, mask, positions)
            logits.append(model.compute_logits(hidden)[0, -1])
    assert_proposed(proposal, torch.stack(logits), load_file(source / "model.safetensors"))
    model.save_pretrained(tmp_path / "theirs")
    assert config_of(tmp_path / "theirs")["architectures"] == ["LlamaForCausalLMEagle3"]
    foreign(tmp_path / "theirs")
    convert(
        tmp_path / "theirs", tmp_path / "back", to="sglang", source_format="specforge",
        target=target,
    )  # fmt: skip
    assert_same_bits(source, tmp_path / "back", but={"specforge_ext"})


def test_speculators_dflash(tmp_path: Path) -> None:
    source, target, method, weights = dflash(tmp_path)
    convert(source, tmp_path / "there", to="speculators", target=target)
    model = speculators_model(tmp_path / "there")
    proposal, features, tokens = proposed(
        method, source, weights, "hidden", blocks.FEATURES, blocks.BLOCK - 1
    )
    loss_mask = torch.zeros(1, TOKENS, dtype=torch.bool)
    loss_mask[0, ANCHOR] = True
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        _, logits, *_ = model._backbone_forward(
            features,
            tokens[:, :TOKENS],
            loss_mask,
            torch.zeros(1, TOKENS, cases.HIDDEN),
            torch.zeros(1, TOKENS, dtype=torch.long),
            max_anchors=1,
        )
    assert_proposed(proposal, logits[0, 1:], {})
    model.save_pretrained(tmp_path / "theirs")
    convert(tmp_path / "theirs", tmp_path / "back", to="sglang", target=target)
    assert_same_bits(source, tmp_path / "back")


def test_speculators_own_converter_names_the_same_layers(tmp_path: Path) -> None:
    from speculators.convert.dflash.converter import DFlashConverter

    source, target, _, _ = dflash(tmp_path)
    convert(source, tmp_path / "there", to="speculators", target=target)
    DFlashConverter().convert(source, tmp_path / "theirs", str(target), validate=False)
    ours, theirs = config_of(tmp_path / "there"), config_of(tmp_path / "theirs")
    for key in ("aux_hidden_state_layer_ids", "mask_token_id", "block_size", "draft_vocab_size"):
        assert ours[key] == theirs[key], key
    assert ours["speculators_config"] == theirs["speculators_config"]


@pytest.mark.parametrize("options", [{}, blocks.MIXED], ids=["full", "sliding"])
def test_specforge_dflash(tmp_path: Path, options: dict[str, Any]) -> None:
    from specforge.modeling.auto import AutoDraftModel

    source, _, method, weights = dflash(tmp_path, **options)
    convert(source, tmp_path / "there", to="specforge")
    model, info = AutoDraftModel.from_pretrained(tmp_path / "there", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    proposal, features, tokens = proposed(
        method, source, weights, "hidden", blocks.FEATURES, blocks.BLOCK - 1
    )
    if not options:  # its masks of sliding layers are its trainer's, not its model's
        ids = torch.full((1, blocks.BLOCK), model.mask_token_id)
        ids[0, 0] = tokens[0, ANCHOR]
        model.config._attn_implementation = "sdpa"
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            states = model(
                torch.arange(ANCHOR + blocks.BLOCK)[None],
                noise_embedding=weights.embed_tokens[ids],
                target_hidden=features[:, :ANCHOR],
            )
        assert_proposed(proposal, states[0, 1:] @ weights.lm_head.T, {})
    model.save_pretrained(tmp_path / "theirs")
    convert(tmp_path / "theirs", tmp_path / "back", to="sglang")
    assert_same_bits(source, tmp_path / "back")
