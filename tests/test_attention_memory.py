"""Attention over all TTT steps needs memory in proportion to the tokens, not to their square."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

TOKENS = 8192
TIMEOUT_S = 120

# In a process of its own, whose peak is that of this alone. Writing 5 to clear_refs resets VmHWM.
SCRIPT = """
import sys
from pathlib import Path
import torch
from specforge_ext.methods._ttt_plan import build_plan
from specforge_ext.nn.attention import OwnKeys, split_attention

torch.set_num_threads(1)

def status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(x.split()[1]) * 1024 for x in lines if x.startswith(key + ":"))

def step(tokens):
    mask = torch.ones(tokens, dtype=torch.uint8)
    mask[-1] = 0
    device = torch.device("cpu")
    plan = build_plan(mask, (tokens,), ttt_length=3, compaction=True, device=device)
    rand = lambda rows, heads: torch.randn(rows, heads, 8, requires_grad=True)
    context = rand(len(plan.context), 1), rand(len(plan.context), 1)
    own, outs = [], []
    for i, rows in enumerate(plan.steps):
        n = len(rows.rows)
        if i:
            own.append((rand(n, 1), rand(n, 1)))
        keys = [OwnKeys(*kv, at) for kv, at in zip(own, rows.ancestors, strict=True)]
        outs.append(split_attention(rand(n, 2), context, rows.queries, keys))
    torch.cat(outs).square().sum().backward()

step(64)
Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
step(int(sys.argv[1]))
print(status("VmHWM") - before)
"""


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc"
)
def test_no_square_of_the_tokens() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(TOKENS)],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=True,
    )
    peak = int(done.stdout)
    assert 0 < peak < TOKENS**2 // 2, f"{peak} bytes for {TOKENS} tokens"
