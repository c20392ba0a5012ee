"""What the guest boots: a kernel of Debian's with soft-RoCE, and an initrd that finds the rest."""

from __future__ import annotations

import lzma
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
PACKAGES = (
    "qemu-system-x86",
    "busybox-static",
    "cpio",
    "kmod",
    "iproute2",
    "libibverbs1",
    "ibverbs-providers",
)
MODULES = ("virtio_pci", "9pnet_virtio", "9p", "overlay", "dummy", "ib_uverbs", "rdma_rxe")
UNLINKED = ("crc32_generic",)
"""rdma_rxe asks for it at run time, in kernels that have it as a module."""
COMMAND_S = 600.0


class RigError(RuntimeError):
    """The guest could not be prepared, or did not come to an end of its own."""


def run(*command: str | Path, cwd: Path | None = None) -> str:
    """Output of a command. RigError with the end of what it said."""
    words = [str(word) for word in command]
    try:
        done = subprocess.run(
            words, cwd=cwd, capture_output=True, text=True, timeout=COMMAND_S, check=False
        )
    except FileNotFoundError:
        raise RigError(f"wanted the command {words[0]!r} (Debian or Ubuntu, amd64)") from None
    except subprocess.TimeoutExpired:
        raise RigError(f"waited {COMMAND_S:.0f} s for {shlex.join(words)}") from None
    if done.returncode != 0:
        raise RigError(f"{shlex.join(words)}: exit {done.returncode}\n{done.stderr[-2000:]}")
    return done.stdout


def install_packages() -> list[str]:
    """Those of PACKAGES that were missing."""
    known = run("dpkg-query", "-W", "-f", "${Package} ${Status}\n").splitlines()
    have = {line.split()[0] for line in known if line.endswith(" installed")}
    missing = [package for package in PACKAGES if package not in have]
    if missing:
        run("apt-get", "update", "-q")
        run("apt-get", "install", "-qy", "--no-install-recommends", *missing)
    return missing


def fetch_kernel(folder: Path) -> tuple[Path, str]:
    """Root of an unpacked kernel package, and the kernel's version. Kept for the next run."""
    depends = run("apt-cache", "depends", "linux-image-amd64").split()[1:]
    package = next((word for word in depends if word.startswith("linux-image-")), None)
    if package is None:
        raise RigError("apt-cache depends linux-image-amd64: wanted a kernel, got none")
    root, version = folder / package, package.removeprefix("linux-image-")
    if not root.exists():
        shutil.rmtree(folder, ignore_errors=True)
        fresh = folder / "fresh"
        fresh.mkdir(parents=True)
        run("apt-get", "download", "-q", package, cwd=folder)
        [archive] = folder.glob("*.deb")
        run("dpkg", "-x", archive, fresh)
        archive.unlink()
        run("depmod", "-b", fresh, version)
        fresh.rename(root)
    return root, version


def module_files(root: Path, version: str) -> list[Path]:
    """MODULES and all that they need, each after what it needs itself."""
    files: dict[Path, None] = {}
    for name in (*UNLINKED, *MODULES):
        try:
            shown = run("modprobe", "-d", root, "-S", version, "--show-depends", name)
        except RigError:
            if name in UNLINKED:
                continue
            raise
        for line in shown.splitlines():  # "insmod FILE", or "builtin NAME"
            if line.startswith("insmod "):
                files[Path(line.split()[1])] = None
    return list(files)


def make_initrd(
    folder: Path, modules: list[Path], settings: Mapping[str, str], words: Sequence[str]
) -> Path:
    """busybox, the modules with their order, and what `init` reads: its settings and its words."""
    shutil.rmtree(folder, ignore_errors=True)
    for name in ("bin", "modules", "proc", "sys", "dev", "host", "top", "both"):
        (folder / name).mkdir(parents=True)
    shutil.copy("/bin/busybox", folder / "bin")
    shutil.copy(HERE / "init", folder)
    for module in modules:
        raw = module.read_bytes()
        data = lzma.decompress(raw) if module.suffix == ".xz" else raw
        (folder / "modules" / module.name.removesuffix(".xz")).write_bytes(data)
    order = (f"{module.name.removesuffix('.xz')}\n" for module in modules)
    (folder / "modules" / "order").write_text("".join(order))
    text = "".join(f"{key}={shlex.quote(value)}\n" for key, value in settings.items())
    (folder / "settings").write_text(f"{text}set -- {shlex.join(words)}\n")
    initrd = folder.with_suffix(".cpio")
    names = "\n".join(str(path.relative_to(folder)) for path in sorted(folder.rglob("*")))
    with initrd.open("wb") as file:
        done = subprocess.run(
            ["cpio", "--quiet", "-o", "-H", "newc"],
            cwd=folder,
            input=names.encode(),
            stdout=file,
            timeout=COMMAND_S,
            check=False,
        )
    if done.returncode != 0:
        raise RigError(f"cpio: exit {done.returncode}")
    return initrd
