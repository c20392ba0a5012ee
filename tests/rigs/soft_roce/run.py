"""`make test-rdma`: the Mooncake stores' tests over RDMA verbs, on a host without an RDMA NIC.

Boots a kernel of Debian's with soft-RoCE (rdma_rxe) in QEMU, which emulates the processor too; its
root is this host's, read-only. Needs root and, for what is missing, apt. What it proves and what it
does not: docs/stores.md. The last line is the result; the exit code is 0 only if every test ran and
passed. Kept in build/soft_roce: guest.log, out/junit.xml, and the kernel.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import socket
import sys
from pathlib import Path

import guest
import image

ROOT = Path(__file__).resolve().parents[3]
WORK = ROOT / "build" / "soft_roce"
TESTS = (
    "tests/rigs/soft_roce/over_rdma.py",
    "tests/test_store_contract.py",
    "tests/test_store_mooncake.py",
)
ONE_AT_A_TIME = "\0specforge_ext.soft_roce"
MEMORY_MIB = 2304
TRANSLATED_MIB = 256
"""QEMU's cache of translated code, on top of the guest's memory."""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--boot-s", type=float, default=240.0, help="deadline of rxe0")
    parser.add_argument("--total-s", type=float, default=5400.0, help="deadline of it all")
    parser.add_argument("--slowdown", type=float, default=10.0, help="of the tests' own deadlines")
    parser.add_argument("tests", nargs="*", default=TESTS, help="words for pytest")
    return parser.parse_args()


def alone() -> socket.socket:
    """Held for as long as this process lives. RigError if another one has it."""
    lock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        lock.bind(ONE_AT_A_TIME)
    except OSError:
        raise image.RigError("another soft-RoCE guest runs on this host") from None
    return lock


def share(path: Path, tag: str, *, readonly: bool) -> str:
    escaped = str(path).replace(",", ",,")
    mode = ",readonly=on" if readonly else ""
    return f"local,path={escaped},mount_tag={tag},security_model=none,multidevs=remap{mode}"


def qemu(root: Path, version: str, initrd: Path, out: Path) -> list[str]:
    return [
        "qemu-system-x86_64",
        *("-accel", f"tcg,thread=multi,tb-size={TRANSLATED_MIB}"),
        *("-machine", "q35", "-cpu", "max", "-smp", "2", "-m", str(MEMORY_MIB)),
        *("-nographic", "-no-reboot", "-nic", "none"),
        *("-kernel", str(root / "boot" / f"vmlinuz-{version}"), "-initrd", str(initrd)),
        *("-append", "console=ttyS0 panic=-1 loglevel=4 mitigations=off"),
        *("-virtfs", share(Path("/"), "host", readonly=True)),
        *("-virtfs", share(out, "out", readonly=False)),
    ]


def test(arguments: argparse.Namespace) -> guest.Verdict:
    lock = alone()
    added = image.install_packages()
    print(f"packages: {' '.join(added) or 'all there'}", flush=True)
    root, version = image.fetch_kernel(WORK / "kernel")
    modules = image.module_files(root, version)
    settings = {
        "repo": str(ROOT),
        "python": sys.executable,
        "slowdown": str(arguments.slowdown),
    }
    initrd = image.make_initrd(WORK / "initrd", modules, settings, arguments.tests)
    print(f"kernel: {version}, {len(modules)} modules", flush=True)
    out, log = WORK / "out", WORK / "guest.log"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    deadlines = guest.Deadlines(arguments.boot_s, arguments.total_s)
    outcome = guest.run_to_the_end(qemu(root, version, initrd, out), out, log, deadlines)
    lock.close()
    return guest.judge(outcome, out)


def main() -> int:
    arguments = parse_arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the guest is ended
    if os.geteuid() != 0:
        verdict = guest.Verdict(False, "wanted root, which installs packages and reads every file")
    else:
        try:
            verdict = test(arguments)
        except image.RigError as error:
            verdict = guest.Verdict(False, str(error))
    said = "passed" if verdict.passed else "FAILED"
    print(f"test-rdma {said}: {verdict.text} (log: {WORK / 'guest.log'})")
    return 0 if verdict.passed else 1


if __name__ == "__main__":
    sys.exit(main())
