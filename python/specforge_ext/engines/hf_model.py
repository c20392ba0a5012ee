"""A transformers causal LM, opened: its shape as a TargetSpec, and the parts of it."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.utils import logging as hf_logging

from specforge_ext.records import DTYPE_NAMES, TargetSpec

PROBE_TOKENS = 4
PROBE_TOLERANCE = 2e-2
"""Relative. Wide enough for bfloat16, far below what a forgotten scale does to logits."""


@dataclass(frozen=True)
class TargetModel:
    """The frozen model in evaluation mode, in parts.

    The modules are Any: what they hold differs by architecture. `base` is all but `lm_head` and
    ends with `norm`.
    """

    spec: TargetSpec
    config: Any
    base: Any
    embed_tokens: Any
    layers: Sequence[Any]
    norm: Any
    lm_head: Any

    @property
    def device(self) -> torch.device:
        device: torch.device = self.embed_tokens.weight.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.embed_tokens.weight.dtype
        return dtype

    def last_hidden(self, input_ids: Tensor, **kwargs: Any) -> Tensor:
        """[B, n, H] after the final norm, of input_ids [B, n] int64."""
        hidden: Tensor = self.base(input_ids=input_ids, **kwargs).last_hidden_state
        return hidden


def load_model(
    path: str, *, name: str, dtype: torch.dtype, device: torch.device, attention: str, local: bool
) -> TargetModel:
    """Open a directory or a hub name. ValueError says what is missing or unfit."""
    check_path(path)
    try:
        with no_progress_bar():
            model: Any = AutoModelForCausalLM.from_pretrained(
                path, dtype=dtype, attn_implementation=attention, local_files_only=local
            )
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"model: wanted a directory or a hub name of a causal LM, got {path!r}: {error}"
        ) from error
    return wrap_model(model.to(device), name=name)


def build_on_meta(config: Any, *, dtype: torch.dtype) -> Any:
    """The model of a text config that transformers knows, its tensors sizes without values."""
    factory: Any = AutoModelForCausalLM
    with torch.device("meta"):
        return factory.from_config(config, dtype=dtype)


@contextmanager
def no_progress_bar() -> Iterator[None]:
    """transformers' bar of loaded weights would break into the run's own display."""
    shown = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if shown:
            hf_logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def check_path(path: str) -> None:
    """ValueError if `path` is meant as a directory here and has no config.json."""
    location = Path(path).expanduser()
    if not (location.exists() or path.startswith(("/", "./", "../", "~"))):
        return
    if not (location / "config.json").is_file():
        raise ValueError(f"model: wanted a directory with config.json, got {path!r}")


def wrap_model(model: Any, *, name: str) -> TargetModel:
    """Freeze an opened model and find its parts; ValueError if it is no decoder-only LM.

    One forward of a few tokens checks that lm_head(norm(h)) are the model's logits: every teacher
    distribution of the project is computed that way, so models that scale or cap them are refused.
    """
    model = model.eval().requires_grad_(False)
    config = model.config.get_text_config()
    base = model.base_model
    parts = TargetModel(
        spec=spec_of(config, name=name, dtype=model.dtype, eos=eos_ids(model)),
        config=config,
        base=base,
        embed_tokens=model.get_input_embeddings(),
        layers=layers_of(base, config.num_hidden_layers, name),
        norm=final_norm_of(base, name),
        lm_head=model.get_output_embeddings(),
    )
    _probe(model, parts)
    return parts


def spec_of(config: Any, *, name: str, dtype: torch.dtype, eos: tuple[int, ...]) -> TargetSpec:
    """The shape of a text config; RoPE in the old and the new spelling."""
    rope_theta, rope_scaling = _rope(config, name)
    heads = _need(config, "num_attention_heads", name)
    hidden = _need(config, "hidden_size", name)
    kv_heads = getattr(config, "num_key_value_heads", None)
    head_dim = getattr(config, "head_dim", None)
    return TargetSpec(
        name=name,
        model_type=config.model_type,
        vocab_size=_need(config, "vocab_size", name),
        hidden_size=hidden,
        intermediate_size=_need(config, "intermediate_size", name),
        num_layers=_need(config, "num_hidden_layers", name),
        num_heads=heads,
        num_kv_heads=heads if kv_heads is None else kv_heads,
        head_dim=hidden // heads if head_dim is None else head_dim,
        rms_norm_eps=_need(config, "rms_norm_eps", name),
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        max_position_embeddings=_need(config, "max_position_embeddings", name),
        dtype=DTYPE_NAMES[dtype],
        bos_token_id=getattr(config, "bos_token_id", None),
        eos_token_ids=eos,
        partial_rotary_factor=_partial_rotary(config),
    )


def is_tied(config: Any) -> bool:
    """Whether the head is the embedding; not every architecture's config speaks of it."""
    return bool(getattr(config, "tie_word_embeddings", False))


