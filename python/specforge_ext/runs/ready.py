"""What can be known before anything is loaded or started: the files that a run reads and writes."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from specforge_ext.runs.data import SPLITS, prompt_source
from specforge_ext.runs.recipe import Recipe


def missing_data(recipe: Recipe) -> list[str]:
    """What the sources of prompts lack, a sentence with its key each."""
    problems = []
    for split in SPLITS:
        try:
            prompt_source(getattr(recipe.data, split), where=f"data.{split}").check()
        except ValueError as error:
            problems.append(f"data.{split}.{error}")
    return problems


@contextmanager
def ready(recipe: Recipe, *, rank: int) -> Iterator[None]:
    """Have the files of a run, and keep other runs out of output_dir. ValueError names the key."""
    if problems := missing_data(recipe):
        raise ValueError("; ".join(problems))
    _make(recipe.output_dir)
    if rank != 0:
        yield
        return
    with _alone(recipe.output_dir):
        yield


def _make(output_dir: Path) -> None:
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"output_dir: wanted a folder to write to, got {str(output_dir)!r}: {error.strerror}"
        ) from None
    if not os.access(output_dir, os.W_OK | os.X_OK):
        raise ValueError(
            f"output_dir: wanted a folder to write to, got {str(output_dir)!r}: no permission"
        )


@contextmanager
def _alone(output_dir: Path) -> Iterator[None]:
    """The lock ends with the process, however that ends."""
    with (output_dir / ".lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"output_dir: wanted a folder that no other run writes to, got "
                f"{str(output_dir)!r}, where one is under way"
            ) from None
        yield
