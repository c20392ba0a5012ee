"""The recorded cases, and what the comparison says of the others."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import parity

GOLDEN = Path(__file__).parent / "data" / "golden"


@pytest.mark.parametrize(
    "name", ["eagle3_cold", "eagle3_trained", "eagle3_ragged", "eagle3_lkalpha", "peagle"]
)
def test_recorded_losses_and_gradients(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert parity.main([str(GOLDEN / name)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [[name, "ok"]] * 2
    assert "compaction" in lines[0] and "all rows" in lines[1]


@pytest.mark.parametrize("name", ["dflash_cold", "dflash_gamma7", "dflash_dpace", "dspark_vanilla"])
def test_recorded_block_drafts(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert parity.main([str(GOLDEN / name)]) == 0
    assert capsys.readouterr().out.split()[:2] == [name, "ok"]


def test_recorded_domino(capsys: pytest.CaptureFixture[str]) -> None:
    assert parity.main([str(GOLDEN / "domino_base")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [["domino_base", "ok"]] * 2
    assert "rows" in lines[0] and "micro batch" in lines[1]


def test_unsupported_is_a_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    read_case = parity.read_case

    def renamed(folder: Path) -> parity.Case:
        case = read_case(folder)
        if folder.name == "domino_base":
            case.info["method"] = "medusa"
        return case

    monkeypatch.setattr(parity, "read_case", renamed)
    assert parity.main([str(GOLDEN / "eagle3_cold"), str(GOLDEN / "domino_base")]) == 1
    out = capsys.readouterr().out
    assert "unsupported method 'medusa'" in out and "eagle3_cold" in out


def test_unsupported_prefix_is_a_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    case = parity.read_case(GOLDEN / "domino_base")
    case.info["options"]["pure_draft_prefix_len"] = 2
    monkeypatch.setattr(parity, "read_case", lambda folder: case)
    assert parity.main(["anything"]) == 1
    assert "unsupported option pure_draft_prefix_len=2" in capsys.readouterr().out


def test_unsupported_loss_is_a_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    case = parity.read_case(GOLDEN / "eagle3_ragged")
    case.info["options"]["loss"] = "focal"
    monkeypatch.setattr(parity, "read_case", lambda folder: case)
    assert parity.main(["anything"]) == 1
    assert "unsupported option loss='focal' of method 'eagle3'" in capsys.readouterr().out


def test_wrong_numbers_are_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    case = parity.read_case(GOLDEN / "eagle3_ragged")
    case.tensors["grad.fc.weight"][0, 0] += 1e-3 * case.tensors["grad.fc.weight"].abs().max()
    monkeypatch.setattr(parity, "read_case", lambda folder: case)
    assert parity.main(["anything"]) == 1


def test_relative_error_of_bad_numbers_is_infinite() -> None:
    one = torch.ones(3)
    assert parity.relative_error(one * float("nan"), one) == float("inf")
    assert parity.relative_error(one[:2], one) == float("inf")
    assert parity.relative_error(torch.zeros(3), torch.zeros(3)) == 0
