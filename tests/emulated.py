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
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
EMULATOR = [CSRC / "emu" / f"{name}.cpp" for name in ("fibers", "grid", "collectives")]
BUILD = ROOT / "build" / "emu"
BUILD_TIMEOUT_S = 300
RUN_TIMEOUT_S = 120
ORDERS = {"forward": 0, "reverse": 1, "random": 2}
LOSS_KINDS = ("hard_ce", "soft_ce", "reverse_kl", "jsd", "l1", "lk_alpha", "lk_lambda")
OPS = (
    "row_stats",
    "loss_rows",
    "loss_rows_plan",
    "step_sums",
    "ttt_counts",
    "ttt_fill",
    "pack_samples",
    "own_keys_merge",
    "own_keys_grads",
    "fp8_pack",
    "fp8_unpack",
    "block_mask",
    "bytes_crc",
)
ACCESSES = ("held", "streamed", "scalar")
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

_FLAGS = ("-std=c++20", "-O1", "-g1", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas")
_INCLUDES = ("-I", str(CSRC / "emu"), "-I", str(CSRC))
_SANITIZERS = {
    "plain": ((), ()),
    # -O0: the optimiser takes most of a minute for what UBSan makes of the row kernels
    "asan": (
        ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-O0"),
        ("SF_EMU_ASAN",),
    ),
    "tsan": (("-fsanitize=thread",), ("SF_EMU_TSAN",)),
}


def unavailable_reason() -> str | None:
    """Why the emulator cannot be built here, or None."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return f"the emulator switches x86-64 stacks, this is {platform.machine()}"
    return None if shutil.which("g++") else "the emulator is built by g++, which is not installed"


def _build(flags: tuple[str, ...], sources: list[Path], target: Path) -> Path:
    """Runs g++ unless it was done before: the target's name gets the hash of sources and flags."""
    digest = hashlib.sha256(" ".join(flags).encode())
    headers = [path for path in CSRC.rglob("*") if path.suffix in (".h", ".cuh")]
    for path in sorted({*headers, *sources}):
        digest.update(path.read_bytes())
    target = target.with_name(f"{target.stem}-{digest.hexdigest()[:16]}{target.suffix}")
    if target.exists():
        return target
    BUILD.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f"{target.stem}.{os.getpid()}.tmp")
    language = () if sources[0].suffix == ".o" else ("-x", "c++")
    inputs = [*language, *map(str, sources)]
    command = ["g++", *_FLAGS, *flags, *_INCLUDES, *inputs, "-o", str(temporary)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=BUILD_TIMEOUT_S)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    temporary.rename(target)
    return target


def _objects(kind: str, flags: tuple[str, ...], sources: list[Path]) -> list[Path]:
    """One object per source, compiled side by side."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(
            pool.map(lambda p: _build(("-c", *flags), [p], BUILD / f"{p.stem}_{kind}.o"), sources)
        )


def _op_sources() -> list[Path]:
    kernels = sorted(CSRC.glob("[!e]*/*_cuda.cu"))
    return [
        *kernels,
        CSRC / "loss" / "loss_rows_sm90.cu",  # by name: others may hold what no CPU can run
        CSRC / "emu" / "planted_bugs.cu",
        CSRC / "core" / "tensor_view.cpp",
        CSRC / "core" / "error.cpp",
    ]


@functools.cache
def program(sanitizer: str) -> Path:
    """The executable of sanitized_main.cpp. The emulator's own files are left uninstrumented."""
    flags, defines = _SANITIZERS[sanitizer]
    machine = _objects(sanitizer, tuple(f"-D{name}" for name in defines), EMULATOR)
    sources = [*_op_sources(), CSRC / "emu" / "sanitized_main.cpp"]
    return _build(
        flags, [*_objects(sanitizer, flags, sources), *machine], BUILD / f"main-{sanitizer}"
    )


def run_program(sanitizer: str, *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(program(sanitizer)), *args], capture_output=True, text=True, timeout=RUN_TIMEOUT_S
    )


@functools.cache
def library() -> ctypes.CDLL:
    sources = [*_op_sources(), *EMULATOR, CSRC / "emu" / "ops_abi.cpp"]
    objects = _objects("plain", ("-fPIC",), sources)
    loaded = ctypes.CDLL(str(_build(("-shared",), objects, BUILD / "ops.so")))
    for name in (*OPS, "planted"):
        getattr(loaded, f"emu_{name}").restype = ctypes.c_char_p
    return loaded


