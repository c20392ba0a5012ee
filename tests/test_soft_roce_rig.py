"""The rig of `make test-rdma` must not pass by accident: guests that fail in every way they can."""

from __future__ import annotations

import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rigs.soft_roce import guest, image

ENOUGH = guest.Deadlines(boot_s=20.0, total_s=20.0)


def junit(**counts: int) -> str:
    values = {"tests": 3, "failures": 0, "errors": 0, "skipped": 0} | counts
    inner = " ".join(f'{key}="{value}"' for key, value in values.items())
    return f"<testsuites><testsuite {inner}/></testsuites>"


def judged(
    folder: Path, script: str, deadlines: guest.Deadlines = ENOUGH
) -> tuple[guest.Outcome, guest.Verdict]:
    """Of a shell script in place of the guest; its working folder is the shared one."""
    out = folder / "out"
    out.mkdir()
    command = ["bash", "-c", f"cd {shlex.quote(str(out))}; {script}"]
    outcome = guest.run_to_the_end(command, out, folder / "log", deadlines)
    return outcome, guest.judge(outcome, out)


def ended(code: int, **counts: int) -> str:
    return f"touch ready; echo '{junit(**counts)}' > junit.xml; sleep 0.5; echo {code} > exit"


def test_passed(tmp_path: Path) -> None:
    outcome, verdict = judged(tmp_path, f"echo hello; {ended(0)}")
    assert verdict.passed
    assert verdict.text.startswith("3 passed, 0 failed, 0 skipped, pytest's code 0; boot ")
    assert outcome.boot_s is not None and outcome.boot_s <= outcome.total_s
    assert (tmp_path / "log").read_text() == "hello\n"


@pytest.mark.parametrize(
    ("script", "text"),
    [
        (ended(1, failures=1), "2 passed, 1 failed, 0 skipped, pytest's code 1"),
        (ended(1, errors=1), "2 passed, 1 failed, 0 skipped, pytest's code 1"),
        (ended(0, skipped=1), "2 passed, 0 failed, 1 skipped, pytest's code 0"),
        (ended(1), "3 passed, 0 failed, 0 skipped, pytest's code 1"),
        (ended(5, tests=0), "0 passed, 0 failed, 0 skipped, pytest's code 5"),
        (ended(0, tests=0), "0 passed, 0 failed, 0 skipped, pytest's code 0"),
        ("echo 2 > exit", "no test ran: the guest's script ended with code 2"),
        ("touch ready; sleep 0.5; echo 4 > exit", "no test ran: .* with code 4"),
        ("touch ready; sleep 0.5", "the guest ended after . s without a result"),
        ("exit 0", "the guest ended after . s without a result"),
    ],
)
def test_failed(tmp_path: Path, script: str, text: str) -> None:
    _, verdict = judged(tmp_path, script)
    assert not verdict.passed
    assert re.search(text, verdict.text), verdict.text


@pytest.mark.parametrize(
    ("script", "deadlines", "text"),
    [
        ("", guest.Deadlines(1.0, 20.0), r"waited \d s for the guest's device; it was killed"),
        ("touch ready; ", guest.Deadlines(20.0, 2.0), r"waited \d s for the guest's tests"),
    ],
)
def test_late(tmp_path: Path, script: str, deadlines: guest.Deadlines, text: str) -> None:
    _, verdict = judged(tmp_path, f"echo $$ > pid; {script}exec sleep 60", deadlines)
    assert not verdict.passed
    assert re.search(text, verdict.text), verdict.text
    pid = int((tmp_path / "out/pid").read_text())
    assert not Path(f"/proc/{pid}").exists()


ENDS_AT_ONCE = """
import os, pathlib, signal, sys, threading, time
sys.path.insert(0, sys.argv[1])
from rigs.soft_roce import guest
out = pathlib.Path(sys.argv[2])
def end():
    while not (out / "pid").exists():
        time.sleep(0.02)
    os.kill(os.getpid(), signal.SIGKILL)
threading.Thread(target=end).start()
command = ["bash", "-c", f"echo $$ > {out}/new; mv {out}/new {out}/pid; exec sleep 60"]
guest.run_to_the_end(command, out, out / "log", guest.Deadlines(60.0, 60.0))
"""


def test_no_guest_outlives_the_rig(tmp_path: Path) -> None:
    """Not even when that is killed."""
    tests = str(Path(__file__).parent)
    done = subprocess.run(
        [sys.executable, "-c", ENDS_AT_ONCE, tests, str(tmp_path)], timeout=60, check=False
    )
    assert done.returncode == -signal.SIGKILL
    pid = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 10.0
    while runs(pid):
        assert time.monotonic() < deadline, f"{pid} still runs"
        time.sleep(0.02)


def runs(pid: int) -> bool:
    try:
        return ") Z" not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False


def test_commands_that_fail() -> None:
    with pytest.raises(image.RigError, match=r"wanted the command 'no-such-command'"):
        image.run("no-such-command")
    with pytest.raises(image.RigError, match=r"bash -c 'echo no >&2; exit 3': exit 3\nno"):
        image.run("bash", "-c", "echo no >&2; exit 3")
