"""Tokenised prompts on disk, under the hash of all that they were made of."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from specforge_ext.prompts.base import PromptSet, Skipped

FORMAT = "1"
"""Part of every key; a change of the file's layout, or of how masks are made, gives a new one."""


def content_key(paths: Sequence[Path], *parts: object) -> str:
    """32 hexadecimal digits: a hash of the files' bytes, in order, and of `parts` (JSON values)."""
    digest = hashlib.sha256(f"{FORMAT}:{json.dumps(parts, sort_keys=True)}".encode())
    for path in paths:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:32]


def cached(directory: Path | None, key: str, make: Callable[[], PromptSet]) -> PromptSet:
    """The set under `key` in `directory`, made and written if it is not there; None: always made.

    Writers may race: each writes a file of its own and renames it, and all write the same bytes.
    ValueError if a file is there and cannot be read.
    """
    if directory is None:
        return make()
    path = directory / f"prompts-{key}.safetensors"
    if not path.exists():
        save(make(), path)
    return load(path)


def save(prompts: PromptSet, path: Path) -> None:
    """Write a set under a temporary name, then rename it."""
    directory = path.parent
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {
        "input_ids": prompts.input_ids,
        "loss_mask": prompts.loss_mask,
        "offsets": prompts.offsets,
        "sample_ids": torch.from_numpy(
            np.array(bytearray("".join(f"{i}\n" for i in prompts.sample_ids), "ascii"))
        ),
    }
    metadata = {
        "skipped": json.dumps([[s.where, s.reason] for s in prompts.skipped]),
        "num_truncated": str(prompts.num_truncated),
    }
    handle, name = tempfile.mkstemp(dir=directory, prefix=path.name, suffix=".tmp")
    os.close(handle)
    temporary = Path(name)
    try:
        save_file(tensors, temporary, metadata=metadata)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def load(path: Path) -> PromptSet:
    """A set that `save` wrote. ValueError if the file is damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata: dict[str, Any] = file.metadata()
        prompts = PromptSet(
            sample_ids=tuple(bytes(tensors["sample_ids"].numpy()).decode().split("\n")[:-1]),
            input_ids=tensors["input_ids"],
            loss_mask=tensors["loss_mask"],
            offsets=tensors["offsets"],
            skipped=tuple(Skipped(*pair) for pair in json.loads(metadata["skipped"])),
            num_truncated=int(metadata["num_truncated"]),
        )
    except (SafetensorError, KeyError) as error:
        raise ValueError(
            f"{path}: wanted a cache of prompts, found a damaged file ({error}); remove it"
        ) from error
    if len(prompts) + 1 != len(prompts.offsets):
        raise ValueError(f"{path}: wanted {len(prompts) + 1} offsets, got {len(prompts.offsets)}")
    return prompts
