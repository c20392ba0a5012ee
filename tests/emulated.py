"""Builds the CUDA sources for the CPU emulator (csrc/emu) and calls them on CPU tensors.

Legend: N rows, R teacher rows, V vocabulary, T packed tokens, L TTT steps.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
BUILD = ROOT / "build" / "emu"
BUILD_TIMEOUT_S = 300
RUN_TIMEOUT_S = 120
ORDERS = {"forward": 0, "reverse": 1, "random": 2}
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1}

_FLAGS = ("-std=c++20", "-O1", "-g1", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas")
_INCLUDES = ("-I", str(CSRC / "emu"), "-I", str(CSRC))
_SANITIZERS = {
    "plain": ((), ()),
    "asan": (("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"), ("SF_EMU_ASAN",)),
    "tsan": (("-fsanitize=thread",), ("SF_EMU_TSAN",)),
}


def unavailable_reason() -> str | None:
    """Why the emulator cannot be built here, or None."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return f"the emulator switches x86-64 stacks, this is {platform.machine()}"
    return None if shutil.which("g++") else "the emulator is built by g++, which is not installed"


def _compile(flags: tuple[str, ...], sources: list[Path], target: Path) -> Path:
    """Compiles unless it was done before: the target's name gets the hash of sources and flags."""
    digest = hashlib.sha256(" ".join(flags).encode())
    headers = [path for path in CSRC.rglob("*") if path.suffix in (".h", ".cuh")]
    for path in sorted({*headers, *sources}):
        digest.update(path.read_bytes())
    target = target.with_name(f"{target.stem}-{digest.hexdigest()[:16]}{target.suffix}")
    if target.exists():
        return target
    BUILD.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f"{target.stem}.{os.getpid()}.tmp")
    inputs = [
        arg
        for p in sources
        for arg in (("-x", "none") if p.suffix == ".o" else ("-x", "c++")) + (str(p),)
    ]
    command = ["g++", *_FLAGS, *flags, *_INCLUDES, *inputs, "-o", str(temporary)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=BUILD_TIMEOUT_S)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    temporary.rename(target)
    return target


def _op_sources() -> list[Path]:
    kernels = sorted(CSRC.glob("[!e]*/*_cuda.cu"))
    return [
        *kernels,
        CSRC / "emu" / "planted_bugs.cu",
        CSRC / "core" / "tensor_view.cpp",
        CSRC / "core" / "error.cpp",
    ]


@functools.cache
def program(sanitizer: str) -> Path:
    """The executable of sanitized_main.cpp. Only the emulator's own file is left uninstrumented."""
    flags, defines = _SANITIZERS[sanitizer]
    machine = _compile(
        ("-c", *(f"-D{name}" for name in defines)),
        [CSRC / "emu" / "emu.cpp"],
        BUILD / f"machine-{sanitizer}.o",
    )
    sources = [*_op_sources(), CSRC / "emu" / "sanitized_main.cpp", machine]
    return _compile(flags, sources, BUILD / f"main-{sanitizer}")


def run_program(sanitizer: str, *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(program(sanitizer)), *args], capture_output=True, text=True, timeout=RUN_TIMEOUT_S
    )


@functools.cache
def library() -> ctypes.CDLL:
    sources = [*_op_sources(), CSRC / "emu" / "emu.cpp", CSRC / "emu" / "ops_abi.cpp"]
    loaded = ctypes.CDLL(str(_compile(("-fPIC", "-shared"), sources, BUILD / "ops.so")))
    for name in (
        "row_stats",
        "soft_ce_rows",
        "step_sums",
        "ttt_counts",
        "ttt_fill",
        "planted",
        "block_mask",
    ):
        getattr(loaded, f"emu_{name}").restype = ctypes.c_char_p
    return loaded


def set_order(order: str, seed: int = 1) -> None:
    library().emu_set_order(ORDERS[order], ctypes.c_uint64(seed))


def _call(op: str, *args: Tensor | int | bytes) -> None:
    """Raises RuntimeError with the text of what the launcher threw."""

    def convert(arg: Tensor | int | bytes) -> ctypes.c_void_p | ctypes.c_int64 | bytes:
        if isinstance(arg, Tensor):
            assert arg.is_contiguous()
            return ctypes.c_void_p(arg.data_ptr())
        return ctypes.c_int64(arg) if isinstance(arg, int) else arg

    error = getattr(library(), f"emu_{op}")(*map(convert, args))
    if error is not None:
        raise RuntimeError(error.decode())


