"""The native arena under the sanitizers, and readers killed at random: tests/native."""

from __future__ import annotations

from pathlib import Path

import pytest

from native_program import build, run, run_anyhow


@pytest.mark.parametrize("sanitizers", ["thread", "address,undefined"])
def test_threads(sanitizers: str, tmp_path: Path) -> None:
    run(build("arena_stress", sanitizers), "3000", str(tmp_path))


def test_planted_race_is_seen(tmp_path: Path) -> None:
    """A producer that writes after it published, so that the test above can fail."""
    done = run_anyhow(build("arena_stress", "thread", "PLANTED_RACE"), "300", str(tmp_path))
    assert done.returncode != 0
    assert "WARNING: ThreadSanitizer: data race" in done.stderr
    assert "arena_stress.cpp" in done.stderr


def test_kills() -> None:
    run(build("arena_kills", "address,undefined"), "200", "1")
