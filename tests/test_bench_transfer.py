"""The transfer benchmark: every way delivers, wrong bytes are an error, absence is said."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import transfer
import transfer_engines
import transfer_processes
from transfer_processes import DeliveryError, Fleet
from transfer_ways import (
    MEMCPY,
    MESSAGE,
    CopyProducer,
    MessageConsumer,
    Shared,
    Tell,
    Tensors,
)

SCRIPT = Path(transfer.__file__)
BY_NAME = {way.name: way for way in transfer.ALL_WAYS}
SAMPLE_BYTES = (1 << 20) + 5 * 32
"""The features, and 5 bytes for each of 32 tokens."""


def flip(tensor: torch.Tensor, at: int) -> None:
    tensor.view(-1).view(torch.uint8)[at] ^= 1


class LastByteOff(CopyProducer):
    """A byte that no look at the first byte of every page finds."""

    def deliver(self, consumer: int, tell: Tell) -> None:
        super().deliver(consumer, lambda copies: tell(self._spoil(copies)))

    @staticmethod
    def _spoil(copies: Tensors) -> Tensors:
        flip(copies["last"], -1)
        return copies


class LaterPageOff(MessageConsumer):
    """Right the first time, when all is compared; then a page is not what it was."""

    def release(self) -> None:
        flip(self._tensors["aux"], 4096)


class Failing(CopyProducer):
    def deliver(self, consumer: int, tell: Tell) -> None:
        raise RuntimeError("planted: the producer fails")


LAST_BYTE_OFF = replace(MEMCPY, name="last-byte-off", producer=LastByteOff)
LATER_PAGE_OFF = replace(MESSAGE, name="later-page-off", consumer=LaterPageOff)
FAILING = replace(MEMCPY, name="failing", producer=Failing)
MANY = ("memcpy", "specforge_ext/shm", "tcp-loopback", "torch-multiprocessing", "pickled-pipe")


@pytest.fixture(scope="module")
def shared() -> Iterator[Shared]:
    it = Shared()
    yield it
    it.close()


@pytest.fixture(scope="module")
def two_by_two(shared: Shared) -> Iterator[Fleet]:
    ways = [*(BY_NAME[name] for name in MANY), LAST_BYTE_OFF, LATER_PAGE_OFF]
    fleet = Fleet(1, ways, shared, producers=2, consumers=2)
    yield fleet
    fleet.kill()


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("transfer") / "out.json"
    command = [sys.executable, str(SCRIPT), "--quick", "--sizes", "1", "--json", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    out = json.loads(path.read_text())
    assert isinstance(out, dict)
    return out


def test_every_way_that_is_here_delivers_the_same_bytes(output: dict[str, Any]) -> None:
    rows = {row["impl"]: row for row in output["rows"]}
    assert rows.keys() | output["absent"].keys() == BY_NAME.keys()
    assert not rows.keys() & output["absent"].keys()
    assert not any(name.startswith("specforge_ext/sh") for name in output["absent"])
    for name, row in rows.items():
        assert row["verified_bytes"] == SAMPLE_BYTES, name
        assert 0 < row["view_p50_us"] <= row["view_p99_us"], name
        assert row["cpu_s_per_gb"] > 0 and row["minor_faults"] >= 0 and row["protocol"], name
        assert (row["gb_per_s"] is None) == (not BY_NAME[name].moves)
    assert rows["memcpy"]["share_of_floor"] == 1
    assert output["clock"].keys() == BY_NAME.keys()


@pytest.mark.parametrize("name", MANY)
def test_all_producers_deliver_to_all_consumers(two_by_two: Fleet, name: str) -> None:
    two_by_two.open(BY_NAME[name])
    assert two_by_two.verified_bytes[name] == 4 * SAMPLE_BYTES
    came = two_by_two.round(BY_NAME[name])
    assert len(came.deliveries) == 4
    assert all(0 < d.view_s <= d.whole_s <= came.wall_s for d in came.deliveries)


def test_other_bytes_than_were_sent_are_an_error(two_by_two: Fleet) -> None:
    with pytest.raises(DeliveryError, match="last-byte-off: other bytes came than were sent"):
        two_by_two.open(LAST_BYTE_OFF)


def test_a_page_that_changes_in_a_later_round_is_an_error(two_by_two: Fleet) -> None:
    two_by_two.open(LATER_PAGE_OFF)
    with pytest.raises(DeliveryError, match="later-page-off: other bytes came than were sent"):
        two_by_two.round(LATER_PAGE_OFF)


def test_a_process_that_ends_or_keeps_us_waiting_is_named(
    shared: Shared, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet = Fleet(1, [FAILING], shared, producers=1, consumers=1)
    try:
        with pytest.raises(RuntimeError, match="producer 0 ended with code 1: failing, to deliver"):
            fleet.open(FAILING)
        monkeypatch.setattr(transfer_processes, "TIMEOUT_S", 0.1)
        with pytest.raises(TimeoutError, match=r"waited 0.1 s for consumer 0: a sample"):
            fleet._consumers[0].answer("a sample")
    finally:
        fleet.kill()


def test_absent_ways_are_listed_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "nixl._api", None)
    reason = transfer_engines.nixl_absent()
    assert reason is not None and "wanted pip install nixl" in reason
    path = tmp_path / "out.json"
    monkeypatch.setattr(sys, "argv", ["transfer.py", "--ways", "nixl-read", "--json", str(path)])
    monkeypatch.setattr(transfer, "plans", lambda args: [])
    transfer.main()
    assert f"absent: nixl-read: {reason}" in capsys.readouterr().out
    assert json.loads(path.read_text())["absent"] == {"nixl-read": reason}


def test_slow_ways_leave_rounds_out(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0

    class Slow:
        def round(self, way: transfer.Way) -> str:
            nonlocal now
            now += 0.01 if way is MEMCPY else 0.2  # and five turns a round
            return way.name

    monkeypatch.setattr(transfer.time, "perf_counter", lambda: now)
    plan = transfer.Plan(1, 1, 1, rounds=20, budget_s=10.0)
    done: dict[str, Any] = transfer.take_turns(Slow(), [MEMCPY, MESSAGE], plan)
    assert len(done["memcpy"]) == 20
    assert len(done["message-only"]) == 5 * 11


def test_chart(output: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the extra `bench` is not installed")
    from transfer_chart import draw

    draw(output["rows"], tmp_path / "chart.png", "a note")
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")


def test_a_way_that_nobody_knows_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["transfer.py", "--ways", "pigeon"])
    with pytest.raises(SystemExit):
        transfer.main()
    assert "argument --ways: invalid choice: 'pigeon'" in capsys.readouterr().err
