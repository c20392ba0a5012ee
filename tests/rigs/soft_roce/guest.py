"""Runs a guest to its end, whatever that is, and says what came of it."""

from __future__ import annotations

import subprocess
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

POLL_S = 0.2


@dataclass(frozen=True)
class Deadlines:
    """Seconds from the start: until the guest's device is usable, and until its end."""

    boot_s: float
    total_s: float


@dataclass(frozen=True)
class Outcome:
    """Of one guest. boot_s: None if its device was never usable. late: what it was waited for."""

    boot_s: float | None
    total_s: float
    late: str | None


def run_to_the_end(command: Sequence[str], out: Path, log: Path, deadlines: Deadlines) -> Outcome:
    """Wait for a guest that writes to `out`; it is killed at a deadline, and with this process."""
    began = time.monotonic()
    boot_s: float | None = None
    late: str | None = None
    bound = ["setpriv", "--pdeathsig", "KILL", "nice", "-n", "10", *command]
    with log.open("wb") as file:
        process = subprocess.Popen(
            bound, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT
        )
        try:
            while process.poll() is None and late is None:
                waited_s = time.monotonic() - began
                if boot_s is None and (out / "ready").exists():
                    boot_s = waited_s
                if boot_s is None and waited_s > deadlines.boot_s:
                    late = f"waited {waited_s:.0f} s for the guest's device"
                elif waited_s > deadlines.total_s:
                    late = f"waited {waited_s:.0f} s for the guest's tests"
                time.sleep(POLL_S)
        finally:
            process.kill()
            process.wait(timeout=30.0)
    return Outcome(boot_s, time.monotonic() - began, late)


@dataclass(frozen=True)
class Verdict:
    passed: bool
    text: str


def judge(outcome: Outcome, out: Path) -> Verdict:
    """Passed only if tests ran, all of them well, and pytest itself says so."""
    boot_s, total_s = outcome.boot_s, outcome.total_s
    if outcome.late is not None:
        return Verdict(False, f"{outcome.late}; it was killed")
    if not (out / "exit").exists():
        return Verdict(False, f"the guest ended after {total_s:.0f} s without a result")
    code = (out / "exit").read_text().strip()
    if boot_s is None or not (out / "junit.xml").exists():
        return Verdict(False, f"no test ran: the guest's script ended with code {code}")
    counts = dict.fromkeys(("tests", "failures", "errors", "skipped"), 0)
    for suite in ElementTree.parse(out / "junit.xml").getroot().iter("testsuite"):
        for key in counts:
            counts[key] += int(suite.get(key, "0"))
    failed, skipped = counts["failures"] + counts["errors"], counts["skipped"]
    num_passed = counts["tests"] - failed - skipped
    text = (
        f"{num_passed} passed, {failed} failed, {skipped} skipped, pytest's code {code}; "
        f"boot {boot_s:.0f} s, tests {total_s - boot_s:.0f} s"
    )
    return Verdict(code == "0" and num_passed > 0 and failed == skipped == 0, text)