def set_order(order: str, seed: int = 1) -> None:
    library().emu_set_order(ORDERS[order], ctypes.c_uint64(seed))


Argument = Tensor | int | float | bytes | None


def _call(op: str, *args: Argument) -> None:
    """Raises RuntimeError with the text of what the launcher threw. None: a null pointer."""

    def convert(
        arg: Argument,
    ) -> ctypes.c_void_p | ctypes.c_int64 | ctypes.c_double | bytes:
        if isinstance(arg, Tensor):
            assert arg.is_contiguous()
            return ctypes.c_void_p(arg.data_ptr())
        if arg is None:
            return ctypes.c_void_p(None)
        if isinstance(arg, float):
            return ctypes.c_double(arg)
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


class RowResults(NamedTuple):
    """[N] each; correct uint8, the others float32."""

    loss: Tensor
    accepted: Tensor
    correct: Tensor
    top_prob: Tensor
    entropy: Tensor


def loss_rows_(
    logits_NV: Tensor,
    teacher_RU: Tensor | None,
    *,
    row_to_teacher: Tensor,
    weight: Tensor,
    kind: str,
    temperature: float = 1.0,
    beta: float = 0.5,
    hard_weight: float = 0.0,
    teacher_lse: Tensor | None = None,
    teacher_argmax: Tensor | None = None,
    label: Tensor | None = None,
    kl_weight: Tensor | None = None,
    writes_gradient: bool = True,
    path: tuple[str, int] | None = None,
) -> RowResults:
    """csrc/loss/loss_rows.h; logits become the gradient. path: (a key of ACCESSES, blocks)."""
    rows, vocab = logits_NV.shape
    teacher_shape = (teacher_RU.shape[0], teacher_RU.shape[1]) if teacher_RU is not None else (0, 0)
    if teacher_RU is None:
        assert label is not None
        teacher_shape = (label.shape[0], 0)
    teacher_code = DTYPE_CODES[(logits_NV if teacher_RU is None else teacher_RU).dtype]
    loss, accepted, top_prob, entropy = (torch.full((rows,), torch.nan) for _ in range(4))
    correct = torch.full((rows,), 99, dtype=torch.uint8)
    _call(
        "loss_rows",
        *(logits_NV, DTYPE_CODES[logits_NV.dtype], rows, vocab),
        *(teacher_RU, teacher_code, *teacher_shape, row_to_teacher, weight),
        *(teacher_lse, teacher_argmax, label, kl_weight),
        *(loss, accepted, correct, top_prob, entropy),
        *(LOSS_KINDS.index(kind), float(temperature), float(beta), float(hard_weight)),
        *(int(writes_gradient), -1 if path is None else ACCESSES.index(path[0])),
        1 if path is None else path[1],
    )
    return RowResults(loss, accepted, correct, top_prob, entropy)


def loss_rows_plan(
    capability_major: int,
    vocab: int,
    dtype: torch.dtype,
    teacher_dtype: torch.dtype,
    *,
    aligned: bool = True,
) -> tuple[str, int]:
    plan = torch.zeros(2, dtype=torch.int64)
    codes = DTYPE_CODES[dtype], DTYPE_CODES[teacher_dtype]
    _call("loss_rows_plan", capability_major, vocab, *codes, int(aligned), plan)
    return ACCESSES[int(plan[0])], int(plan[1])


def step_sums(
    loss_N: Tensor,
    accepted_N: Tensor,
    correct_N: Tensor,
    top_prob_N: Tensor,
    entropy_N: Tensor,
    weight_N: Tensor,
    step_N: Tensor,
    num_steps: int,
) -> Tensor:
    """[7, L] float64."""
    sums = torch.full((7, num_steps), torch.nan, dtype=torch.float64)
    statistics = (loss_N, accepted_N, correct_N, top_prob_N, entropy_N)
    _call("step_sums", *statistics, weight_N, step_N, loss_N.shape[0], sums, num_steps)
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


