"""Draft checkpoints on disk: written whole or not at all, read back without mercy."""

from __future__ import annotations

import difflib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from specforge_ext.methods.base import Method
from specforge_ext.records import DraftCheckpoint

WEIGHTS = "model.safetensors"
CONFIG = "config.json"

_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")


def write(checkpoint: DraftCheckpoint, directory: Path) -> None:
    """Write model.safetensors and config.json; `directory` never holds half of them.

    Everything is written and synced beside it, then renamed. A directory that is there already is
    moved aside first and removed last: a crash between the two renames leaves none, and the old one
    under `.<name>.old-*`. A write that is killed leaves `.<name>.new-*` behind.
    """
    directory = Path(directory)
    directory.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{directory.name}.new-", dir=directory.parent))
    try:
        tensors = {name: t.detach().cpu().contiguous() for name, t in checkpoint.tensors.items()}
        save_file(tensors, fresh / WEIGHTS, metadata={"format": "pt"})
        text = json.dumps(checkpoint.config, indent=2, sort_keys=True) + "\n"
        (fresh / CONFIG).write_text(text, encoding="utf-8")
        _share(fresh)
        for path in (fresh / WEIGHTS, fresh / CONFIG, fresh):
            _sync(path)
        _swap(fresh, directory)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise


def _share(directory: Path) -> None:
    """Readable by whom the umask allows; mkdtemp and safetensors make theirs private."""
    mode = (directory / CONFIG).stat().st_mode & 0o777
    (directory / WEIGHTS).chmod(mode)
    directory.chmod(mode | (mode & 0o444) >> 2)


def _swap(fresh: Path, directory: Path) -> None:
    if directory.exists():
        aside = Path(tempfile.mkdtemp(prefix=f".{directory.name}.old-", dir=directory.parent))
        # The destination of a directory's rename may exist if it is empty.
        directory.rename(aside)
        try:
            fresh.rename(directory)
        except OSError:
            aside.rename(directory)
            raise
        shutil.rmtree(aside)
    else:
        fresh.rename(directory)
    _sync(directory.parent)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_strict(directory: Path, method: Method) -> DraftCheckpoint:
    """The checkpoint of a directory, on the CPU, checked against the method's schema.

    Raises ValueError that lists every problem: unreadable files, further weight files (engines load
    all that they find), missing, unknown, misshapen keys, wrong dtypes, values that are not finite,
    t2d and d2t that disagree.
    """
    directory = Path(directory)
    config = read_config(directory)
    problems = [
        f"{path.name}: unexpected weight file beside {WEIGHTS}"
        for path in sorted(directory.iterdir())
        if path.suffix in _WEIGHT_SUFFIXES and path.name != WEIGHTS
    ]
    tensors = read_tensors(directory)
    schema = method.schema(config)
    problems += key_problems(tensors, schema)
    problems += value_problems(tensors)
    if problems:
        raise ValueError(f"{directory}: {len(problems)} problem(s): " + "; ".join(problems))
    return DraftCheckpoint(tensors=tensors, config=config)


def read_config(directory: Path, *, name: str = CONFIG) -> dict[str, object]:
    """ValueError unless it is there and a JSON object."""
    path = directory / name
    if not path.is_file():
        raise ValueError(f"{path}: wanted a draft's config.json, got no such file")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: wanted JSON: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path}: wanted a JSON object, got {type(config).__name__}")
    return config


def read_tensors(directory: Path) -> dict[str, Tensor]:
    """On the CPU. ValueError unless there is one safetensors file."""
    path = directory / WEIGHTS
    if not path.is_file():
        raise ValueError(f"{path}: wanted the draft's weights, got no such file")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path}: wanted a safetensors file: {error}") from None


def key_problems(
    tensors: Mapping[str, Tensor],
    schema: Mapping[str, tuple[tuple[int, ...], torch.dtype | None]],
) -> list[str]:
    """Keys that are missing, unknown, misshapen or of the wrong dtype, a line each."""
    problems = [f"{name}: missing" for name in sorted(schema.keys() - tensors.keys())]
    for name in sorted(tensors.keys() - schema.keys()):
        near = difflib.get_close_matches(name, schema.keys(), n=1)
        problems.append(f"{name}: unknown key" + (f", did you mean {near[0]}?" if near else ""))
    for name in sorted(tensors.keys() & schema.keys()):
        (shape, dtype), tensor = schema[name], tensors[name]
        if tuple(tensor.shape) != tuple(shape):
            problems.append(f"{name}: wanted shape {list(shape)}, got {list(tensor.shape)}")
        if dtype is None and not tensor.is_floating_point():
            problems.append(f"{name}: wanted a floating-point dtype, got {tensor.dtype}")
        elif dtype is not None and tensor.dtype != dtype:
            problems.append(f"{name}: wanted {dtype}, got {tensor.dtype}")
    return problems


def value_problems(tensors: Mapping[str, Tensor]) -> list[str]:
    """Values that are not finite, t2d and d2t that disagree, a line each."""
    problems = []
    for name, tensor in sorted(tensors.items()):
        if tensor.is_floating_point():
            bad = int((~torch.isfinite(tensor)).sum())
            if bad:
                problems.append(f"{name}: {bad} of {tensor.numel()} values are not finite")
    t2d, d2t = tensors.get("t2d"), tensors.get("d2t")
    if (t2d is None) != (d2t is None):
        problems.append("t2d and d2t: wanted both or neither")
    elif t2d is not None and d2t is not None:
        said = t2d.reshape(-1).nonzero().squeeze(1)
        if not torch.equal(said, d2t.reshape(-1).long() + torch.arange(d2t.numel())):
            problems.append("d2t: wanted nonzero(t2d) == d2t + arange(len(d2t)), which it is not")
    return problems
