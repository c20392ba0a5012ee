"""A few of a target's weights, straight from its safetensors files: no other tensor is read.

Where they lie is found without loading: the model is built on the meta device, its modules' names
are looked up among the files' names, and what wraps a model there (`model.`, `language_model.`)
does not count.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, GenerationConfig

from specforge_ext.engines.checkpoint import CheckpointTensors
from specforge_ext.engines.hf_conversion import converted
from specforge_ext.engines.hf_model import (
    build_on_meta,
    check_path,
    eos_ids,
    factor_of,
    final_norm_of,
    is_tied,
    layers_of,
    spec_of,
)
from specforge_ext.records import TargetWeights

PLAIN = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes whose values mean themselves; others are quantised, and their scales lie elsewhere."""
_WRAPPERS = ("model", "language_model", "text_model")


def read_weights(
    path: str,
    *,
    name: str,
    dtype: torch.dtype,
    device: torch.device,
    last_layer: bool,
    local: bool,
) -> TargetWeights | None:
    """What `HfEngine.weights` of the opened model holds, bit for bit, in memory of its own.

    A head that is tied is the embedding itself. last_layer: a mapping that reads a tensor when it
    is asked for. local: never go online; otherwise a hub model's files are fetched as they are
    needed. None if the model has no safetensors files. ValueError names the tensor and the file if
    one is missing, quantised or misshapen, and says what does not fit of an architecture.
    """
    check_path(path)
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=local).get_text_config()
    except OSError as error:
        raise ValueError(
            f"model: wanted a directory or a hub name of a causal LM, got {path!r}: {error}"
        ) from error
    tensors = CheckpointTensors(path, local=local)
    if not tensors:
        return None
    model = build_on_meta(config, dtype=dtype)
    _take_generation_config(model, path, local=local)
    spec = spec_of(config, name=name, dtype=dtype, eos=eos_ids(model))
    base: Any = model.base_model
    layer, norm = layers_of(base, spec.num_layers, name)[-1], final_norm_of(base, name)
    stored = Stored(model, tensors, name=name)
    embed_tokens, lm_head = _embeddings(stored, model, tied=is_tied(config), device=device)
    return TargetWeights(
        spec=spec,
        embed_tokens=embed_tokens,
        lm_head=lm_head,
        final_norm=factor_of(norm, stored.read(norm, "weight")).to(device),
        last_layer=LayerTensors(stored, layer, device) if last_layer else {},
        checkpoint=tensors,
    )


class Stored:
    """The files' tensors of a model that is built on the meta device."""

    def __init__(self, model: Any, tensors: CheckpointTensors, *, name: str) -> None:
        """name: of the model, for errors."""
        self._model = model
        self._tensors = tensors
        self._name = name
        self._paths = {id(module): path for path, module in model.named_modules()}
        wrappers = "|".join(re.escape(w) for w in {*_WRAPPERS, model.base_model_prefix} if w)
        self._wrapped = re.compile(rf"(?:(?:{wrappers})\.)+")
        self._keys: dict[str, list[str]] = {}
        for key in tensors:
            self._keys.setdefault(self._core(key), []).append(key)

    def has(self, module: nn.Module, entry: str) -> bool:
        return self._key(module, entry) is not None

    def read(self, module: nn.Module, entry: str) -> Tensor:
        """The module's parameter or buffer. ValueError if it is missing, quantised or misshapen."""
        key, path = self._key(module, entry), self._path(module, entry)
        if key is None:
            found = converted(self._model, self._tensors, self._plain, path)
        else:
            found = self._plain(key)
        where = f"{key or path} in {self._tensors.where if key is None else self._file(key)}"
        if found is None:
            raise ValueError(f"model {self._name!r}: wanted {where}, found none")
        wanted = module.state_dict()[entry]
        if found.shape != wanted.shape:
            raise ValueError(
                f"model {self._name!r}: {where}: wanted {list(wanted.shape)}, "
                f"got {list(found.shape)}"
            )
        # A copy, since what was read may be the mapped file, which somebody may replace.
        return found.to(wanted.dtype, copy=True)

    def _plain(self, key: str) -> Tensor:
        """ValueError if it is quantised: its values say little without their scales."""
        tensor = self._tensors[key]
        if tensor.dtype not in PLAIN:
            raise ValueError(
                f"model {self._name!r}: {key} in {self._file(key)}: wanted float32, bfloat16 or "
                f"float16, got {tensor.dtype}"
            )
        return tensor

    def _file(self, key: str) -> str:
        return str(self._tensors.file_of(key))

    def _key(self, module: nn.Module, entry: str) -> str | None:
        path = self._path(module, entry)
        keys = self._keys.get(self._core(path), [])
        if path in keys:
            return path
        if len(keys) > 1:
            raise ValueError(
                f"model {self._name!r}: wanted one tensor for {path} in {self._tensors.where}, "
                f"got {', '.join(sorted(keys))}"
            )
        return keys[0] if keys else None

    def _path(self, module: nn.Module, entry: str) -> str:
        return f"{self._paths[id(module)]}.{entry}"

    def _core(self, key: str) -> str:
        match = self._wrapped.match(key)
        return key[match.end() :] if match else key


class LayerTensors(Mapping[str, Tensor]):
    """A layer's state dict, norms as factors, each tensor read and brought to the device at each
    access.
    """

    def __init__(self, stored: Stored, layer: nn.Module, device: torch.device) -> None:
        self._stored = stored
        self._device = device
        self._owners: dict[str, tuple[nn.Module, str]] = {}
        for name in layer.state_dict():
            path, _, entry = name.rpartition(".")
            self._owners[name] = layer.get_submodule(path), entry

    def __getitem__(self, name: str) -> Tensor:
        module, entry = self._owners[name]
        return factor_of(module, self._stored.read(module, entry)).to(self._device)

    def __iter__(self) -> Iterator[str]:
        return iter(self._owners)

    def __len__(self) -> int:
        return len(self._owners)

    def __contains__(self, name: object) -> bool:
        return name in self._owners  # nothing is read for that


def _embeddings(
    stored: Stored, model: Any, *, tied: bool, device: torch.device
) -> tuple[Tensor, Tensor]:
    """(embedding, head), as transformers ties them: what the files lack is the other one, and what
    differs in them stays apart.
    """
    modules = model.get_input_embeddings(), model.get_output_embeddings()
    if tied:
        modules = tuple(m for m in modules if stored.has(m, "weight")) or modules[:1]
    read = [stored.read(module, "weight") for module in modules]
    if tied and torch.equal(read[0], read[-1]):
        del read[1:]
    moved = [tensor.to(device) for tensor in read]
    return moved[0], moved[-1]


def _take_generation_config(model: Any, path: str, *, local: bool) -> None:
    """As transformers does when it opens a model; it may name more end tokens."""
    try:
        model.generation_config = GenerationConfig.from_pretrained(path, local_files_only=local)
    except OSError:
        return  # there is no such file: what config.json says stays
