"""A target's files as a mapping of their tensors, opened when they are asked for."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


class CheckpointTensors(Mapping[str, Tensor]):
    """Public name -> tensor on the CPU, read anew at each access; nothing else is read then.

    transformers drops what its model has no place for, e.g. layers for multi-token prediction; here
    it is still there. path: a directory, or a hub name; of that one, files that are not in the
    cache are fetched one by one when they are needed, or with `local` are not there. A model
    without safetensors files has no tensors here.
    """

    def __init__(self, path: str, *, local: bool = True) -> None:
        self.path = path
        self._local = local

    def __getitem__(self, name: str) -> Tensor:
        with _opened(self.file_of(name)) as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    @property
    def where(self) -> str:
        """What lists the tensors, for errors: a file, or the model if it has none."""
        return str(self._list or self.path)

    def file_of(self, name: str) -> Path:
        """The file of a tensor. KeyError without the tensor, ValueError without the file."""
        found = self._find(self._files[name])
        if found is None:
            raise ValueError(f"{self.where}: wanted the file {self._files[name]!r}, found none")
        return found

    @cached_property
    def _list(self) -> Path | None:
        return self._find(WEIGHTS) or self._find(INDEX)

    @cached_property
    def _files(self) -> dict[str, str]:
        """The file's name of each tensor. ValueError if the index is not one, or names a file that
        the directory does not have.
        """
        if self._list is None:
            return {}
        if self._list.name == WEIGHTS:
            with _opened(self._list) as file:
                return dict.fromkeys(file.keys(), WEIGHTS)
        table = json.loads(self._list.read_text(encoding="utf-8")).get("weight_map")
        if not isinstance(table, dict):
            raise ValueError(f"{self._list}: wanted a weight_map of names to files, got {table!r}")
        if self._directory is not None:
            missing = [name for name in sorted(set(table.values())) if self._find(name) is None]
            if missing:
                raise ValueError(f"{self._list}: wanted the files {missing} beside it, found none")
        return {str(name): str(file) for name, file in table.items()}

    @cached_property
    def _directory(self) -> Path | None:
        directory = Path(self.path).expanduser()
        return directory if directory.is_dir() else None

    def _find(self, name: str) -> Path | None:
        if self._directory is not None:
            path = self._directory / name
            return path if path.is_file() else None
        # transformers takes seconds to import: only who reads a hub model's files pays.
        from transformers.utils.hub import cached_file

        found = cached_file(
            self.path,
            name,
            local_files_only=self._local,
            _raise_exceptions_for_missing_entries=False,
        )
        return None if found is None else Path(found)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """ValueError for a file that was cut, or is of another format."""
    try:
        file = safe_open(path, framework="pt", device="cpu")
    except SafetensorError as error:
        raise ValueError(f"{path}: wanted a whole safetensors file: {error}") from None
    with file:
        yield file
