"""A draft apart from any checkpoint format, and what of a target formats want to know."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors import safe_open
from torch import Tensor

from specforge_ext.export.checkpoint import read_config
from specforge_ext.methods._export import count


@dataclass(frozen=True)
class Portable:
    """method: key of METHODS. layer_ids: HF `hidden_states` indices of the features.

    tensors: under the names of our exports; d2t and t2d with a part of the vocabulary only.
    config: config.json of our export, without the keys that name layers.
    embedding: [V, H] that lies in the checkpoint, None where there is none.
    depth: tokens a step that the checkpoint asks for, None where it does not.
    """

    method: str
    layer_ids: tuple[int, ...]
    tensors: Mapping[str, Tensor]
    config: Mapping[str, object]
    embedding: Tensor | None = None
    depth: int | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Of all the floating-point tensors."""
        return next(t.dtype for t in self.tensors.values() if t.is_floating_point())


@dataclass(frozen=True)
class Target:
    """A target's Hugging Face folder. name: what checkpoints are to call it."""

    folder: Path
    name: str
    architectures: tuple[str, ...]
    num_layers: int
    hidden_size: int
    vocab_size: int
    max_position_embeddings: int

    @classmethod
    def read(cls, folder: Path, *, name: str | None = None) -> Target:
        """ValueError if there is no config.json, or a size is missing in it."""
        config = read_config(folder)
        text = config.get("text_config", config)
        if not isinstance(text, Mapping):
            raise ValueError(f"{folder}: config.json text_config: wanted a mapping, got {text!r}")
        architectures = config.get("architectures")
        if not isinstance(architectures, list) or not architectures:
            raise ValueError(
                f"{folder}: config.json architectures: wanted a list, got {architectures!r}"
            )
        return cls(
            folder=folder,
            name=name or str(folder),
            architectures=tuple(architectures),
            num_layers=count(text, "num_hidden_layers"),
            hidden_size=count(text, "hidden_size"),
            vocab_size=count(text, "vocab_size"),
            max_position_embeddings=count(text, "max_position_embeddings"),
        )

    def embedding(self) -> Tensor:
        """[V, H], in the target's dtype. ValueError if no file has it."""
        index = self.folder / "model.safetensors.index.json"
        files = [self.folder / "model.safetensors"]
        if index.is_file():
            parts = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            files = [self.folder / part for name, part in parts.items() if _is_embedding(name)]
        for path in files:
            if path.is_file():
                with safe_open(path, framework="pt", device="cpu") as file:
                    for name in file.keys():  # noqa: SIM118
                        if _is_embedding(name):
                            found: Tensor = file.get_tensor(name)
                            return found
        raise ValueError(
            f"{self.folder}: wanted embed_tokens.weight in its safetensors, found none"
        )


def _is_embedding(name: str) -> bool:
    return name.endswith("embed_tokens.weight")


class Format(Protocol):
    """A method's formats: a module of this package."""

    def read(
        self,
        config: Mapping[str, object],
        tensors: Mapping[str, Tensor],
        form: str,
        target: Target | None,
        ignored: tuple[str, ...],
    ) -> Portable: ...

    def write(
        self, draft: Portable, form: str, target: Target | None, depth: int | None
    ) -> tuple[Portable, dict[str, Tensor], dict[str, object]]: ...


def wanted_target(target: Target | None, why: str) -> Target:
    """ValueError that tells why a target is needed."""
    if target is None:
        raise ValueError(f"--target: wanted the target's folder, {why}")
    return target


def embedding_to_add(draft: Portable, target: Target | None, *, form: str) -> Tensor:
    """The draft's own embedding, else the target's in the draft's dtype.

    ValueError if rounding to that dtype would change it.
    """
    if draft.embedding is not None:
        return draft.embedding
    found = wanted_target(target, f"whose embedding {form} checkpoints hold").embedding()
    rounded = found.to(draft.dtype)
    if not torch.equal(rounded.to(found.dtype), found):
        raise ValueError(
            f"embed_tokens: wanted the target's {found.dtype} without rounding in {form}, but the "
            f"draft is {draft.dtype}"
        )
    return rounded


def check_embedding_is_targets(draft: Portable, target: Target | None, *, form: str) -> None:
    """For formats without an embedding: ValueError unless the draft's own is the target's."""
    if draft.embedding is None:
        return
    why = f"to see whether the draft's own embedding, which {form} checkpoints do not hold, is its"
    found = wanted_target(target, why).embedding()
    if not torch.equal(found.to(draft.embedding.dtype), draft.embedding):
        raise ValueError(
            f"embed_tokens.weight: wanted the target's, which is what {form} takes, got another: "
            "the draft was trained with an embedding of its own"
        )


def mapping(config: Mapping[str, object], key: str) -> Mapping[str, object]:
    """A section, empty where there is none. ValueError if it is something else."""
    section = config.get(key)
    if section is None:
        return {}
    if not isinstance(section, Mapping):
        raise ValueError(f"config.json {key}: wanted a mapping, got {section!r}")
    return section


def ids(value: object, key: str) -> tuple[int, ...]:
    """ValueError unless it is a list of ascending counts."""
    if not isinstance(value, (list, tuple)) or not all(type(i) is int for i in value):
        raise ValueError(f"config.json {key}: wanted a list of layers, got {value!r}")
    if not value or list(value) != sorted(set(value)) or value[0] < 0:
        raise ValueError(f"config.json {key}: wanted ascending layers, got {list(value)}")
    return tuple(value)
