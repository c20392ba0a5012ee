"""The native arena under the sanitizers, and readers killed at random: tests/native."""

from __future__ import annotations

import pytest

from native_program import build, run


@pytest.mark.parametrize("sanitizers", ["thread", "address,undefined"])
def test_threads(sanitizers: str) -> None:
    run(build("arena_stress", sanitizers), "3000")


def test_kills() -> None:
    run(build("arena_kills", "address,undefined"), "200", "1")
