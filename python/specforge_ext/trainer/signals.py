"""SIGTERM and Ctrl-C as requests: finish the step, save, leave with exit code 0.

torchrun hands both on to its ranks and gives them 30 s; they save and exit with 0, while
torchrun itself reports the signal with exit code 1. A SIGTERM to a rank ends them all, and torchrun
with 0.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SAME_CTRL_C_S = 2.0
"""A terminal sends SIGINT to every process, and torchrun sends it to the ranks again."""


class StopRequest:
    """Whether somebody asked this process to stop."""

    def __init__(self) -> None:
        self._asked = threading.Event()

    def ask(self) -> None:
        self._asked.set()

    def __call__(self) -> bool:
        return self._asked.is_set()


class _CtrlC:
    """The first asks; a later one interrupts, for who does not want to wait for the step."""

    def __init__(self, request: StopRequest) -> None:
        self._request = request
        self._first_s: float | None = None

    def __call__(self, _signal: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._first_s is not None and now - self._first_s > SAME_CTRL_C_S:
            raise KeyboardInterrupt
        self._first_s = now if self._first_s is None else self._first_s
        self._request.ask()


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Within the block SIGTERM and a first SIGINT ask to stop instead of killing.

    Only the main thread can take signals; a trainer in another thread stops when `ask` is called.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def handle(_signal: int, _frame: FrameType | None) -> None:
        request.ask()

    before = {signal.SIGTERM: signal.signal(signal.SIGTERM, handle)}
    # Ignored where a shell started the run in the background: the Ctrl-C is for another command.
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        before[signal.SIGINT] = signal.signal(signal.SIGINT, _CtrlC(request))
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
