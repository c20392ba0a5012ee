"""Exported drafts and targets' folders for the tests of conversion."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import block_cases as blocks
import eagle3_cases as cases
from specforge_ext.export import write
from specforge_ext.methods import Method
from specforge_ext.records import DraftCheckpoint, TargetWeights


def target_folder(weights: TargetWeights, path: Path) -> Path:
    spec = weights.spec
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.hidden_size,
        "num_hidden_layers": spec.num_layers,
        "max_position_embeddings": spec.max_position_embeddings,
    }
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    save_file(
        {
            "model.embed_tokens.weight": weights.embed_tokens.contiguous(),
            "model.norm.weight": weights.final_norm,
            "lm_head.weight": weights.lm_head.contiguous(),
        },
        path / "model.safetensors",
    )
    return path


def exported(
    method: Method, draft: torch.nn.Module, weights: TargetWeights, path: Path, engine: str
) -> Path:
    """Our own export, the engine's directory."""
    checkpoint = method.export(draft, weights.spec, dtype=torch.float32)
    configs = method.engine_configs(checkpoint.config, weights.spec)
    config = configs[engine] if engine in configs else configs[""]
    write(DraftCheckpoint(checkpoint.tensors, config), path)
    return path


def eagle3(
    tmp_path: Path, engine: str = "sglang", **options: Any
) -> tuple[Path, Path, Method, TargetWeights]:
    method, draft, weights = cases.build(**options)
    source = exported(method, draft, weights, tmp_path / "ours", engine)
    return source, target_folder(weights, tmp_path / "target"), method, weights


def dflash(tmp_path: Path, **options: Any) -> tuple[Path, Path, Method, TargetWeights]:
    method, draft, weights = blocks.build(**options)
    source = exported(method, draft, weights, tmp_path / "ours", "")
    return source, target_folder(weights, tmp_path / "target"), method, weights


def config_of(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


def rewrite(
    folder: Path,
    *,
    config: dict[str, Any] | None = None,
    tensors: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None,
) -> None:
    """config: keys to set, None to remove."""
    if config is not None:
        changed = {k: v for k, v in (config_of(folder) | config).items() if v is not None}
        (folder / "config.json").write_text(json.dumps(changed))
    if tensors is not None:
        held = load_file(folder / "model.safetensors")
        save_file(tensors(held), folder / "model.safetensors")


def assert_same_bits(
    ours: Path, theirs: Path, *, but: frozenset[str] | set[str] = frozenset()
) -> None:
    """but: keys of config.json that may differ."""
    left, right = (load_file(p / "model.safetensors") for p in (ours, theirs))
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype and torch.equal(tensor, right[name]), name
    kept = [{k: v for k, v in config_of(p).items() if k not in but} for p in (ours, theirs)]
    assert kept[0] == kept[1]


def foreign(folder: Path, **config: Any) -> None:
    """As if another program had written it."""
    rewrite(folder, config={"specforge_ext": None, **config})
