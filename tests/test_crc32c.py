"""Every path of crc32c and of the copy that computes it, against the table.

Known values and the arguments' errors of the default path are in test_ops_pack.py.
"""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from specforge_ext import _C

PATHS = _C.crc32c_paths()


def random_bytes(size: int, *, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator)


def table(data: Tensor, crc: int = 0) -> int:
    return _C.crc32c_table(memoryview(data.numpy()), crc)


def test_the_default_is_the_last_path() -> None:
    assert PATHS[0] == "table"
    assert set(PATHS) <= {"table", "sse42", "vpclmul"}
    data = random_bytes(9999)
    assert _C.crc32c(memoryview(data.numpy()), 5) == _C.crc32c_by(PATHS[-1], data, 5)


@pytest.mark.parametrize("path", PATHS)
def test_known_values(path: str) -> None:
    """RFC 3720, section B.4, and a message long enough for every loop (sum of its parts)."""
    digits = torch.tensor(list(b"123456789"), dtype=torch.uint8)
    assert _C.crc32c_by(path, digits) == 0xE3069283
    assert _C.crc32c_by(path, torch.zeros(32, dtype=torch.uint8)) == 0x8A9136AA
    assert _C.crc32c_by(path, torch.full((32,), 255, dtype=torch.uint8)) == 0x62A8AB43


# Blocks of 64 bytes in groups of 256, three lanes of 1024: every length around them, at offsets
# that put source and destination on and off each other's lines.
@pytest.mark.parametrize("path", PATHS)
def test_every_short_length(path: str) -> None:
    source, target = random_bytes(1700), torch.zeros(1700, dtype=torch.uint8)
    for size in [*range(1100), *range(1530, 1545)]:
        data = source[size % 67 : size % 67 + size]
        wanted = table(data, size * 7919)
        assert _C.crc32c_by(path, data, size * 7919) == wanted, size
        out = target[size % 61 : size % 61 + size]
        for streams in (False, True):
            out.zero_()
            assert _C.copy_crc32c_by(path, out, data, size * 7919, streams) == wanted, size
            assert torch.equal(out, data)


@pytest.mark.parametrize("path", PATHS)
def test_random_lengths_and_alignments_touch_nothing_else(path: str) -> None:
    rng = random.Random(1)
    source = random_bytes(80_000)
    for _ in range(60):
        size, start, to = rng.randrange(70_000), rng.randrange(200), rng.randrange(200)
        data, crc = source[start : start + size], rng.randrange(1 << 32)
        memory = torch.full((to + size + 100,), 0xA5, dtype=torch.uint8)
        streams = rng.random() < 0.5
        got = _C.copy_crc32c_by(path, memory[to : to + size], data, crc, streams)
        assert got == table(data, crc) == _C.crc32c_by(path, data, crc)
        assert torch.equal(memory[to : to + size], data)
        assert (memory[:to] == 0xA5).all() and (memory[to + size :] == 0xA5).all()


@pytest.mark.parametrize("path", PATHS)
def test_lengths_that_are_taken_in_parts(path: str) -> None:
    """Around 256 KiB, where four parts begin, and off every multiple within a step of 512 bytes."""
    source, target = random_bytes(3 << 18), torch.zeros(3 << 18, dtype=torch.uint8)
    base = 1 << 18
    sizes = [base + d for d in (-1, 0, 1, 63, 64, 255, 256, 257, 511, 512, 513, 700, 1024, 99_991)]
    for i, size in enumerate(sizes):
        data, crc = source[i : i + size], i * 0x01234567
        wanted = table(data, crc)
        assert _C.crc32c_by(path, data, crc) == wanted, size
        for streams in (False, True):
            out = target[i * 7 : i * 7 + size].zero_()
            assert _C.copy_crc32c_by(path, out, data, crc, streams) == wanted, (size, streams)
            assert torch.equal(out, data)


def test_a_copy_that_goes_past_the_caches_by_itself() -> None:
    source = random_bytes((48 << 20) + 77)
    target = torch.empty_like(source)
    assert _C.copy_crc32c(target[3:], source[3:]) == _C.crc32c_by("table", source[3:])
    assert torch.equal(target[3:], source[3:])


def test_combine_is_the_checksum_of_the_whole() -> None:
    rng = random.Random(2)
    data = random_bytes(10_000)
    for cut in [0, 1, 9_999, 10_000, *(rng.randrange(10_000) for _ in range(20))]:
        first, second = table(data[:cut]), table(data[cut:])
        assert _C.crc32c_combine(first, second, 10_000 - cut) == table(data)


def test_combine_over_lengths_that_no_test_could_allocate() -> None:
    """Associative: (a, b), c equals a, (b, c), whatever the lengths are."""
    a, b, c, n, m = 0x12345678, 0x9ABCDEF0, 0x0F1E2D3C, (1 << 40) + 3, (1 << 61) - 1
    left = _C.crc32c_combine(_C.crc32c_combine(a, b, n), c, m)
    right = _C.crc32c_combine(a, _C.crc32c_combine(b, c, m), n + m)
    assert left == right


@pytest.mark.parametrize("path", PATHS)
def test_every_flipped_bit_shows(path: str) -> None:
    data = random_bytes(300)
    wanted = _C.crc32c_by(path, data)
    for bit in range(8 * 300):
        data[bit // 8] ^= 1 << bit % 8
        assert _C.crc32c_by(path, data) != wanted
        data[bit // 8] ^= 1 << bit % 8


def test_errors_name_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match=r"path must be one of table.* on this CPU, got fast"):
        _C.crc32c_by("fast", torch.zeros(1))
    with pytest.raises(ValueError, match="dst must be of as many bytes as src, got 4"):
        _C.copy_crc32c_by("table", torch.zeros(1), torch.zeros(2))
    with pytest.raises(ValueError, match="crc32c: data must be contiguous"):
        _C.crc32c_by("table", torch.zeros(4, 2)[:, 0])
