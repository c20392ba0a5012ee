"""SIGTERM as a request: finish the step, save, leave with exit code 0.

torchrun hands a SIGTERM on to its ranks and gives them 30 s; they save and exit with 0, while
torchrun itself reports the signal with exit code 1. A SIGTERM to a rank ends them all, and torchrun
with 0.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class StopRequest:
    """Whether somebody asked this process to stop."""

    def __init__(self) -> None:
        self._asked = threading.Event()

    def ask(self) -> None:
        self._asked.set()

    def __call__(self) -> bool:
        return self._asked.is_set()


@contextmanager
def stop_on_sigterm() -> Iterator[StopRequest]:
    """Within the block SIGTERM asks to stop instead of killing.

    Only the main thread can take signals; a trainer in another thread stops when `ask` is called.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def handle(_signal: int, _frame: FrameType | None) -> None:
        request.ask()

    before = signal.signal(signal.SIGTERM, handle)
    try:
        yield request
    finally:
        signal.signal(signal.SIGTERM, before)
