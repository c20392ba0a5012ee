"""What a run tells a person between the trainer's progress displays: plain lines, with the time."""

from __future__ import annotations

import sys
import time


class Say:
    """Prints lines with the seconds since the run began; quiet on all ranks but the first."""

    PROGRESS_EVERY_S = 2.0

    def __init__(self, began: float, *, quiet: bool = False) -> None:
        self._began = began
        self._quiet = quiet
        self._last = 0.0

    def __call__(self, text: str) -> None:
        if not self._quiet:
            print(f"[{time.perf_counter() - self._began:6.1f} s] {text}", flush=True)

    def block(self, text: str) -> None:
        if not self._quiet:
            sys.stdout.write(text.rstrip("\n") + "\n")
            sys.stdout.flush()

    def progress(self, done: int, total: int, what: str) -> None:
        """At most a line every two seconds, and the last one."""
        now = time.perf_counter()
        if done >= total or now - self._last >= self.PROGRESS_EVERY_S:
            self._last = now
            self(f"{what}: {done} of {total}")