def _need(config: Any, key: str, name: str) -> Any:
    value = getattr(config, key, None)
    if value is None:
        raise ValueError(f"model {name!r}: wanted {key!r} in config.json, found none")
    return value


def _rope(config: Any, name: str) -> tuple[float, Mapping[str, object] | None]:
    """(theta, scaling); scaling is None for plain RoPE, else its parameters with `rope_type`."""
    parameters: dict[str, Any] | None = getattr(config, "rope_parameters", None)
    if parameters is None:
        theta = _need(config, "rope_theta", name)
        parameters = {"rope_theta": theta, **(getattr(config, "rope_scaling", None) or {})}
    if any(isinstance(value, Mapping) for value in parameters.values()):
        raise ValueError(
            f"model {name!r}: wanted one set of RoPE parameters, got one per layer type "
            f"({', '.join(parameters)})"
        )
    scaling = {key: value for key, value in parameters.items() if key not in ("rope_theta", "type")}
    scaling.setdefault("rope_type", parameters.get("type", "default"))
    plain = scaling["rope_type"] == "default"
    return float(parameters["rope_theta"]), None if plain else scaling


def _partial_rotary(config: Any) -> float:
    parameters = getattr(config, "rope_parameters", None) or {}
    own = getattr(config, "partial_rotary_factor", None)
    return float(parameters.get("partial_rotary_factor") or own or 1.0)


def eos_ids(model: Any) -> tuple[int, ...]:
    """End tokens of the generation config, which may hold more than config.json's; ascending."""
    generation = model.generation_config
    eos = generation.eos_token_id if generation is not None else None
    if eos is None:
        eos = model.config.get_text_config().eos_token_id
    if eos is None:
        return ()
    return tuple(sorted({eos} if isinstance(eos, int) else set(eos)))


def layers_of(base: nn.Module, num_layers: int, name: str) -> Sequence[Any]:
    lists = [
        child
        for child in base.children()
        if isinstance(child, nn.ModuleList) and len(child) == num_layers
    ]
    if len(lists) != 1:
        raise ValueError(
            f"model {name!r}: wanted one list of {num_layers} decoder layers in "
            f"{type(base).__name__}, found {len(lists)}"
        )
    return list(lists[0])


def final_norm_of(base: nn.Module, name: str) -> nn.Module:
    """The norm after the last layer; a LayerNorm is refused, since drafts assume an RMSNorm."""
    norm = getattr(base, "norm", None)
    parameters = dict(norm.named_parameters()) if isinstance(norm, nn.Module) else {}
    if not isinstance(norm, nn.Module) or set(parameters) != {"weight"}:
        raise ValueError(
            f"model {name!r}: wanted an RMSNorm named 'norm' in {type(base).__name__}, "
            f"got {type(norm).__name__} with parameters {sorted(parameters)}"
        )
    return norm


@torch.no_grad()
def factor_of(module: nn.Module, weight: Tensor) -> Tensor:
    """What an RMSNorm with this weight multiplies by, in the weight's dtype.

    The weight itself, or 1 + weight where the architecture stores it so (Gemma, Qwen 3.5), which is
    seen by what the norm makes of ones under weights of zero. weight: [H]. Other modules' tensors
    come back as they are.
    """
    if not type(module).__name__.endswith("RMSNorm"):
        return weight
    tried = copy.deepcopy(module).to_empty(device="cpu").float()
    assert isinstance(tried.weight, Tensor)
    tried.weight.zero_()
    if tried(torch.ones_like(tried.weight)[None]).any():
        return (1 + weight.float()).to(weight.dtype)
    return weight


def layer_tensors(layer: nn.Module, device: torch.device) -> dict[str, Tensor]:
    """A layer's state dict on the device, its norms as factors."""
    return {
        name: factor_of(layer.get_submodule(name.rpartition(".")[0]), tensor).to(device)
        for name, tensor in layer.state_dict().items()
    }


@torch.no_grad()
def _probe(model: Any, parts: TargetModel) -> None:
    ids = torch.arange(PROBE_TOKENS, device=parts.device)[None] % parts.spec.vocab_size
    wanted = model(input_ids=ids, use_cache=False).logits.float()
    ours = parts.lm_head(parts.last_hidden(ids, use_cache=False)).float()
    error = float((wanted - ours).abs().max() / wanted.abs().max().clamp_min(1e-6))
    if not error <= PROBE_TOLERANCE:
        raise ValueError(
            f"model {parts.spec.name!r}: wanted logits equal to lm_head(norm(h)), "
            f"relative error {error:.3g}; models that scale or cap their logits are not supported"
        )
