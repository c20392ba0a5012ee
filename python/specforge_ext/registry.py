"""Registries: a name in a recipe -> a factory. An entry is an import path: naming it is free."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterator
from typing import Any


class Registry:
    """Maps names to "module:attribute"; the module is imported at the first `get`."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, str] = {}

    def add(self, name: str, target: str) -> None:
        if name in self._entries:
            raise ValueError(
                f"{self.kind} {name!r} is registered already, as {self._entries[name]}"
            )
        self._entries[name] = target

    def get(self, name: str) -> Any:
        """The registered object. ValueError names the nearest known name when there is none."""
        if name not in self._entries:
            raise ValueError(unknown_name(self.kind, name, list(self._entries)))
        module, _, attribute = self._entries[name].partition(":")
        return getattr(importlib.import_module(module), attribute)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries


def unknown_name(kind: str, name: str, known: list[str]) -> str:
    """A sentence for an error: what is unknown, the nearest known name, all known names."""
    close = difflib.get_close_matches(name, known, n=3)
    near = [other for other in close if other.startswith(name)] or close
    hint = f", did you mean {near[0]!r}?" if near else "."
    return f"unknown {kind} {name!r}{hint} Known: {', '.join(sorted(known))}"
