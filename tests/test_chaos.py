"""A producer and three readers killed at random, native calls included: arena_chaos.cpp.

After every round: no view showed other bytes (checksum and generation), no wait outlasted its
deadline, every slot and byte came back, what a killed producer published was still read.

SPECFORGE_EXT_CHAOS_KILLS and SPECFORGE_EXT_CHAOS_SEED: a longer run, or the one that failed.
"""

from __future__ import annotations

import os
import random
import re
from pathlib import Path

import pytest

from native_program import build, run

NUM_KILLS = int(os.environ.get("SPECFORGE_EXT_CHAOS_KILLS", "1200"))
SEED = os.environ.get("SPECFORGE_EXT_CHAOS_SEED")


@pytest.mark.parametrize("sanitizers", ["", "address,undefined"])
def test_chaos(sanitizers: str, tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    seed = SEED or str(random.SystemRandom().randrange(1 << 32))
    print(f"seed {seed}")  # pytest shows it when this fails
    program = build("arena_chaos", sanitizers)
    said = run(program, str(NUM_KILLS), seed, str(tmp_path), timeout_s=60 + NUM_KILLS / 2)
    print(said)
    killed = re.search(r"^(\d+) kills, \d+ arenas", said, re.MULTILINE)
    assert killed is not None and int(killed[1]) >= NUM_KILLS
