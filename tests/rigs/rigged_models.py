"""Targets and drafts whose counters are known before a server runs: `rigged_models.py OUT` writes
them.

Both targets are Llamas whose layers add nothing: attention and feed-forward outputs are zero, so
that the last hidden state is the embedding of the last token, and the head alone decides what
follows.

`cycle` says x + 1 after x. Its EAGLE-3 draft, also without effect of its layer, hands on the
hidden state h_t = E[x_t] and reads x_{t+2} from it: right at the first step; at the second, for
which h has not changed, it says x_{t+2} again, which is wrong. One of k drafted tokens is
accepted: length 2.

Its Domino draft, whose layers have no effect either, is right at slot 0, where the known token
stands; at the other slots it says what follows the mask, unless what it read of the tokens said so
far corrects it: the whole block is accepted.

`constant` says one token whatever it saw, and so does its DFlash draft, from the mask's
embedding: the whole block is accepted.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from specforge_ext.assets import demo_target_path
from specforge_ext.engines import ENGINES, Engine
from specforge_ext.export import write
from specforge_ext.methods import METHODS, Method
from specforge_ext.records import DraftCheckpoint, DraftVocab

HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD_DIM, FFN = 128, 8, 4, 2, 32, 64
CONSTANT = 77
MASK = 3
DFLASH_LAYERS = (1, 4, 6)
"""0-based outputs of the target's layers."""
PROMPTS = ([5, 6, 7], [100, 300, 50, 60], [2040] * 9)
"""The last one runs over the end of the vocabulary."""


@dataclass(frozen=True)
class RiggedTarget:
    """path: a Hugging Face folder with a tokenizer. follows(x): what the target says after x."""

    path: Path
    follows: Callable[[int], int]

    def greedy(self, prompt: Sequence[int], count: int) -> tuple[int, ...]:
        said = [*prompt]
        for _ in range(count):
            said.append(self.follows(said[-1]))
        return tuple(said[len(prompt) :])


def cycle_target(path: Path) -> RiggedTarget:
    embedding = _embedding()
    vocab = len(embedding)
    # Row y of the head is E[y - 1], whose product with E[x] is largest at y = x + 1.
    _write_target(path, embedding, embedding.roll(1, 0))
    return RiggedTarget(path, lambda x: (x + 1) % vocab)


def constant_target(path: Path) -> RiggedTarget:
    embedding = _embedding()
    embedding[:, 0] = 8.0  # what all tokens share, so that one row of the head answers to all
    head = torch.zeros_like(embedding)
    head[CONSTANT, 0] = 1.0
    _write_target(path, embedding, head)
    return RiggedTarget(path, lambda x: CONSTANT)


def cycle_eagle3(target: Path, path: Path) -> Path:
    """Written by our own export, in float32."""
    engine = open_target(target)
    weights = engine.weights(device=torch.device("cpu"))
    method = METHODS.get("eagle3")(METHODS.get("eagle3").Config(ttt_length=3))
    vocab = weights.spec.vocab_size
    everything = DraftVocab(
        torch.ones(vocab, dtype=torch.bool), torch.zeros(vocab, dtype=torch.int64)
    )
    draft = method.build(weights, everything, seed=1)
    third = torch.eye(HIDDEN) / 3
    rigged: dict[str, Tensor] = {
        "fc.weight": torch.cat([third, third, third], 1),  # all three features are E[x_t]
        "midlayer.self_attn.o_proj.weight": torch.zeros(HIDDEN, HEADS * HEAD_DIM),
        "midlayer.mlp.down_proj.weight": torch.zeros(HIDDEN, FFN),
        "norm.weight": torch.ones(HIDDEN),
        "lm_head.weight": weights.embed_tokens.roll(2, 0),
    }
    parameters = dict(draft.named_parameters())
    with torch.no_grad():
        for name, value in rigged.items():
            parameters[name].copy_(value)
    write(method.export(draft, weights.spec, dtype=torch.float32), path)
    return path


