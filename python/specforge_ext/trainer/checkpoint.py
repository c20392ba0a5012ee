"""Checkpoints: written under a temporary name, renamed when whole, so that any that is found is
whole.

checkpoints/step_00000100/          the state after 100 steps
    .metadata, __<rank>_0.distcp    torch.distributed.checkpoint: parameters, buffers, moments
    rng_<rank>.pt                   random states of each rank
    meta.json                       `Meta`

Of the draft it holds the state dict: a method registers frozen target tensors as buffers that are
not persistent, or they are written every time.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from specforge_ext.trainer import rng
from specforge_ext.trainer.distributed import World

FORMAT = 1
_NAME = re.compile(r"step_(\d{8,})")


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read; says which rank failed and why."""


@dataclass(frozen=True)
class Meta:
    """What a checkpoint says about itself.

    step: steps done, which is also the position in the data. updates: optimizer updates made (steps
    without weight make none). samples, tokens: trained so far, all ranks. identity: what a run that
    goes on from here must have in common with the one that wrote it. metric: value of the headline
    metric.
    """

    step: int
    world_size: int
    updates: int = 0
    samples: int = 0
    tokens: int = 0
    metric: float | None = None
    identity: Mapping[str, Any] = field(default_factory=dict)
    format: int = FORMAT


class Checkpointer:
    """The checkpoints of one run. Every method but `find` is for all ranks together.

    folder: on a file system that all ranks see. keep_last: number of newest ones that stay.
    keep_best: the one with the highest metric stays too.
    """

    def __init__(self, folder: Path, world: World, *, keep_last: int, keep_best: bool) -> None:
        self._folder = folder
        self._world = world
        self._keep_last = keep_last
        self._keep_best = keep_best

    def save(self, tensors: Mapping[str, Tensor], meta: Meta) -> Path:
        """Write a checkpoint of `tensors` (the same keys on every rank); returns its folder.

        One that is there for this step already is left as it is.
        """
        final = self._folder / f"step_{meta.step:08d}"
        partial = self._folder / f".partial-{final.name}"
        there = self._on_rank_0(lambda: self._prepare(final, partial), f"start of {final.name}")
        if there:
            return final
        writer = FileSystemWriter(partial, sync_files=True)
        with _dcp_errors(f"writing {final}"), self._world.collective(f"writing {final.name}"):
            state_dict_saver.save(dict(tensors), storage_writer=writer)
        with _synced(partial / f"rng_{self._world.rank}.pt") as file:
            torch.save(rng.capture(), file)
        self._world.barrier(f"end of writing {final.name}")
        if self._world.rank == 0:
            with _synced(partial / "meta.json") as file:
                file.write(json.dumps(asdict(meta), indent=1).encode())
            publish(partial, final)
            self._prune()
        return final

    def find(self) -> list[Path]:
        """The complete checkpoints, oldest first."""
        if not self._folder.is_dir():
            return []
        found = [p for p in self._folder.iterdir() if _NAME.fullmatch(p.name)]
        return sorted(found, key=lambda path: int(path.name[5:]))

    def choose(self, resume: str) -> Path | None:
        """The checkpoint to go on from, the same on all ranks; None to start anew.

        resume: "auto", "none" or a path. Raises ValueError if the path is no checkpoint, or if the
        folder holds checkpoints of a later step than the chosen one: they would be taken for newer.
        """
        path: Path | None = self._on_rank_0(lambda: self._choose(resume), "choice of a checkpoint")
        return path

    def load(self, path: Path, tensors: Mapping[str, Tensor]) -> Meta:
        """Read a checkpoint into `tensors`, in place, and restore the random states.

        Another number of ranks than wrote it may read it; then the random states stay as they are.
        Raises ValueError that names the first key that is missing, unknown or of another shape.
        """
        meta = read_meta(path)
        reader = FileSystemReader(path)
        _check_keys(path, reader, tensors)
        with _dcp_errors(f"reading {path}"), self._world.collective(f"reading {path.name}"):
            state_dict_loader.load(dict(tensors), storage_reader=reader)
        if meta.world_size == self._world.size:
            rng.restore(torch.load(path / f"rng_{self._world.rank}.pt", weights_only=True))
        return meta

    def _on_rank_0(self, work: Callable[[], Any], what: str) -> Any:
        """What `work` returns on rank 0, for all; its ValueError or OSError is raised on all."""
        result: Any = None
        if self._world.rank == 0:
            try:
                result = work()
            except (ValueError, OSError) as error:
                result = error
        result = self._world.gather(result, what)[0]
        if isinstance(result, (ValueError, OSError)):
            raise result
        return result

    def _prepare(self, final: Path, partial: Path) -> bool:
        """Make room for a new checkpoint; True if it is there already."""
        if final.exists():
            return True
        self._folder.mkdir(parents=True, exist_ok=True)
        for left_over in self._folder.glob(".partial-*"):
            shutil.rmtree(left_over)
        partial.mkdir()
        return False

    def _choose(self, resume: str) -> Path | None:
        found = self.find()
        if resume == "auto":
            return found[-1] if found else None
        path = None if resume == "none" else Path(resume)
        start = 0 if path is None else read_meta(path).step
        later = [p.name for p in found if int(p.name[5:]) > start]
        if later:
            raise ValueError(
                f"trainer.checkpoint.resume: wanted no checkpoint after step {start} in "
                f"{self._folder}, got {', '.join(later)}; go on with auto, remove them, or choose "
                "another output_dir"
            )
        return path

    def _prune(self) -> None:
        found = self.find()
        keep = set(found[-self._keep_last :])
        if self._keep_best:
            rated = [(meta.metric, p) for p in found if (meta := read_meta(p)).metric is not None]
            keep.update(p for _, p in sorted(rated, key=lambda pair: pair[0])[-1:])
        for path in found:
            if path not in keep:
                # Renamed first: a half-removed folder must not be found.
                doomed = path.with_name(f".partial-{path.name}")
                path.rename(doomed)
                shutil.rmtree(doomed)


