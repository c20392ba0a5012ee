"""The wire kernels: fp8_e4m3_row both ways, and the copy and the check that compute a crc32c.

    python benchmarks/wire.py [--json FILE] [--quick]

pack and unpack: a feature [tokens, 3 layers * 4096] to e4m3 codes, a float32 scale per token and
layer and a checksum, and back. copy and verify: the same bytes as they are. Every implementation
is compared with the definition first, then timed in turns in one process.

gb_per_s counts the bytes of the feature (not of its encoding) in both directions. memcpy copies
that feature: it moves more bytes than pack and unpack must, so its share may exceed 1. Memory of
ours, of memcpy and of torch-eager-out is allocated beforehand; torch-eager is what one writes.
zlib computes crc32, not crc32c. torch-compile is left out by --quick. One thread. Small features
are packed several times per measurement, so that they are timed in the caches.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from functools import partial

import google_crc32c
import numpy as np
import torch
from torch import Tensor

from common import BenchScript, Report, Timing, time_interleaved
from specforge_ext import _C, ops
from specforge_ext.ops.reference import wire as reference

LAYERS, WIDTH = 3, 4096
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
MIB = 1 << 20
CASES = (1, 8, 64)
QUICK_CASES = (1, 8)
COMPILE_MIB = 8
"""torch.compile takes its time for every size: one is enough to see what it gains."""
BASELINE = {"pack": "torch-eager", "unpack": "torch-eager", "copy": "memcpy", "verify": "zlib"}

Impls = dict[str, Callable[[], object]]


def torch_pack(x_NW: Tensor) -> tuple[Tensor, Tensor]:
    x_NW = x_NW.float()
    scale_N1 = x_NW.abs().amax(dim=1, keepdim=True).clamp_min(reference.MIN_AMAX) / 448.0
    return (x_NW * (1 / scale_N1)).to(torch.float8_e4m3fn), scale_N1


def torch_unpack(codes_NW: Tensor, scale_N1: Tensor, dtype: torch.dtype) -> Tensor:
    return (codes_NW.float() * scale_N1).to(dtype)


class TorchOut:
    """The same with every intermediate in memory that is there already."""

    def __init__(self, x_NW: Tensor) -> None:
        self.floats, self.products = (x_NW.to(torch.float32, copy=True) for _ in range(2))
        self.codes = torch.empty(x_NW.shape, dtype=torch.float8_e4m3fn)
        self.out = torch.empty_like(x_NW)

    def pack(self, x_NW: Tensor) -> tuple[Tensor, Tensor]:
        self.floats.copy_(x_NW)
        torch.abs(self.floats, out=self.products)
        scale_N1 = self.products.amax(dim=1, keepdim=True).clamp_min(reference.MIN_AMAX) / 448.0
        torch.mul(self.floats, 1 / scale_N1, out=self.products)
        return self.codes.copy_(self.products), scale_N1

    def unpack(self, codes_NW: Tensor, scale_N1: Tensor) -> Tensor:
        self.floats.copy_(codes_NW)
        torch.mul(self.floats, scale_N1, out=self.products)
        return self.out.copy_(self.products)


def array(tensor: Tensor) -> np.ndarray:
    return tensor.flatten().view(torch.uint8).numpy()


def zlib_crc(codes: Tensor, scale: Tensor) -> int:
    return zlib.crc32(array(scale), zlib.crc32(array(codes)))


def google_crc(codes: Tensor, scale: Tensor) -> int:
    return google_crc32c.extend(google_crc32c.value(array(codes)), array(scale))


def pack_impls(x: Tensor, *, compiles: bool) -> Impls:
    x_NW = x.view(-1, WIDTH)
    outs = TorchOut(x_NW)
    copy = torch.empty_like(x)
    given = torch.empty(x.shape, dtype=torch.uint8), torch.empty(len(x), LAYERS)
    wanted, wanted_scale = reference.fp8_pack(x_NW)
    crc = google_crc(wanted, wanted_scale)
    rows = ops.fp8_pack(x, layers=LAYERS)
    for codes, scale in (torch_pack(x_NW), outs.pack(x_NW), (rows.payload, rows.scale)):
        assert torch.equal(codes.view(torch.uint8).view(-1), wanted.view(-1))
        assert torch.equal(scale.view(-1), wanted_scale)
    assert rows.crc == crc
    impls: Impls = {
        "torch-eager": lambda: torch_pack(x_NW),
        "torch-eager-out": lambda: outs.pack(x_NW),
        "torch-eager-out+zlib": lambda: zlib_crc(*outs.pack(x_NW)),
        "torch-eager-out+google-crc32c": lambda: google_crc(*outs.pack(x_NW)),
        "specforge_ext": lambda: ops.fp8_pack(x, layers=LAYERS, out=given),
        "specforge_ext/no-checksum": lambda: ops.fp8_pack(
            x, layers=LAYERS, out=given, checksum=False
        ),
        "specforge_ext/allocating": lambda: ops.fp8_pack(x, layers=LAYERS),
        "memcpy": lambda: copy.copy_(x),
    }
    if compiles:
        compiled = torch.compile(torch_pack, dynamic=False)
        compiled(x_NW)
        impls["torch-compile"] = lambda: compiled(x_NW)
    return impls


def unpack_impls(x: Tensor, *, compiles: bool) -> Impls:
    rows = ops.fp8_pack(x, layers=LAYERS)
    unchecked = ops.Fp8Rows(rows.payload, rows.scale, None)
    codes, scale = rows.payload.view(-1, WIDTH), rows.scale.view(-1, 1)
    codes_8 = codes.view(torch.float8_e4m3fn)
    outs, out, copy = TorchOut(x.view(-1, WIDTH)), torch.empty_like(x), torch.empty_like(x)
    wanted = reference.fp8_unpack(codes, scale.view(-1), x.dtype)
    for came in (ops.fp8_unpack(rows, dtype=x.dtype), outs.unpack(codes_8, scale)):
        assert torch.equal(came.view(-1), wanted.view(-1))
    impls: Impls = {
        "torch-eager": lambda: torch_unpack(codes_8, scale, x.dtype),
        "torch-eager-out": lambda: outs.unpack(codes_8, scale),
        "torch-eager-out+zlib": lambda: (zlib_crc(codes, scale), outs.unpack(codes_8, scale)),
        "torch-eager-out+google-crc32c": lambda: (
            google_crc(codes, scale),
            outs.unpack(codes_8, scale),
        ),
        "specforge_ext": lambda: ops.fp8_unpack(rows, out=out),
        "specforge_ext/no-checksum": lambda: ops.fp8_unpack(unchecked, out=out),
        "specforge_ext/allocating": lambda: ops.fp8_unpack(rows, dtype=x.dtype),
        "memcpy": lambda: copy.copy_(x),
    }
    if compiles:
        compiled = torch.compile(torch_unpack, dynamic=False)
        compiled(codes_8, scale, x.dtype)
        impls["torch-compile"] = lambda: compiled(codes_8, scale, x.dtype)
    return impls


def copy_impls(x: Tensor) -> Impls:
    out, data = torch.empty_like(x), array(x)
    assert _C.copy_crc32c(out, x) == google_crc32c.value(data)
    impls: Impls = {
        "memcpy": lambda: out.copy_(x),
        "memcpy+zlib": lambda: (zlib.crc32(data), out.copy_(x)),
        "memcpy+google-crc32c": lambda: (google_crc32c.value(data), out.copy_(x)),
    }
    for path in _C.crc32c_paths()[1:]:
        impls[f"specforge_ext/{path}"] = partial(
            _C.copy_crc32c_by, path, out, x, 0, x.nbytes >= 48 * MIB
        )
    return impls | {"specforge_ext": lambda: _C.copy_crc32c(out, x)}


def verify_impls(x: Tensor) -> Impls:
    data = array(x)
    assert _C.crc32c(data) == google_crc32c.value(data)
    return {
        "zlib": lambda: zlib.crc32(data),
        "google-crc32c": lambda: google_crc32c.value(data),
        "specforge_ext": lambda: _C.crc32c(data),
    }


def repeated(call: Callable[[], object], times: int) -> Callable[[], None]:
    def run() -> None:
        for _ in range(times):
            call()

    return run


def run_case(report: Report, case: str, impls: Impls, nbytes: int, *, quick: bool) -> None:
    times = max(1, 4 * MIB // nbytes)
    rounds = 3 if quick else 5
    calls = {impl: repeated(call, times) for impl, call in impls.items()}
    timings = {
        impl: Timing(t.median_s / times, t.spread_s / times, t.cpu_s / times, t.rounds)
        for impl, t in time_interleaved(calls, rounds=rounds).items()
    }
    memcpy = timings.get("memcpy")
    base = BASELINE[case.split("/")[0]]
    for impl, timing in timings.items():
        gb_per_s = nbytes / timing.median_s / 1e9
        ratio = timings[base].median_s / timing.median_s
        cpu_ratio = timings[base].cpu_s / timing.cpu_s
        share = memcpy.median_s / timing.median_s if memcpy else None
        report.add(
            case,
            impl,
            timing,
            None,
            gb_per_s=gb_per_s,
            baseline=base,
            ratio=ratio,
            cpu_ratio=cpu_ratio,
            share_of_memcpy=share,
        )
        print(f"    {gb_per_s:.2f} GB/s, x{ratio:.1f} of {base}, in CPU time x{cpu_ratio:.1f}")


def main() -> None:
    script = BenchScript(__doc__ or "")
    torch.set_num_threads(1)
    report = Report("wire", "torch-eager")
    for size in QUICK_CASES if script.quick else CASES:
        for name, dtype in DTYPES.items():
            tokens = size * MIB // (LAYERS * WIDTH * dtype.itemsize)
            x = torch.randn(tokens, LAYERS * WIDTH, generator=torch.Generator().manual_seed(0))
            x = x.to(dtype)
            compiles = size == COMPILE_MIB and not script.quick
            for job, impls in {"pack": pack_impls, "unpack": unpack_impls}.items():
                made = impls(x, compiles=compiles)
                run_case(report, f"{job}/{size}MiB/{name}", made, x.nbytes, quick=script.quick)
        data = torch.randint(0, 256, (size * MIB,), dtype=torch.uint8)
        for job, make in {"copy": copy_impls, "verify": verify_impls}.items():
            run_case(report, f"{job}/{size}MiB", make(data), data.nbytes, quick=script.quick)
        if script.json:
            report.write(script.json)


if __name__ == "__main__":
    main()
