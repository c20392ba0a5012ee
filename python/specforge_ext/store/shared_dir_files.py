"""Folders and files of the shared_dir store: who owns them, whole files only, what is left."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import stat
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from specforge_ext import _C
from specforge_ext.copies import copied
from specforge_ext.records import SampleRef, TensorRef
from specforge_ext.store import payload
from specforge_ext.store.base import ProducerLost, StaleRef, StoreError

OWNER = "owner"
"""Locked by a folder's writer for as long as it lives."""


class MappedFile(mmap.mmap):
    """A file's bytes, copied only where somebody writes to them."""

    nbytes: int

    def __new__(cls, fd: int, nbytes: int) -> MappedFile:
        # No memory can be mapped without a byte: one that is nobody's stands for it.
        mapped = (
            super().__new__(cls, fd, nbytes, access=mmap.ACCESS_COPY)
            if nbytes
            else super().__new__(cls, -1, 1)
        )
        mapped.nbytes = nbytes
        return mapped

    def crc32c(self, offset: int, nbytes: int) -> int:
        return _C.crc32c(memoryview(self)[offset : offset + nbytes])


def reap(base: Path) -> int:
    """Remove the folders of writers that have ended; how many those were."""
    num_removed = 0
    for folder in base.glob("[0-9a-f]" * 16):
        try:
            fd = os.open(folder / OWNER, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            continue  # another reaper was faster
        try:
            if _lock(fd, fcntl.LOCK_EX):
                remove_folder(folder)
                num_removed += 1
        finally:
            os.close(fd)
    return num_removed


def remove_folder(folder: Path) -> None:
    """The owner's file last: who is killed here leaves what the next reaper finds."""
    for path in folder.iterdir():
        if path.name != OWNER:
            path.unlink(missing_ok=True)
    (folder / OWNER).unlink()
    folder.rmdir()


def base_of(directory: Path | None) -> Path:
    if directory is not None:
        directory.mkdir(parents=True, exist_ok=True)
        return directory.resolve()
    base = Path(tempfile.gettempdir()).resolve() / f"specforge-ext-{os.getuid()}"
    base.mkdir(mode=0o700, exist_ok=True)
    expect_own(base)  # anybody may make a directory of that name there
    return base


def make_folder(base: Path, epoch: str) -> int:
    """The descriptor that holds the lock. The folder gets its name only when it is locked."""
    new = base / f".{epoch}"
    new.mkdir(mode=0o700)
    fd = os.open(new / OWNER, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    if not _lock(fd, fcntl.LOCK_EX):
        raise StoreError(f"{new / OWNER}: wanted its lock, but another process has it")
    new.rename(base / epoch)
    return fd


def _lock(fd: int, kind: int) -> bool:
    """Whether the lock was to be had at once."""
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def is_locked(folder: Path) -> bool:
    try:
        fd = os.open(folder / OWNER, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return False
    try:
        return not _lock(fd, fcntl.LOCK_SH)
    finally:
        os.close(fd)


def expect_own(folder: Path) -> None:
    try:
        status = folder.lstat()
    except FileNotFoundError:
        raise ProducerLost(f"{folder}: no such folder, its producer has ended") from None
    if status.st_uid != os.getuid() or not stat.S_ISDIR(status.st_mode):
        raise ValueError(f"{folder}: wanted a folder of this user, got one of {status.st_uid}")


def name_of(ref: SampleRef) -> str:
    return f"{ref.slot:08x}-{ref.generation:010x}"


def stale(ref: SampleRef) -> StaleRef:
    return StaleRef(
        f"sample {ref.sample_id!r}: wanted slot {ref.slot} of generation {ref.generation}, "
        "it was acknowledged already"
    )


def remove(folder: Path, ref: SampleRef) -> None:
    try:
        (folder / name_of(ref)).unlink()
    except FileNotFoundError:
        raise stale(ref) from None


def write(
    path: Path, planned: SampleRef, tensors: Mapping[str, Tensor], *, checksum: bool
) -> tuple[TensorRef, ...]:
    """The whole file under another name first: no reader ever finds a part of it.

    ValueError if values that are to be encoded are not finite.
    """
    partial = path.with_name(f".{path.name}")
    fd = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    written = []
    try:
        try:
            copied("put", payload.feature_bytes(planned))
            os.ftruncate(fd, planned.nbytes)  # the gaps between tensors stay holes
            for tensor in planned.tensors:
                written.append(_write_tensor(fd, tensor, tensors[tensor.name], checksum))
        finally:
            os.close(fd)
        partial.rename(path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StoreError(f"{path.parent}: no room on the disk: {error}") from None
        raise
    return tuple(written)


def _write_tensor(fd: int, ref: TensorRef, tensor: Tensor, checksum: bool) -> TensorRef:
    if ref.encoding != "none":
        feature = payload.room_for(ref)
        written = payload.encode(ref, tensor, feature, checksum=checksum)
        copied("encode", ref.nbytes + ref.scales_nbytes)
        _write_at(fd, payload.raw_bytes(feature.codes), ref.offset)
        _write_at(fd, payload.raw_bytes(feature.scales), ref.scales_offset)
        return written
    data = payload.raw_bytes(tensor)
    _write_at(fd, data, ref.offset)
    return replace(ref, checksum=_C.crc32c(data) if checksum else None)


def _write_at(fd: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(fd, data, offset)  # at most 2 GiB at a time
        data, offset = data[written:], offset + written