@contextmanager
def _dcp_errors(what: str) -> Iterator[None]:
    """Failures that DCP gathered from the ranks; their class is a BaseException."""
    try:
        yield
    except CheckpointException as error:
        causes = "; ".join(f"rank {rank}: {found[0]!r}" for rank, found in error.failures.items())
        raise CheckpointError(f"{what}: {causes}") from error


def publish(partial: Path, final: Path) -> None:
    """Rename a whole checkpoint to the name under which it is found, durably."""
    _sync(partial)
    partial.rename(final)
    _sync(final.parent)


def read_meta(path: Path) -> Meta:
    """meta.json of a checkpoint. ValueError if it is none, or of another format."""
    file = path / "meta.json"
    if not file.is_file():
        raise ValueError(f"{path}: wanted a checkpoint, got no meta.json")
    data = json.loads(file.read_text(encoding="utf-8"))
    if data.get("format") != FORMAT:
        raise ValueError(
            f"{file}: wanted a checkpoint of format {FORMAT}, got {data.get('format')}"
        )
    known = {f.name for f in fields(Meta)}
    unknown = sorted(set(data) - known)
    if unknown:
        raise ValueError(f"{file}: wanted keys {', '.join(sorted(known))}, got {unknown[0]!r}")
    return Meta(**data)


def _check_keys(path: Path, reader: FileSystemReader, tensors: Mapping[str, Tensor]) -> None:
    stored = reader.read_metadata().state_dict_metadata
    for name, tensor in tensors.items():
        entry = stored.get(name)
        shape = entry.size if isinstance(entry, TensorStorageMetadata) else None
        if shape != tensor.shape:
            came = "nothing" if shape is None else str(list(shape))
            raise ValueError(f"{path}: {name}: wanted {list(tensor.shape)}, got {came}")
    for name in stored:
        if name not in tensors:
            raise ValueError(f"{path}: {name}: wanted no such tensor, got one")


@contextmanager
def _synced(path: Path) -> Iterator[IO[bytes]]:
    """A new file that has reached the disk when the block ends."""
    with path.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
