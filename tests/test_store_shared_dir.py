"""What is the shared_dir store's own: names, leftovers, whose folder it is."""

from __future__ import annotations

import errno
import os
import tempfile
import threading
from pathlib import Path
from typing import Any

import pytest

from specforge_ext.config import parse
from specforge_ext.store import shared_dir
from specforge_ext.store.base import ProducerLost, StaleRef, StoreError
from specforge_ext.store.ref import ref_from_json, ref_to_json
from specforge_ext.store.shared_dir import SharedDirConfig, SharedDirStore
from store_cases import LAYOUT_HASH, TIMEOUT_S, make_sample
from store_kinds import kill, receive, started


def config_of(folder: Path, **more: Any) -> SharedDirConfig:
    return SharedDirConfig(directory=folder, **more)


def files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def test_config() -> None:
    with pytest.raises(ValueError, match=r"store.max_slots: .*greater than 0, got 0"):
        parse(SharedDirConfig, {"max_slots": 0}, where="store")


def test_names_and_raw_bytes(tmp_path: Path) -> None:
    writer = SharedDirStore.writer(config_of(tmp_path, max_slots=1))
    epoch = writer.address().split(":")[1]
    sample = make_sample(1)
    for generation in (1, 2):
        ref = writer.put(sample, layout_hash=LAYOUT_HASH, timeout_s=TIMEOUT_S)
        name = f"{epoch}/00000000-{generation:010x}"
        assert files(tmp_path) == [name, f"{epoch}/owner"]
        data = (tmp_path / name).read_bytes()
        assert len(data) == ref.nbytes
        [first] = [t for t in ref.tensors if t.name == "float32"]
        wanted = sample.features["float32"].numpy().tobytes()
        assert data[first.offset : first.offset + first.nbytes] == wanted
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o600
        assert (tmp_path / epoch).stat().st_mode & 0o777 == 0o700
        writer.abort(ref)
    writer.close()
    writer.close()
    assert list(tmp_path.iterdir()) == []


def leave(pipe: Any, folder: Path) -> None:
    writer = SharedDirStore.writer(config_of(folder))
    ref = writer.put(make_sample(1), layout_hash=LAYOUT_HASH, timeout_s=TIMEOUT_S)
    (folder / writer.address().split(":")[1] / ".00000001-0000000001").write_bytes(b"half")
    pipe.send((writer.address(), ref_to_json(ref)))
    threading.Event().wait(600)


def test_leftovers_of_the_dead_are_reaped_and_of_the_living_not(tmp_path: Path) -> None:
    with started(leave, tmp_path) as (process, pipe):
        address, text = receive(pipe)
        reader = SharedDirStore.reader(address)
        writer = SharedDirStore.writer(config_of(tmp_path))
        assert writer.reap() == 0
        kill(process)
    ref = ref_from_json(text)
    reader.open(ref, layout_hash=LAYOUT_HASH, verify=True).release()
    assert writer.reap() == 1
    assert writer.reap() == 0
    assert files(tmp_path) == [f"{writer.address().split(':')[1]}/owner"]
    for call in (
        lambda: reader.open(ref, layout_hash=LAYOUT_HASH, verify=True),
        lambda: reader.ack(ref),
    ):
        with pytest.raises(ProducerLost, match=r"removed, its producer has ended or closed it"):
            call()


def test_a_new_writer_reaps(tmp_path: Path) -> None:
    with started(leave, tmp_path) as (process, pipe):
        receive(pipe)
        kill(process)
    assert len(files(tmp_path)) == 3
    SharedDirStore.writer(config_of(tmp_path)).close()
    assert files(tmp_path) == []


def test_second_ack_is_stale(tmp_path: Path) -> None:
    writer = SharedDirStore.writer(config_of(tmp_path))
    reader = SharedDirStore.reader(writer.address())
    ref = writer.put(make_sample(1), layout_hash=LAYOUT_HASH, timeout_s=TIMEOUT_S)
    reader.ack(ref)
    for call in (lambda: reader.ack(ref), lambda: writer.abort(ref)):
        with pytest.raises(StaleRef, match=r"slot 0 of generation 1, it was acknowledged already"):
            call()


def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Said by name; the slot and the half file are gone."""

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    writer = SharedDirStore.writer(config_of(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(StoreError, match=rf"{tmp_path}.*: no room on the disk: .*No space"):
            writer.put(make_sample(1), layout_hash=LAYOUT_HASH, timeout_s=TIMEOUT_S)
    assert writer.health().num_samples == 0
    assert [name.rpartition("/")[2] for name in files(tmp_path)] == ["owner"]


def test_folder_of_another_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = SharedDirStore.writer(config_of(tmp_path))
    uid = os.getuid()
    monkeypatch.setattr(shared_dir.os, "getuid", lambda: uid + 1)
    with pytest.raises(ValueError, match=rf"wanted a folder of this user, got one of {uid}"):
        SharedDirStore.reader(writer.address())


def test_default_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    writer = SharedDirStore.writer(SharedDirConfig())
    base = tmp_path / f"specforge-ext-{os.getuid()}"
    assert writer.address().endswith(f":{base}")
    assert base.stat().st_mode & 0o777 == 0o700
    writer.close()
