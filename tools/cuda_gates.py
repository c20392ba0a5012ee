"""Compiles every CUDA kernel for every architecture and checks the machine code. Needs no GPU.

    python tools/cuda_gates.py [--arch 80 90a 100] [--json FILE]

Gates: no warning; no stack, no spills and no local memory in any kernel; 128-bit loads and stores
in the row kernels; cluster barriers and distributed shared memory in the cluster kernels, wherever
there are any. Exit status 1 names each kernel that fails, 2 says which tool is missing.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

CSRC = Path(__file__).resolve().parent.parent / "csrc"
ARCHITECTURES = ("80", "90a", "100")
TIMEOUT_S = 300
# Kernel name -> SASS that it must contain. Access 2 is the path for rows that no vector fits.
WANTED_SASS = {
    r"row_stats_kernel<": ("LDG.E.128",),
    r"own_keys_merge_kernel<": ("LDG.E.128", "STG.E.128"),
    r"own_keys_grads_kernel<": ("LDG.E.128", "STG.E.128"),
    r"loss_rows_kernel<\(Group\)\d, \(Access\)[01],": ("LDG.E.128", "STG.E.128"),
    r"fp8_(un)?pack_kernel<(true|\(bool\)1),": ("LDG.E.128", "STG.E.128"),
    r"bytes_crc_kernel": ("LDG.E.128",),
}
# The same on compute capability 9.0 and up, where mapa becomes arithmetic and the store to a peer's
# shared memory a generic one, ST.E, which these kernels have no other use for. Below, these kernels
# must be empty stubs.
WANTED_SASS_SM90 = {
    r"loss_rows_cluster_kernel<": (
        "LDG.E.128",
        "STG.E.128",
        "UCGABAR_ARV",
        "UCGABAR_WAIT",
        " ST.E",
    ),
}
MUST_EXIST = ("loss_rows_kernel<", "loss_rows_cluster_kernel<")
LOCAL_MEMORY = re.compile(r"\b(LDL|STL)\b")
PTXAS_ENTRY = re.compile(r"Compiling entry function '(\w+)' for 'sm_(\w+)'")
PTXAS_STACK = re.compile(
    r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
)
PTXAS_REGISTERS = re.compile(r"Used (\d+) registers")
SASS_FUNCTION = re.compile(r"Function : (\w+)")
SASS_ARCH = re.compile(r"arch = sm_(\w+)")


class ToolMissingError(RuntimeError):
    """A program that the gates need is not installed."""


@dataclass(frozen=True)
class Kernel:
    """One kernel on one architecture, as compiled."""

    name: str
    arch: str
    registers: int
    stack_bytes: int
    spill_bytes: int
    sass: str

    @property
    def has_clusters(self) -> bool:
        return int(re.sub(r"\D", "", self.arch)) >= 90

    def failures(self) -> list[str]:
        found = []
        if self.stack_bytes or self.spill_bytes:
            found.append(f"{self.stack_bytes} bytes of stack, {self.spill_bytes} of spills")
        if LOCAL_MEMORY.search(self.sass):
            found.append("local memory (LDL or STL)")
        for pattern, wanted in WANTED_SASS.items():
            if re.search(pattern, self.name):
                found += [f"no {sass}" for sass in wanted if sass not in self.sass]
        for pattern, wanted in WANTED_SASS_SM90.items():
            if not re.search(pattern, self.name):
                continue
            if self.has_clusters:
                found += [f"no {sass}" for sass in wanted if sass not in self.sass]
            elif "LDG" in self.sass:
                found.append("code where there are no clusters")
        return [f"{self.name} on sm_{self.arch}: {what}" for what in found]


def find_tools() -> dict[str, str]:
    """Paths of nvcc, cuobjdump and nvdisasm: from PATH, else from the wheels nvidia-cuda-*.

    Raises ToolMissingError.
    """
    wheels = [str(path) for path in Path(sysconfig.get_path("purelib")).glob("nvidia/*/bin")]
    search = os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/cuda/bin", *wheels])
    tools = {}
    for tool in ("nvcc", "cuobjdump", "nvdisasm"):
        path = shutil.which(tool, path=search)
        if path is None:
            hint = "" if tool == "nvcc" else f" (pip install nvidia-cuda-{tool})"
            raise ToolMissingError(f"cuda_gates: {tool} is not installed{hint}")
        tools[tool] = path
    return tools


def run(command: Sequence[str], *, extra_path: str = "") -> str:
    """stdout and stderr. Raises RuntimeError with them if the command fails."""
    env = os.environ | {"PATH": os.pathsep.join([os.environ.get("PATH", ""), extra_path])}
    done = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT_S,
        env=env,
    )
    if done.returncode != 0:
        raise RuntimeError(f"cuda_gates: {' '.join(command)} failed:\n{done.stdout}")
    return done.stdout


def demangle(names: Sequence[str]) -> dict[str, str]:
    """Readable names, without namespaces and arguments. Mangled ones where c++filt is missing."""
    if shutil.which("c++filt") is None or not names:
        return {name: name for name in names}
    readable = run(["c++filt", "-p", *names]).splitlines()
    noise = re.compile(r"void |sf::|cuda::|\(anonymous namespace\)::|_INTERNAL_\w+::")
    return {name: noise.sub("", text) for name, text in zip(names, readable, strict=True)}


def parse_ptxas(log: str) -> dict[tuple[str, str], tuple[int, int, int]]:
    """(mangled name, architecture) -> registers, bytes of stack, bytes of spills."""
    found = {}
    for block in re.split(r"(?=ptxas info +: Compiling entry)", log)[1:]:
        entry, stack = PTXAS_ENTRY.search(block), PTXAS_STACK.search(block)
        registers = PTXAS_REGISTERS.search(block)
        if not (entry and stack and registers):
            raise RuntimeError(f"cuda_gates: ptxas output was not understood:\n{block}")
        spills = int(stack[2]) + int(stack[3])
        found[entry[1], entry[2]] = int(registers[1]), int(stack[1]), spills
    return found


def parse_sass(text: str) -> dict[tuple[str, str], str]:
    """(mangled name, architecture) -> machine code."""
    found, arch = {}, ""
    for block in re.split(r"(?=\t*Function : )|(?=Fatbin elf code)", text):
        if match := SASS_ARCH.search(block):
            arch = match[1]
        if match := SASS_FUNCTION.search(block):
            found[match[1], arch] = block
    return found


def absent(kernels: Sequence[Kernel], architectures: Sequence[str]) -> list[str]:
    """What no file compiled for an architecture, so that no gate saw it."""
    return [
        f"no {name} for sm_{arch}"
        for arch in architectures
        for name in MUST_EXIST
        if not any(kernel.arch == arch and name in kernel.name for kernel in kernels)
    ]


def warnings(log: str) -> list[str]:
    """C7510 (wgmma serialised) and every other warning."""
    return [line for line in log.splitlines() if re.search(r"\bwarning\b|C7510", line, re.I)]


def compile_file(
    source: Path, architectures: Sequence[str], tools: dict[str, str], folder: Path
) -> tuple[list[Kernel], list[str]]:
    """(its kernels, its warnings)."""
    target = folder / f"{source.stem}-{'-'.join(architectures)}.o"
    gencode = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in architectures]
    flags = ["-std=c++20", "-O3", f"-I{CSRC}", "-DSF_CUDA=1", "-DNDEBUG", "-lineinfo"]
    flags += ["--expt-relaxed-constexpr", "-Xptxas=-v,-warn-spills", *gencode]
    log = run([tools["nvcc"], *flags, "-c", str(source), "-o", str(target)])
    compiled = parse_ptxas(log)
    sass = parse_sass(
        run(
            [tools["cuobjdump"], "-sass", str(target)],
            extra_path=str(Path(tools["nvdisasm"]).parent),
        )
    )
    names = demangle(sorted({name for name, _ in compiled}))
    kernels = [
        Kernel(names[name], arch, *numbers, sass[name, arch])
        for (name, arch), numbers in compiled.items()
    ]
    return kernels, [f"{source.name}: {line}" for line in warnings(log)]


def compile_all(architectures: Sequence[str] = ARCHITECTURES) -> tuple[list[Kernel], list[str]]:
    """All kernels of csrc on all architectures, and all warnings. Raises ToolMissingError."""
    tools = find_tools()
    sources = sorted(path for path in CSRC.glob("*/*.cu") if path.parent.name != "emu")
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = [(source, arch) for source in sources for arch in architectures]
        parts = list(
            pool.map(lambda job: compile_file(job[0], [job[1]], tools, Path(folder)), jobs)
        )
    kernels = [kernel for part, _ in parts for kernel in part]
    return kernels, [line for _, lines in parts for line in lines]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--arch", nargs="+", default=list(ARCHITECTURES))
    parser.add_argument("--json", type=Path, help="also write the table to this file")
    options = parser.parse_args(arguments)
    try:
        kernels, found = compile_all(options.arch)
    except ToolMissingError as error:
        print(error, file=sys.stderr)
        return 2
    for kernel in kernels:
        print(f"sm_{kernel.arch:5}{kernel.registers:4} registers  {kernel.name}")
    if options.json:
        rows = [{k: v for k, v in asdict(kernel).items() if k != "sass"} for kernel in kernels]
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    failures = found + absent(kernels, options.arch)
    failures += [line for kernel in kernels for line in kernel.failures()]
    for line in failures:
        print(f"FAILED {line}", file=sys.stderr)
    print(f"{len(kernels)} kernels, {len(failures)} failures")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
