"""fp8_e4m3_row: codes and values bit for bit those of torch, the checksum that of the definition.

Legend: T tokens, L layers, W width, N rows.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from specforge_ext import _C, ops
from specforge_ext.ops.reference import wire as reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ISAS = _C.available_isas()
TORCH_SATURATES = torch.tensor(1e9).to(torch.float8_e4m3fn).view(torch.uint8) == 0x7E


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    _C.set_isa(request.param)
    yield request.param
    _C.set_isa("auto")


def bits(x: Tensor) -> Tensor:
    """Bit patterns, every NaN the same: torch does not say which one it gives."""
    integers = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
    return x.contiguous().view(integers[x.dtype]).masked_fill(x.isnan(), -1)


def encode(x: Tensor) -> Tensor:
    codes = torch.empty(x.shape, dtype=torch.uint8)
    _C.fp8_encode(x, codes)
    return codes


def from_bits(patterns: Tensor) -> Tensor:
    return patterns.to(torch.int32).view(torch.float32)


def torch_codes(x: Tensor) -> Tensor:
    """torch's own conversion; where it gave NaN for what is too large (before 2.12), 448."""
    codes = x.to(torch.float8_e4m3fn).view(torch.uint8)
    if TORCH_SATURATES:
        return codes
    too_large = (x.abs() > 464) & ~x.isnan()
    return torch.where(too_large, 0x7E + 128 * x.signbit(), codes).to(torch.uint8)


def random_feature(rows: int, width: int, dtype: torch.dtype, *, seed: int = 0) -> Tensor:
    """Rows of very different magnitudes."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, width, generator=generator)
    return (x * torch.logspace(-4, 3, max(rows, 1))[:rows, None]).to(dtype)


# ---- the conversion alone -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_encode_is_torchs_for_every_16_bit_pattern(isa: str, dtype: torch.dtype) -> None:
    x = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype).float()
    assert torch.equal(encode(x), torch_codes(x))


def test_encode_is_torchs_on_a_stride_through_all_f32_patterns(isa: str) -> None:
    x = from_bits(torch.arange(-(1 << 31), 1 << 31, 4093))  # a prime: every low pattern occurs
    assert torch.equal(encode(x), torch_codes(x))


def test_encode_is_torchs_on_random_f32_patterns_in_range(isa: str) -> None:
    generator = torch.Generator().manual_seed(0)
    patterns = torch.randint(0x3A000000, 0x43F80000, (1 << 20,), generator=generator)
    x = from_bits(patterns)
    assert torch.equal(encode(x), torch_codes(x))
    assert torch.equal(encode(-x), torch_codes(-x))


def test_encode_is_torchs_around_every_boundary(isa: str) -> None:
    """Each of the 126 gaps: its ends and its middle, and 100 f32 to both sides of all three."""
    grid = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    middle = (grid[1:] + grid[:-1]) / 2
    around = torch.cat([grid, middle, torch.tensor([464.0, 480.0])]).view(torch.int32)
    x = from_bits((around[:, None] + torch.arange(-100, 101)).flatten().abs())
    assert torch.equal(encode(x), torch_codes(x))
    assert torch.equal(encode(-x), torch_codes(-x))
    assert torch.equal(encode(middle) & 1, torch.zeros(126, dtype=torch.uint8))  # ties to even


def test_encode_of_what_no_number_holds(isa: str) -> None:
    x = torch.tensor([torch.nan, -torch.nan, torch.inf, -torch.inf, 0.0, -0.0])
    assert encode(x).tolist() == [0x7F, 0xFF, 0x7E, 0xFE, 0, 0x80]


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_codes_decode_exactly(isa: str, dtype: torch.dtype) -> None:
    codes = torch.arange(256, dtype=torch.uint8)[None]
    for scale in (1.0, 0.37, 2.0**-126, 1e-42, 2.0**118, 2.0**119, 2.0**120, 0.0, torch.inf):
        scale_N = torch.tensor([scale])
        wanted = reference.fp8_unpack(codes, scale_N, dtype)
        got = ops.fp8_unpack(ops.Fp8Rows(codes, scale_N[None], None), dtype=dtype)
        assert torch.equal(bits(got), bits(wanted)), scale
        finite = codes[:, (codes[0] & 0x7F) != 0x7F]  # without a NaN the fast path runs
        got = ops.fp8_unpack(ops.Fp8Rows(finite, scale_N[None], None), dtype=dtype)
        wanted = reference.fp8_unpack(finite, scale_N, dtype)
        assert torch.equal(bits(got), bits(wanted)), scale


def test_bf16_rounding_of_values_is_torchs(isa: str) -> None:
    """Products of a 4-bit and a 24-bit significand, many of them ties for bf16 and f16."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 256, (4096, 64), dtype=torch.uint8, generator=generator)
    codes[(codes & 0x7F) == 0x7F] = 0
    scale = from_bits(torch.randint(0x30000000, 0x48000000, (4096,), generator=generator) & ~0x3FFF)
    for dtype in DTYPES:
        got = ops.fp8_unpack(ops.Fp8Rows(codes, scale[:, None], None), dtype=dtype)
        assert torch.equal(bits(got), bits(reference.fp8_unpack(codes, scale, dtype)))


