"""The CUDA kernels of csrc/wire, run by the emulator, against ops/reference/wire.py: bit for bit.

The emulator runs the bit arithmetic; the hardware's e4m3 instruction needs a GPU (test_gpu below).
Legend: N rows, W width.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import emulated
from specforge_ext import _C, ops
from specforge_ext.ops.reference import wire as reference

REASON = emulated.unavailable_reason()
needs_emulator = pytest.mark.skipif(REASON is not None, reason=str(REASON))
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
    if REASON is None:
        emulated.set_order("forward")


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal, sign of zero included; every NaN is the same."""
    both_nan = a.isnan() & b.isnan()
    return bool(((a == b) & (a.signbit() == b.signbit()) | both_nan).all())


def table_crc(payload: Tensor, scale: Tensor) -> int:
    return _C.crc32c_by("table", scale, _C.crc32c_by("table", payload))


# One byte; below, at and past a chunk; one warp's chunks and one more; a prime, every row unaligned
# (scalar path); several warps; two rounds of 256 threads, the first one not full.
@needs_emulator
@pytest.mark.parametrize("width", [1, 15, 16, 17, 512, 528, 1031, 2048, 4352])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_are_the_definition_bit_for_bit(dtype: torch.dtype, width: int) -> None:
    x = (torch.randn(11, width) * torch.logspace(-4, 3, 11)[:, None]).to(dtype)
    x[3] = 0
    payload, scale, summary = emulated.fp8_pack(x)
    wanted, wanted_scale = reference.fp8_pack(x)
    assert torch.equal(payload, wanted) and torch.equal(scale, wanted_scale)
    assert summary.tolist() == [table_crc(wanted, wanted_scale), 0]
    y, summary = emulated.fp8_unpack(payload, scale, dtype)
    assert same_bits(y, reference.fp8_unpack(payload, scale, dtype))
    assert summary.tolist() == [table_crc(wanted, wanted_scale), 0]


@needs_emulator
@pytest.mark.parametrize("dtype", DTYPES)
def test_all_codes_decode_exactly(dtype: torch.dtype) -> None:
    codes = torch.arange(256, dtype=torch.uint8).expand(9, 256).contiguous()
    values = [1.0, 0.37, 2.0**-126, 1e-42, 2.0**120, 3e-7, 0.0, torch.inf, torch.nan]
    scale = torch.tensor(values)
    y, summary = emulated.fp8_unpack(codes, scale, dtype)
    assert same_bits(y, reference.fp8_unpack(codes, scale, dtype))
    assert summary.tolist() == [table_crc(codes, scale), 1]


@needs_emulator
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_pattern(dtype: torch.dtype) -> None:
    """Rows of equal exponents, so that all patterns of the mantissa meet all roundings."""
    patterns = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype)
    x = patterns[patterns.isfinite()].view(-1, 128)
    payload, scale, summary = emulated.fp8_pack(x)
    wanted, wanted_scale = reference.fp8_pack(x)
    assert torch.equal(payload, wanted) and torch.equal(scale, wanted_scale)
    assert summary[1] == 0