def planted(name: str) -> Tensor:
    """[64] float32, what a kernel of planted_bugs.cu wrote over zeros."""
    out = torch.zeros(64)
    _call("planted", name.encode(), out)
    return out


def row_stats(logits_NV: Tensor, *, device: int = 0) -> tuple[Tensor, Tensor]:
    rows, vocab = logits_NV.shape
    lse, argmax = torch.full((rows,), torch.nan), torch.full((rows,), -7, dtype=torch.int32)
    code = DTYPE_CODES[logits_NV.dtype]
    _call("row_stats", logits_NV, code, rows, vocab, lse, argmax, device)
    return lse, argmax


def soft_ce_rows_(
    logits_NV: Tensor, teacher_RV: Tensor, map_N: Tensor, weight_N: Tensor, teacher_lse_R: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, accepted, correct); logits become the gradient."""
    rows, vocab = logits_NV.shape
    loss, accepted = torch.full((rows,), torch.nan), torch.full((rows,), torch.nan)
    correct = torch.full((rows,), 99, dtype=torch.uint8)
    codes = DTYPE_CODES[logits_NV.dtype], DTYPE_CODES[teacher_RV.dtype]
    inputs = (logits_NV, codes[0], teacher_RV, codes[1], rows, teacher_RV.shape[0], vocab)
    _call("soft_ce_rows", *inputs, map_N, weight_N, teacher_lse_R, loss, accepted, correct)
    return loss, accepted, correct


def step_sums(
    loss_N: Tensor,
    accepted_N: Tensor,
    correct_N: Tensor,
    weight_N: Tensor,
    step_N: Tensor,
    num_steps: int,
) -> Tensor:
    sums = torch.full((5, num_steps), torch.nan, dtype=torch.float64)
    rows = loss_N.shape[0]
    _call("step_sums", loss_N, accepted_N, correct_N, weight_N, step_N, rows, sums, num_steps)
    return sums


def ttt_counts(mask_T: Tensor, cu_seqlens: Tensor, ttt_length: int) -> Tensor:
    """[L + 3] int64."""
    counts = torch.full((ttt_length + 3,), -99, dtype=torch.int64)
    _call(
        "ttt_counts", mask_T, mask_T.numel(), cu_seqlens, cu_seqlens.numel() - 1, counts, ttt_length
    )
    return counts


def ttt_fill(mask_T: Tensor, cu_seqlens: Tensor, counts: Tensor) -> tuple[Tensor, ...]:
    """active, parent, pair_source, pair_step, pair_teacher, teacher_rows: csrc/pack/ttt_maps.h."""
    *num_active, pairs, teachers, _ = counts.tolist()
    total = sum(num_active)
    sizes = (total, total - num_active[0], pairs, pairs, pairs, teachers)
    out = tuple(torch.full((size,), -7, dtype=torch.int32) for size in sizes)
    inputs = (mask_T, mask_T.numel(), cu_seqlens, cu_seqlens.numel() - 1, counts, len(num_active))
    _call("ttt_fill", *inputs, *out)
    return out


def block_mask(
    anchors: Tensor,
    cu_anchors: Tensor,
    cu_seqlens: Tensor,
    *,
    num_context: int,
    block_size: int,
    window: int,
    tile: tuple[int, int],
) -> list[Tensor]:
    """The eight tensors of csrc/pack/block_mask.h, kv before q. window 0: none."""
    queries = anchors.numel() * block_size
    rows, columns = -(-queries // tile[0]), -(-(num_context + queries) // tile[1])
    shapes: list[tuple[int, ...]] = [(rows,), (rows, columns)] * 2
    shapes += [(columns,), (columns, rows)] * 2
    out = [torch.full(shape, -7, dtype=torch.int32) for shape in shapes]
    addresses = torch.tensor([x.data_ptr() for x in out], dtype=torch.int64)
    sizes = (num_context, block_size, window, *tile)
    samples = cu_seqlens.numel() - 1
    _call(
        "block_mask", anchors, anchors.numel(), cu_anchors, cu_seqlens, samples, *sizes, addresses
    )
    return out