def cycle_domino(target: Path, path: Path, *, block_size: int) -> Path:
    """Written by our own export, in float32. block_size: slots of a block.

    The state is the half of tanh(E[x]) of the last token, a quarter of the one before, and so on;
    silu(s) - silu(-s) = s takes it through the projection unchanged.
    """
    weights = open_target(target).weights(device=torch.device("cpu"))
    method = domino_method(block_size)
    draft = method.build(weights, DraftVocab.full(weights.spec.vocab_size), seed=1)
    one, none = torch.eye(HIDDEN), torch.zeros(HIDDEN, HIDDEN)
    follows = 20 * weights.embed_tokens.roll(1, 0)
    rigged: dict[str, Tensor] = {
        "layers.0.self_attn.o_proj.weight": torch.zeros(HIDDEN, HEADS * HEAD_DIM),
        "layers.0.mlp.down_proj.weight": torch.zeros(HIDDEN, FFN),
        "prefix_gru.weight_ih_l0": torch.cat([none, none, one]),
        "prefix_gru.weight_hh_l0": torch.cat([none, none, none]),
        "embed_proj.0.weight": torch.cat([torch.cat([none, s * one], 1) for s in (1, -1)]),
        "embed_proj.2.weight": torch.cat([follows, -follows], 1),
    }
    parameters = dict(draft.named_parameters())
    with torch.no_grad():
        for name, value in rigged.items():
            parameters[name].copy_(value)
    write(method.export(draft, weights.spec, dtype=torch.float32), path)
    return path


def domino_method(block_size: int) -> Method:
    """Of `cycle_domino`."""
    factory = METHODS.get("domino")
    method: Method = factory(
        factory.Config(
            block_size=block_size,
            num_layers=1,
            layer_ids=(4,),
            mask_token_id=MASK,
            shift_label=True,
            gru_hidden_dim=HIDDEN,
            emb_dim=2 * HIDDEN,
        )
    )
    return method


def constant_dflash(path: Path, *, block_size: int) -> Path:
    """block_size: slots of a block, the known token's included."""
    query, key = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    layer = {
        "input_layernorm": torch.ones(HIDDEN),
        "post_attention_layernorm": torch.ones(HIDDEN),
        "self_attn.q_proj": _noise(query, HIDDEN),
        "self_attn.k_proj": _noise(key, HIDDEN),
        "self_attn.v_proj": _noise(key, HIDDEN),
        "self_attn.o_proj": torch.zeros(HIDDEN, query),
        "self_attn.q_norm": torch.ones(HEAD_DIM),
        "self_attn.k_norm": torch.ones(HEAD_DIM),
        "mlp.gate_proj": _noise(FFN, HIDDEN),
        "mlp.up_proj": _noise(FFN, HIDDEN),
        "mlp.down_proj": torch.zeros(HIDDEN, FFN),
    }
    tensors = {
        "fc.weight": _noise(HIDDEN, len(DFLASH_LAYERS) * HIDDEN),
        "hidden_norm.weight": torch.ones(HIDDEN),
        "norm.weight": torch.ones(HIDDEN),
    }
    tensors |= {f"layers.0.{name}.weight": value for name, value in layer.items()}
    config = {
        "architectures": ["DFlashDraftModel"],
        "model_type": "qwen3",
        "vocab_size": open_target("demo").spec.vocab_size,
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_hidden_layers": 1,
        "num_target_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "hidden_act": "silu",
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "attention_bias": False,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "bos_token_id": None,
        "eos_token_id": 2,
        "block_size": block_size,
        "layer_types": ["full_attention"],
        "dflash_config": {"mask_token_id": MASK, "target_layer_ids": list(DFLASH_LAYERS)},
    }
    write(DraftCheckpoint(tensors, config), path)
    return path


def _noise(*shape: int) -> Tensor:
    return 0.05 * torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def open_target(path: Path | str) -> Engine:
    """Our own engine, in float32."""
    factory = ENGINES.get("hf")
    engine: Engine = factory.open(factory.Config(model=str(path), dtype="float32"))
    return engine


def _embedding() -> Tensor:
    """[V, H]; V is the tokenizer's. Products of different rows stay far below a row's with
    itself.
    """
    vocab = open_target("demo").spec.vocab_size
    return torch.randn(vocab, HIDDEN, generator=torch.Generator().manual_seed(0))


def _write_target(path: Path, embedding: Tensor, head: Tensor) -> None:
    config = LlamaConfig(
        vocab_size=len(embedding),
        hidden_size=HIDDEN,
        intermediate_size=FFN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        max_position_embeddings=512,
        rms_norm_eps=1e-6,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(embedding)
        model.lm_head.weight.copy_(head)
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    model.save_pretrained(path)
    for file in demo_target_path().iterdir():
        if file.name.startswith("tokenizer"):
            shutil.copy(file, path)


def main(out: Path) -> None:
    cycle = cycle_target(out / "cycle")
    cycle_eagle3(cycle.path, out / "cycle_eagle3")
    cycle_domino(cycle.path, out / "cycle_domino", block_size=4)
    constant_target(out / "constant")
    constant_dflash(out / "constant_dflash", block_size=4)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
