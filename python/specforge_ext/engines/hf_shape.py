"""A target's shape without its weights: config.json alone, everything else on the meta device."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from specforge_ext.assets import target_config
from specforge_ext.engines.hf_model import build_on_meta, check_path, is_tied, layers_of, spec_of
from specforge_ext.records import TargetWeights


def read_shape(path: str, *, name: str, dtype: torch.dtype) -> TargetWeights:
    """Weights on the meta device: sizes and dtypes, no values.

    Of a directory, config.json. Of a hub name, what `assets/targets.json` says; of one that is not
    there, the hub's config.json. The last layer is empty where transformers does not know the
    model type. ValueError if there is no config, or it lacks a size.
    """
    config = read_config(path)
    spec = spec_of(config, name=name, dtype=dtype, eos=_eos_ids(config))
    embedding = torch.empty(spec.vocab_size, spec.hidden_size, dtype=dtype, device="meta")
    return TargetWeights(
        spec=spec,
        embed_tokens=embedding,
        lm_head=embedding if is_tied(config) else torch.empty_like(embedding),
        final_norm=torch.empty(spec.hidden_size, dtype=dtype, device="meta"),
        last_layer=_last_layer(config, name=name, dtype=dtype),
    )


def is_known(config: Any) -> bool:
    """Whether transformers has this architecture, so that the engine could open the model."""
    return config.model_type in CONFIG_MAPPING


def read_config(path: str) -> Any:
    """A text config, in transformers' form. ValueError if there is none."""
    check_path(path)
    public = None if Path(path).expanduser().is_dir() else target_config(path)
    if public is not None:
        values: dict[str, Any] = {key: value for key, value in public.items() if key != "source"}
        if values["model_type"] in CONFIG_MAPPING:
            return AutoConfig.for_model(**values).get_text_config()
        return SimpleNamespace(**values)
    try:
        return AutoConfig.from_pretrained(path).get_text_config()
    except OSError as error:
        raise ValueError(
            f"model: wanted a directory or a hub name with a config.json, got {path!r}: {error}"
        ) from error


def _eos_ids(config: Any) -> tuple[int, ...]:
    eos = config.eos_token_id
    if eos is None:
        return ()
    return tuple(sorted({eos} if isinstance(eos, int) else set(eos)))


def _last_layer(config: Any, *, name: str, dtype: torch.dtype) -> dict[str, Tensor]:
    if not is_known(config):
        return {}
    model = build_on_meta(config, dtype=dtype)
    layer = layers_of(model.base_model, config.num_hidden_layers, name)[-1]
    return dict(layer.state_dict())
