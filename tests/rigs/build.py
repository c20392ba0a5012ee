"""Builds the environments of the rigs: `python tests/rigs/build.py [vllm] [sglang]`.

Standard library only, since it runs before anything is installed. An environment lies outside the
clone, in SPECFORGE_EXT_RIGS or ~/.cache/specforge_ext/rigs, under a hash of all that its install
reads. What is complete is used again; what a killed install left is removed and made anew.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

HERE = Path(__file__).resolve().parent
RIGS = ("vllm", "sglang")
COMPLETE = "complete"
DEADLINE_S = 1500.0
"""For one install, and for the one that another process has begun."""


class BuildFailed(RuntimeError):
    """An environment could not be built; says which, why, and where the log is."""


def root() -> Path:
    """Where environments and cached drafts lie."""
    named = os.environ.get("SPECFORGE_EXT_RIGS")
    return Path(named) if named else Path.home() / ".cache" / "specforge_ext" / "rigs"


def key(rig: str, folder: Path | None = None) -> str:
    """Changes with what the install reads, the files right in the rig's folder, and with Python's
    version and the machine's kind. What lies in folders below is read in place by the servers.
    """
    folder = folder or HERE / rig
    digest = hashlib.sha256(f"{sys.version_info[:2]} {platform.machine()}".encode())
    for path in sorted(p for p in folder.iterdir() if p.is_file()):
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        digest.update(f"\n{path.name} {content}".encode())
    return digest.hexdigest()[:12]


def environment(rig: str) -> Path:
    """The virtual environment of a rig, whether it is there or not."""
    if rig not in RIGS:
        raise ValueError(f"rig: wanted one of {', '.join(RIGS)}, got {rig!r}")
    return root() / f"{rig}-{key(rig)}"


def install(rig: str) -> list[list[str]]:
    """For `build`: a bare virtual environment, then the rig's own script."""
    return [[sys.executable, "-m", "venv"], [str(HERE / rig / "install.sh")]]


def is_built(venv: Path) -> bool:
    return (venv / COMPLETE).is_file()


def build(venv: Path, commands: Sequence[Sequence[str]], *, deadline_s: float = DEADLINE_S) -> bool:
    """Make `venv` by the commands, each given its path, unless it is complete; whether it was not.

    Two builders of one environment take turns. The log is VENV.log. Raises BuildFailed.
    """
    venv.parent.mkdir(parents=True, exist_ok=True)
    with locked(venv.with_name(f"{venv.name}.lock"), deadline_s=deadline_s):
        if is_built(venv):
            return False
        if venv.exists():
            shutil.rmtree(venv)
        log = venv.with_name(f"{venv.name}.log")
        until = time.monotonic() + deadline_s
        with log.open("wb") as out:
            for command in commands:
                left_s = until - time.monotonic()
                code = run([*command, str(venv)], out.fileno(), seconds=left_s)
                if code is None:
                    raise BuildFailed(
                        f"{venv}: {command[0]} took over {deadline_s:g} s; log in {log}"
                    )
                if code:
                    tail = log.read_text(errors="replace")[-2000:]
                    raise BuildFailed(
                        f"{venv}: {command[0]} ended with {code}; log in {log}:\n{tail}"
                    )
        (venv / COMPLETE).touch()
        return True


@contextmanager
def locked(path: Path, *, deadline_s: float) -> Iterator[None]:
    """An exclusive lock of processes. The kernel frees it when its holder dies."""
    until = time.monotonic() + deadline_s
    with path.open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > until:
                    raise BuildFailed(
                        f"{path}: another process has held this lock for {deadline_s:g} s"
                    ) from None
                time.sleep(0.2)
        yield


def run(command: Sequence[str], out: int, *, seconds: float) -> int | None:
    """The exit code, or None when the time is over. Nothing it started outlives this call."""
    process = subprocess.Popen(command, stdout=out, stderr=out, start_new_session=True)
    try:
        return process.wait(timeout=max(0.0, seconds))
    except BaseException as error:
        os.killpg(process.pid, signal.SIGKILL)  # not reaped yet, so the group is still its own
        process.wait()
        if isinstance(error, subprocess.TimeoutExpired):
            return None
        raise


def command_to_build(*rigs: str) -> str:
    return f"python {Path(__file__).relative_to(HERE.parents[1])} {' '.join(rigs)}"


def _exit(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description="Build the environments of tests/rigs.")
    parser.add_argument("rigs", nargs="*", help=f"of {', '.join(RIGS)} (default: all)")
    parser.add_argument("--deadline", type=float, default=DEADLINE_S, help="seconds for each")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, _exit)  # so that `run` ends what it started
    for rig in options.rigs or RIGS:
        began = time.monotonic()
        try:
            venv = environment(rig)
            fresh = build(venv, install(rig), deadline_s=options.deadline)
        except (BuildFailed, ValueError) as error:
            print(f"rigs: {error}", file=sys.stderr)
            return 1
        done = f"built in {time.monotonic() - began:.0f} s" if fresh else "there already"
        print(f"{rig}: {venv} {done}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
