"""A target's files as a mapping of their tensors, opened when they are asked for."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


class CheckpointTensors(Mapping[str, Tensor]):
    """Public name -> tensor on the CPU, read anew at each access.

    transformers drops what its model has no place for, e.g. layers for multi-token prediction; here
    it is still there. path: a directory, or a hub name that transformers has already fetched (this
    never goes online). A model without safetensors files has no tensors here.
    """

    def __init__(self, path: str) -> None:
        self.path = path

    def __getitem__(self, name: str) -> Tensor:
        with safe_open(self.files[name], framework="pt", device="cpu") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)

    @cached_property
    def files(self) -> dict[str, Path]:
        """The file of each tensor. ValueError if the index is not one, or names a file that is not
        there.
        """
        if (single := self._find(WEIGHTS)) is not None:
            with safe_open(single, framework="pt", device="cpu") as file:
                return dict.fromkeys(file.keys(), single)
        if (index := self._find(INDEX)) is None:
            return {}
        table = json.loads(index.read_text(encoding="utf-8")).get("weight_map")
        if not isinstance(table, dict):
            raise ValueError(f"{index}: wanted a weight_map of names to files, got {table!r}")
        files = {name: self._find(shard) for name, shard in table.items()}
        missing = sorted({str(table[name]) for name, path in files.items() if path is None})
        if missing:
            raise ValueError(f"{index}: wanted the files {missing} beside it, found none")
        return {name: path for name, path in files.items() if path is not None}

    def _find(self, name: str) -> Path | None:
        directory = Path(self.path).expanduser()
        if directory.is_dir():
            return directory / name if (directory / name).is_file() else None
        # transformers takes seconds to import: only who reads a hub model's files pays.
        from transformers.utils.hub import cached_file

        found = cached_file(
            self.path, name, local_files_only=True, _raise_exceptions_for_missing_entries=False
        )
        return None if found is None else Path(found)
