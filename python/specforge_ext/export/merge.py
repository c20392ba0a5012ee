"""Put an export's tensors into a copy of the target's checkpoint.

For drafts that servers read from the target's own files (multi-token prediction). Servers read
every tensor of every file that they open, so the old ones must not stay: the files that hold them
are written anew, under their names, and the index stays right. All others are links.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from specforge_ext.export.checkpoint import read_config, read_tensors

INDEX = "model.safetensors.index.json"


def merge(tensors: Mapping[str, Tensor], target: Path, out: Path) -> tuple[Path, ...]:
    """Write `out`: the checkpoint of `target` with these tensors in place of its own.

    The files that were written anew are returned, the others are symbolic links. `target`: a
    directory of safetensors files. `out` must not exist; it is there whole or not at all.
    ValueError, before anything is written, for a name that the target lacks or a tensor of another
    shape or dtype than the target's.
    """
    target, out = Path(target).resolve(), Path(out)
    if out.exists():
        raise ValueError(f"merge: wanted {out} to be new, it is there")
    files = _files(target)
    _check(tensors, target, files)
    touched = sorted({files[name] for name in tensors})
    out.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{out.name}.new-", dir=out.parent))
    try:
        for path in sorted(target.iterdir()):
            if path.name not in touched:
                (fresh / path.name).symlink_to(path, target_is_directory=path.is_dir())
        for name in touched:
            kept = load_file(target / name)
            kept |= {key: tensors[key].contiguous() for key in kept.keys() & tensors.keys()}
            save_file(kept, fresh / name, metadata={"format": "pt"})
        fresh.chmod(target.stat().st_mode & 0o777 | 0o200)
        fresh.rename(out)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    return tuple(out / name for name in touched)


def merge_export(export: Path, target: Path, out: Path) -> tuple[Path, ...]:
    """`merge` the tensors of an export's directory. ValueError if it has none that can be read."""
    return merge(read_tensors(Path(export)), target, out)


def _files(target: Path) -> dict[str, str]:
    """The file of each tensor."""
    index = target / INDEX
    if index.is_file():
        table = read_config(target, name=INDEX).get("weight_map")
        if not isinstance(table, dict):
            raise ValueError(f"{index}: wanted a weight_map of names to files, got {table!r}")
        return table
    shards = sorted(path for path in target.glob("*.safetensors") if path.is_file())
    if len(shards) != 1:
        raise ValueError(
            f"merge: wanted {INDEX} or one safetensors file in {target}, found {len(shards)} files"
        )
    with safe_open(shards[0], framework="pt", device="cpu") as file:
        return dict.fromkeys(file.keys(), shards[0].name)


def _check(tensors: Mapping[str, Tensor], target: Path, files: Mapping[str, str]) -> None:
    if tensors and not tensors.keys() & files.keys():
        raise ValueError(
            f"merge into {target}: wanted an mtp export, whose tensors the target has too, got "
            f"{len(tensors)} that it has not: {', '.join(sorted(tensors)[:3])}, ..."
        )
    problems = [f"{name}: the target has none" for name in sorted(tensors.keys() - files.keys())]
    for name in sorted(tensors.keys() & files.keys()):
        with safe_open(target / files[name], framework="pt", device="cpu") as file:
            wanted = file.get_tensor(name)
        got = tensors[name]
        if got.shape != wanted.shape or got.dtype != wanted.dtype:
            problems.append(
                f"{name}: wanted {list(wanted.shape)} {wanted.dtype}, "
                f"got {list(got.shape)} {got.dtype}"
            )
    if problems:
        raise ValueError(f"merge into {target}: {'; '.join(problems)}")
