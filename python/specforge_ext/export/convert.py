"""Checkpoints of drafts from one format to another, without loss or not at all."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from specforge_ext.export.checkpoint import CONFIG, WEIGHTS, write
from specforge_ext.export.formats import (
    FORMATS,
    Portable,
    Target,
    interpret,
    module_of,
    read_files,
)
from specforge_ext.records import DraftCheckpoint


@dataclass(frozen=True)
class Converted:
    """source, to: formats. notes: what was added, left out or changed beside names."""

    method: str
    source: str
    to: str
    num_tensors: int
    notes: tuple[str, ...]

    def __str__(self) -> str:
        lines = [f"{self.method}: {self.source} -> {self.to}, {self.num_tensors} tensors"]
        return "\n".join([*lines, *(f"  {note}" for note in self.notes)])


def convert(
    source: Path,
    dest: Path,
    *,
    to: str,
    source_format: str | None = None,
    target: Path | None = None,
    target_name: str | None = None,
    config: Path | None = None,
    depth: int | None = None,
    ignored: tuple[str, ...] = (),
) -> Converted:
    """Write the draft of `source` to the directory `dest` in format `to`.

    Before anything is written the result is read back, and compared bit for bit.

    source: a directory, or SpecForge's training_state.pt with the draft's config.json in `config`.
    source_format: None to find out. target: the target's Hugging Face folder, for what formats hold
    of it and to check that the draft fits; target_name: what the checkpoint is to call it. depth:
    tokens a step, of speculators checkpoints. ignored: keys of config.json that change nothing.

    Raises ValueError, and writes nothing, when something would be lost, or a server would load the
    result as another draft than it is.
    """
    for key, form in (("--to", to), ("--from", source_format)):
        if form is not None and form not in FORMATS:
            raise ValueError(f"{key}: wanted one of {', '.join(FORMATS)}, got {form!r}")
    if target is None and target_name is not None:
        raise ValueError(f"--target-name: wanted --target beside it, got {target_name!r} alone")
    if source.resolve() == dest.resolve():
        raise ValueError(f"DEST: wanted another directory than SOURCE, got {dest}")
    check_dest(dest)
    notes: list[str] = []
    known = Target.read(target, name=target_name) if target is not None else None
    came, draft = interpret(
        *read_files(source, config),
        form=source_format,
        target=known,
        ignored=ignored,
        notes=notes,
    )
    held, tensors, settings = module_of(draft.method).write(draft, to, known, depth)
    if (held.embedding is None) != (draft.embedding is None):
        added = held.embedding is not None
        notes.append(f"embedding: the target's, {'added' if added else 'left out'}")
    _, again = interpret(json.loads(json.dumps(settings)), tensors, target=known)
    _compare(held, again)
    write(DraftCheckpoint(tensors, settings), dest)
    return Converted(draft.method, came, to, len(tensors), tuple(notes))


def check_dest(dest: Path) -> None:
    """ValueError if `dest`, which is replaced, is a file or holds other things than a draft."""
    if dest.exists() and not dest.is_dir():
        raise ValueError(f"DEST: wanted a directory to write, got the file {dest}")
    kept = sorted(p.name for p in dest.iterdir()) if dest.is_dir() else []
    foreign = [name for name in kept if name not in (WEIGHTS, CONFIG)]
    if foreign:
        raise ValueError(
            f"DEST: wanted a new directory, or one with {WEIGHTS} and {CONFIG} only, since it is "
            f"replaced as a whole; {dest} has {foreign[0]!r}"
        )


def _compare(wanted: Portable, came: Portable) -> None:
    """What is to be written reads as the draft that it is to be, bit for bit."""
    ours = {**wanted.tensors, **_embedding(wanted)}
    theirs = {**came.tensors, **_embedding(came)}
    differ = [
        name
        for name in sorted(ours.keys() | theirs.keys())
        if name not in ours
        or name not in theirs
        or ours[name].dtype != theirs[name].dtype
        or not torch.equal(ours[name], theirs[name])
    ]
    differ += [
        key
        for key in sorted(wanted.config.keys() | came.config.keys())
        if wanted.config.get(key) != came.config.get(key)
    ]
    if differ or wanted.layer_ids != came.layer_ids:
        raise RuntimeError(
            f"convert: read back, these would be another draft's: {differ}, layers "
            f"{list(wanted.layer_ids)} and {list(came.layer_ids)}"
        )


def _embedding(draft: Portable) -> dict[str, torch.Tensor]:
    return {} if draft.embedding is None else {"embed_tokens.weight": draft.embedding}