def pack_samples(
    ids: Sequence[Tensor],
    masks: Sequence[Tensor],
    features: Sequence[Sequence[Tensor]],
    scales: Sequence[Sequence[Tensor | None]],
    dtypes: Sequence[torch.dtype],
) -> tuple[Tensor, Tensor, Tensor, Tensor, tuple[Tensor, ...]]:
    """As ops.pack_samples; dtypes: of the packed features. float32 and bfloat16 only."""
    total, widths = sum(map(len, ids)), [f.shape[-1] for f in features[0]]
    flat = [tensor for row in features for tensor in row]
    flat_scales = [tensor for row in scales for tensor in row]
    out = [torch.full((total, w), 7).to(d) for w, d in zip(widths, dtypes, strict=True)]
    out_ids, positions = (torch.full((total,), -7) for _ in range(2))
    out_mask = torch.full((total,), 99, dtype=torch.uint8)
    cu_seqlens = torch.full((len(ids) + 1,), -7, dtype=torch.int32)
    _call(
        "pack_samples",
        len(ids),
        torch.tensor([len(x) for x in ids]),
        _addresses(ids),
        _addresses(masks),
        len(widths),
        torch.tensor(widths),
        torch.tensor([DTYPE_CODES[d] for d in dtypes]),
        _addresses(flat),
        _addresses(flat_scales),
        torch.tensor([0 if s is None else s.shape[1] for s in flat_scales]),
        _addresses(out),
        out_ids,
        out_mask,
        positions,
        cu_seqlens,
    )
    return out_ids, out_mask, positions, cu_seqlens, tuple(out)


def _addresses(tensors: Sequence[Tensor | None]) -> Tensor:
    return torch.tensor([0 if t is None else t.data_ptr() for t in tensors], dtype=torch.int64)


def own_keys_merge_(
    query: Tensor,
    out: Tensor,
    lse: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    rows: Sequence[Tensor | None],
    scale: float,
) -> None:
    """As `ops.own_keys_merge_`."""
    table = _own_keys_table(keys, values, rows, keys, values)
    sizes = (*query.shape, keys[0].shape[1], table, len(keys), torch.tensor(scale))
    _call("own_keys_merge", query, out, lse, DTYPE_CODES[query.dtype], *sizes)


def own_keys_grads_(
    grad_out: Tensor,
    query: Tensor,
    out: Tensor,
    lse: Tensor,
    grad_query: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    rows: Sequence[Tensor | None],
    scale: float,
) -> list[Tensor]:
    """As `ops.own_keys_grads_`; gradients that the kernel leaves unwritten are NaN."""
    grads = [torch.full_like(x, torch.nan) for x in (*keys, *values)]
    table = _own_keys_table(keys, values, rows, grads[: len(keys)], grads[len(keys) :])
    sizes = (*query.shape, keys[0].shape[1], table, len(keys), torch.tensor(scale))
    inputs = (grad_out, query, out, lse, grad_query, DTYPE_CODES[query.dtype])
    _call("own_keys_grads", *inputs, *sizes)
    return grads


def _own_keys_table(
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    rows: Sequence[Tensor | None],
    grad_keys: Sequence[Tensor],
    grad_values: Sequence[Tensor],
) -> Tensor:
    """[steps, 6] int64, as csrc/emu/ops_abi.cpp wants it."""
    steps = zip(keys, values, rows, grad_keys, grad_values, strict=True)
    return torch.tensor(
        [
            [len(k), *(0 if x is None else x.data_ptr() for x in (k, v, r, gk, gv))]
            for k, v, r, gk, gv in steps
        ]
    )


def fp8_pack(x_NW: Tensor, *, checksum: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """(payload, scale, summary): csrc/wire/fp8_rows.h."""
    rows, width = x_NW.shape
    payload = torch.full((rows, width), 0xA5, dtype=torch.uint8)
    scale, summary = torch.full((rows,), -7.0), torch.full((2,), -7)
    row_crc = torch.full((rows,), -7, dtype=torch.int32)
    inputs = (x_NW, DTYPE_CODES[x_NW.dtype], rows, width)
    _call("fp8_pack", *inputs, payload, scale, row_crc, summary, int(checksum))
    return payload, scale, summary


def fp8_unpack(
    payload_NW: Tensor, scale_N: Tensor, dtype: torch.dtype, *, checksum: bool = True
) -> tuple[Tensor, Tensor]:
    """(y, summary)"""
    rows, width = payload_NW.shape
    y, summary = torch.full((rows, width), torch.nan, dtype=dtype), torch.full((2,), -7)
    row_crc = torch.full((rows,), -7, dtype=torch.int32)
    outputs = (y, DTYPE_CODES[dtype], rows, width, row_crc, summary, int(checksum))
    _call("fp8_unpack", payload_NW, scale_N, *outputs)
    return y, summary


def bytes_crc(data: Tensor) -> int:
    """csrc/wire/bytes_crc.h"""
    parts = -(-len(data) // (64 << 10))
    part_crc, crc = torch.full((parts,), -7, dtype=torch.int32), torch.full((1,), -7)
    _call("bytes_crc", data, len(data), part_crc, parts, crc)
    return int(crc)


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