@needs_emulator
@pytest.mark.parametrize("width", [512, 130])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_are_not_finite_are_marked_and_counted(dtype: torch.dtype, width: int) -> None:
    x = torch.randn(20, width).to(dtype)
    x[1, 0], x[7, width - 1], x[19, width // 2] = torch.nan, torch.inf, -torch.inf
    payload, scale, summary = emulated.fp8_pack(x)
    wanted, wanted_scale = reference.fp8_pack(x)
    assert torch.equal(payload, wanted) and same_bits(scale, wanted_scale)
    assert summary.tolist() == [table_crc(payload, scale), 3]


@needs_emulator
@pytest.mark.parametrize("offset", [1, 4, 8])
def test_misaligned_memory(offset: int) -> None:
    x = torch.randn(offset + 3 * 64)[offset:].view(3, 64)
    payload, scale, _ = emulated.fp8_pack(x)
    wanted, wanted_scale = reference.fp8_pack(x)
    assert torch.equal(payload, wanted) and torch.equal(scale, wanted_scale)


@needs_emulator
@pytest.mark.parametrize("order", ["reverse", "random"])
def test_the_order_of_threads_changes_nothing(order: str) -> None:
    x = torch.randn(19, 1040).to(torch.bfloat16)
    forward = emulated.fp8_pack(x)
    emulated.set_order(order)
    for a, b in zip(forward, emulated.fp8_pack(x), strict=True):
        assert torch.equal(a, b)


# 0; fewer rows than threads of the summary; more, in unequal shares.
@needs_emulator
@pytest.mark.parametrize("rows", [0, 1, 700, 1031])
def test_checksums_of_many_rows_are_joined(rows: int) -> None:
    payload, scale, summary = emulated.fp8_pack(torch.randn(rows, 20))
    assert summary.tolist() == [table_crc(payload, scale), 0]


@needs_emulator
def test_without_a_checksum() -> None:
    x = torch.randn(9, 64)
    payload, scale, summary = emulated.fp8_pack(x, checksum=False)
    assert torch.equal(payload, reference.fp8_pack(x)[0]) and summary.tolist() == [0, 0]
    y, summary = emulated.fp8_unpack(payload, scale, x.dtype, checksum=False)
    assert same_bits(y, reference.fp8_unpack(payload, scale, x.dtype))
    assert summary.tolist() == [0, 0]


# Nothing; one byte; below, at and past a chunk; one round of the block and more; a part, one off it
# on either side; several parts with an odd end, which is read byte by byte.
@needs_emulator
@pytest.mark.parametrize(
    "nbytes", [0, 1, 15, 16, 17, 4096, 5000, 65535, 65536, 65537, 3 * 65536 + 4112, 200003]
)
def test_checksum_of_bytes(nbytes: int) -> None:
    data = torch.randint(0, 256, (nbytes,), dtype=torch.uint8)
    assert emulated.bytes_crc(data) == _C.crc32c_by("table", data) == ops.crc32c(data)


@needs_emulator
@pytest.mark.parametrize("offset", [1, 8, 16])
def test_checksum_of_misaligned_bytes(offset: int) -> None:
    data = torch.randint(0, 256, (offset + 70000,), dtype=torch.uint8)[offset:]
    assert emulated.bytes_crc(data) == _C.crc32c_by("table", data)


@needs_emulator
def test_checksum_of_more_parts_than_threads() -> None:
    """513 parts of zeros but for one byte, whose place alone tells."""
    data = torch.zeros(512 * 65536 + 5, dtype=torch.uint8)
    seen = set()
    for at in (0, 65536, 300 * 65536 + 7, len(data) - 1):
        data[at] = 1
        seen.add(crc := emulated.bytes_crc(data))
        assert crc == ops.crc32c(data)
        data[at] = 0
    assert len(seen) == 4


@needs_emulator
@pytest.mark.parametrize("order", ["reverse", "random"])
def test_checksum_in_any_order_of_threads(order: str) -> None:
    data = torch.randint(0, 256, (140000,), dtype=torch.uint8)
    emulated.set_order(order)
    assert emulated.bytes_crc(data) == _C.crc32c_by("table", data)


def test_checksum_of_other_tensors() -> None:
    for data, message in (
        (torch.zeros(4), r"bytes_crc: data must be .*u8, got .*f32"),
        (torch.zeros(4, 2, dtype=torch.uint8), r"bytes_crc: data must be \[nbytes.*got \[4, 2\]"),
        (torch.zeros(8, dtype=torch.uint8)[::2], r"bytes_crc: data must be contiguous"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.crc32c(data)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
@pytest.mark.parametrize("nbytes", [0, 1, 17, 65537, (9 << 20) + 3])
def test_gpu_checksum_is_that_of_the_cpu(nbytes: int) -> None:
    data = torch.randint(0, 256, (nbytes,), dtype=torch.uint8)
    assert ops.crc32c(data.cuda()) == ops.crc32c(data)
    assert ops.crc32c(data.cuda()[1:]) == ops.crc32c(data[1:])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
@pytest.mark.parametrize("width", [1, 17, 1031, 4096, 5120])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gpu_gives_the_bits_of_the_cpu(dtype: torch.dtype, width: int) -> None:
    x = (torch.randn(333, width) * torch.logspace(-4, 3, 333)[:, None]).to(dtype)
    cpu, cuda = ops.fp8_pack(x), ops.fp8_pack(x.cuda())
    assert torch.equal(cuda.payload.cpu(), cpu.payload)
    assert torch.equal(cuda.scale.cpu(), cpu.scale)
    assert cuda.crc == cpu.crc
    back = ops.fp8_unpack(cuda, dtype=dtype)
    assert same_bits(back.cpu(), ops.fp8_unpack(cpu, dtype=dtype))
