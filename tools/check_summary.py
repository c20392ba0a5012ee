"""Checks a run's summary.json against what the demo promises; exits non-zero with what is missing.

Usage: python tools/check_summary.py runs/demo/summary.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

MIN_LENGTH = {0.0: 1.8, 0.8: 1.6}
PROMISED_WALL_S = 180.0


def problems(summary: dict[str, Any]) -> list[str]:
    """Every promise of the demo that a summary does not keep."""
    out: list[str] = []
    rows = {(row["draft"], row["temperature"]): row for row in summary["acceptance"]}
    for temperature, wanted in MIN_LENGTH.items():
        draft = rows["trained", temperature]
        bigram = rows["bigram", temperature]
        if draft["length"] < wanted:
            out.append(f"T={temperature}: acceptance length {draft['length']:.3f} < {wanted}")
        if draft["ci95"][0] <= bigram["ci95"][1]:
            out.append(
                f"T={temperature}: the draft's interval {draft['ci95']} is not above "
                f"the bigram draft's {bigram['ci95']}"
            )
    for key in ("lossless", "export_check"):
        if summary[key] is not True:
            out.append(f"{key} is {summary[key]}")
    if summary["samples_skipped"]:
        out.append(f"{summary['samples_skipped']} samples skipped")
    return out


if __name__ == "__main__":
    loaded = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    found = problems(loaded)
    print("\n".join(found) or "the summary keeps every promise of the demo")
    # Said, not judged: a loaded machine is no fault of the code.
    print(f"took {loaded['wall_s']:.0f} s; promised {PROMISED_WALL_S:.0f} s on 2 idle cores")
    sys.exit(bool(found))