# ---- rows ---------------------------------------------------------------------------------------


# 0 and 1; below, at and around blocks of 16, 32 and 64; a prime; a real width.
@pytest.mark.parametrize("width", [0, 1, 15, 31, 63, 64, 65, 97, 130, 1024, 4099])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_are_the_definition_bit_for_bit(isa: str, dtype: torch.dtype, width: int) -> None:
    x = random_feature(11, width, dtype)
    rows = ops.fp8_pack(x)
    payload, scale = reference.fp8_pack(x)
    assert torch.equal(rows.payload, payload)
    assert torch.equal(rows.scale[:, 0], scale)
    if width <= 130:
        assert rows.crc == reference.fp8_crc(payload, scale)
    assert rows.crc == table_crc(payload, scale)
    for out in DTYPES:
        got = ops.fp8_unpack(rows, dtype=out)
        assert torch.equal(bits(got), bits(reference.fp8_unpack(payload, scale, out)))


def table_crc(payload: Tensor, scale: Tensor) -> int:
    return _C.crc32c_by("table", scale, _C.crc32c_by("table", payload))


def test_codes_of_every_pattern_below_448(isa: str) -> None:
    """A row whose amax is 448 has scale 1: the path of real rows, over a stride of all patterns."""
    patterns = torch.arange(0, 0x43E00001, 1021)
    width = 1 << 16
    x = from_bits(patterns[: len(patterns) // (width - 1) * (width - 1)]).view(-1, width - 1)
    x = torch.cat([torch.full((len(x), 1), 448.0), x], dim=1)
    rows = ops.fp8_pack(x)
    assert (rows.scale == 1).all()
    assert torch.equal(rows.payload, torch_codes(x))


@pytest.mark.parametrize("exponent", [-149, -140, -127, -126, -119, -118, -117, 0, 100, 127])
def test_scales_at_the_ends_of_f32(isa: str, exponent: int) -> None:
    x = torch.randn(5, 200, generator=torch.Generator().manual_seed(1))
    x = (x / x.abs().amax(dim=1, keepdim=True)).double().mul(2.0**exponent * 1.99).float()
    rows = ops.fp8_pack(x)
    payload, scale = reference.fp8_pack(x)
    assert torch.equal(rows.payload, payload) and torch.equal(rows.scale[:, 0], scale)
    assert ((payload & 0x7F) != 0x7F).all()
    assert ops.fp8_unpack(rows, dtype=torch.float32).isfinite().all()


def test_the_largest_float_and_rows_of_zeros(isa: str) -> None:
    x = torch.zeros(3, 70)
    x[1, 69] = -torch.finfo(torch.float32).max
    x[2] = -0.0
    rows = ops.fp8_pack(x)
    assert rows.scale[0] == 1 and rows.scale[2] == 1
    back = ops.fp8_unpack(rows, dtype=torch.float32)
    assert back[1, 69] == x[1, 69]
    assert torch.equal(bits(back[0]), bits(x[0])) and torch.equal(bits(back[2]), bits(x[2]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_relative_error_of_a_round_trip(dtype: torch.dtype) -> None:
    """Normal codes: half a unit of 3 mantissa bits. Below them: half of 2^-9 scales."""
    x = random_feature(64, 512, dtype)
    back = ops.fp8_unpack(ops.fp8_pack(x), dtype=torch.float32)
    amax = x.float().abs().amax(dim=1, keepdim=True)
    allowed = torch.maximum(x.float().abs() * 2.0**-4, amax / 448 * 2.0**-10) * 1.00001
    assert ((back - x.float()).abs() <= allowed).all()


def test_a_layer_is_a_row_of_its_own() -> None:
    x = random_feature(6, 3 * 40, torch.bfloat16)
    rows = ops.fp8_pack(x, layers=3)
    assert rows.scale.shape == (6, 3)
    for layer in range(3):
        alone = ops.fp8_pack(x[:, 40 * layer : 40 * (layer + 1)].contiguous())
        assert torch.equal(alone.payload, rows.payload[:, 40 * layer : 40 * (layer + 1)])
        assert torch.equal(alone.scale[:, 0], rows.scale[:, layer])


def test_what_is_sent_twice_is_the_same() -> None:
    """Decoded values are on the grid of their row, so packing them again changes nothing."""
    x = random_feature(32, 257, torch.float32)
    first = ops.fp8_pack(x)
    second = ops.fp8_pack(ops.fp8_unpack(first, dtype=torch.float32))
    assert torch.equal(first.payload, second.payload)


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_the_result_does_not_depend_on_threads(threads: int) -> None:
    x = random_feature(1031, 1024, torch.bfloat16)  # a prime: unequal parts
    payload, scale = reference.fp8_pack(x)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        rows = ops.fp8_pack(x)
        back = ops.fp8_unpack(rows)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(rows.payload, payload) and torch.equal(rows.scale[:, 0], scale)
    assert rows.crc == table_crc(payload, scale)
    assert torch.equal(back, reference.fp8_unpack(payload, scale, torch.bfloat16))


# 48 MiB of codes, and of values: rows whose ends lie on cache lines, and rows whose ends do not.
@pytest.mark.parametrize("width", [4096, 4093])
def test_large_rows_go_past_the_caches(width: int) -> None:
    x = torch.randn(1, width, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    x = x.expand((49 << 20) // width, width).contiguous()
    rows = ops.fp8_pack(x)
    payload, scale = reference.fp8_pack(x[:1])
    assert (rows.payload == payload).all() and (rows.scale == scale).all()
    assert rows.crc == table_crc(rows.payload, rows.scale)
    assert (ops.fp8_unpack(rows) == reference.fp8_unpack(payload, scale, x.dtype)).all()


def test_into_memory_that_is_given() -> None:
    x = random_feature(5, 64, torch.float16)
    payload, scale = torch.zeros(5, 64, dtype=torch.uint8), torch.zeros(5, 2)
    rows = ops.fp8_pack(x, layers=2, out=(payload, scale))
    assert rows.payload is payload and rows.scale is scale
    out = torch.zeros(5, 64)
    assert ops.fp8_unpack(rows, out=out) is out
    assert torch.equal(out.to(torch.float16), ops.fp8_unpack(rows, dtype=torch.float16))


def test_no_rows() -> None:
    rows = ops.fp8_pack(torch.zeros(0, 64), layers=2)
    assert rows.crc == 0
    assert ops.fp8_unpack(rows).shape == (0, 64)


def test_ops_have_fakes() -> None:
    x = random_feature(4, 64, torch.bfloat16)
    payload, scale = torch.empty(4, 64, dtype=torch.uint8), torch.empty(4)
    torch.library.opcheck(torch.ops.specforge_ext.fp8_pack_, (x, payload, scale, True))
    y = torch.empty(4, 64)
    codes = torch.zeros(4, 64, dtype=torch.uint8)
    torch.library.opcheck(torch.ops.specforge_ext.fp8_unpack_, (codes, torch.ones(4), y, True))


def test_inside_a_compiled_function() -> None:
    x = random_feature(8, 64, torch.bfloat16)

    def there_and_back(x: Tensor) -> Tensor:
        return ops.fp8_unpack(ops.fp8_pack(x * 2), dtype=torch.float32) + 1

    compiled = torch.compile(there_and_back, backend="aot_eager")
    assert torch.equal(compiled(x), there_and_back(x))


# ---- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_value_that_is_not_finite_names_its_row(isa: str, dtype: torch.dtype, bad: float) -> None:
    for column in (0, 63, 64, 129):
        x = torch.ones(7, 2 * 130, dtype=dtype)
        x[3, 130 + column] = x[5, column] = bad
        message = r"must be finite, got NaN or infinity in 2 of 14 rows, first in token 3, layer 1"
        with pytest.raises(ValueError, match=message):
            ops.fp8_pack(x, layers=2)
        payload, scale = torch.empty(7, 260, dtype=torch.uint8), torch.empty(7, 2)
        with pytest.raises(ValueError, match="must be finite"):
            ops.fp8_pack(x, layers=2, out=(payload, scale))
        wanted, wanted_scale = reference.fp8_pack(x.view(14, 130))
        assert torch.equal(payload.view(14, 130), wanted)
        assert torch.equal(bits(scale.flatten()), bits(wanted_scale))


def test_every_flipped_bit_is_refused(isa: str) -> None:
    rows = ops.fp8_pack(random_feature(3, 70, torch.bfloat16))
    for part in (rows.payload, rows.scale):
        memory = part.view(torch.uint8).view(-1)
        for bit in range(8 * memory.numel()):
            memory[bit // 8] ^= 1 << bit % 8
            with pytest.raises(ops.CorruptRows, match=r"wanted crc32c \w{8}, got \w{8}"):
                ops.fp8_unpack(rows)
            memory[bit // 8] ^= 1 << bit % 8
    ops.fp8_unpack(rows)


def test_without_a_checksum_nothing_is_compared() -> None:
    rows = ops.fp8_pack(random_feature(3, 70, torch.bfloat16), checksum=False)
    assert rows.crc is None
    rows.payload[0, 0] ^= 1
    ops.fp8_unpack(rows)


def test_errors_name_what_does_not_fit() -> None:
    x = torch.ones(4, 6)
    with pytest.raises(ValueError, match=r"\[tokens, layers \* width\], got \[4, 6\] and 4 layers"):
        ops.fp8_pack(x, layers=4)
    with pytest.raises(ValueError, match=r"got \[4, 6\] and 0 layers"):
        ops.fp8_pack(x, layers=0)
    with pytest.raises(ValueError, match=r"feature must be .* float32 or bfloat16 or float16"):
        ops.fp8_pack(x.double())
    with pytest.raises(ValueError, match=r"payload must be \[4, 6\] uint8, got \[4, 5\] uint8"):
        ops.fp8_pack(x, out=(torch.zeros(4, 5, dtype=torch.uint8), torch.zeros(4, 1)))
    rows = ops.fp8_pack(x)
    with pytest.raises(ValueError, match=r"scale must be \[4, 1\] float32, got \[4, 1\] float64"):
        ops.fp8_unpack(ops.Fp8Rows(rows.payload, rows.scale.double(), None))
    with pytest.raises(ValueError, match="and 0 layers"):
        ops.fp8_unpack(ops.Fp8Rows(rows.payload, rows.scale[:, 0], None))
    with pytest.raises(ValueError, match=r"feature must be contiguous, got \[4, 6\] with strides"):
        ops.fp8_pack(torch.ones(6, 4).T, layers=2)
    with pytest.raises(ValueError, match="payload must be contiguous"):
        ops.fp8_unpack(ops.Fp8Rows(torch.zeros(6, 4, dtype=torch.uint8).T, rows.scale, None))
    with pytest.raises(ValueError, match="fp8_pack: width must be below 2"):
        ops.fp8_pack(torch.empty(0, 1 << 24))
    with pytest.raises(ValueError, match="fp8_encode: q must be"):
        _C.fp8_encode(torch.ones(3), torch.zeros(4, dtype=torch.uint8))
