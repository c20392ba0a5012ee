"""Packing, the row maps of training-time test, and the checksum."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch
from torch import Tensor

from specforge_ext import _C, ops
from specforge_ext.ops import TttMaps, reference
from specforge_ext.records import lengths_to_cu_seqlens


def random_batch(seed: int, num_samples: int, density: float) -> tuple[Tensor, Tensor]:
    """Mask and cu_seqlens of samples of 0 to 12 tokens; the last position of each is not scored."""
    rng = random.Random(seed)
    lengths = [rng.randrange(13) for _ in range(num_samples)]
    mask = [
        int(rng.random() < density and t < length - 1) for length in lengths for t in range(length)
    ]
    return torch.tensor(mask, dtype=torch.uint8), lengths_to_cu_seqlens(lengths)


def assert_same(got: TttMaps, want: TttMaps) -> None:
    for field in dataclasses.fields(TttMaps):
        a, b = getattr(got, field.name), getattr(want, field.name)
        pairs = zip(a, b, strict=True) if isinstance(a, tuple) else [(a, b)]
        for x, y in pairs:
            assert x.dtype == torch.int32
            assert torch.equal(x, y), field.name


@pytest.mark.parametrize("ttt_length", [1, 2, 7, 64])
@pytest.mark.parametrize("density", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("num_samples", [0, 1, 9])
def test_ttt_maps_follow_the_definition(num_samples: int, density: float, ttt_length: int) -> None:
    mask, cu_seqlens = random_batch(num_samples + int(10 * density), num_samples, density)
    assert_same(
        ops.ttt_maps(mask, cu_seqlens, ttt_length),
        reference.ttt_maps(mask, cu_seqlens, ttt_length),
    )


def test_ttt_maps_by_hand() -> None:
    """One sample, m = 0 1 1 0 0, L = 3; then one that has nothing to score."""
    maps = ops.ttt_maps(
        torch.tensor([0, 1, 1, 0, 0, 0, 0], dtype=torch.uint8),
        torch.tensor([0, 5, 7], dtype=torch.int32),
        3,
    )
    assert [rows.tolist() for rows in maps.active] == [[0, 1, 2], [0, 1], [0]]
    assert [rows.tolist() for rows in maps.parent[1:]] == [[0, 1], [0]]
    assert maps.teacher_rows.tolist() == [1, 2]
    # (u, i): (1, 0) row 1; (1, 1) row 0; (2, 0) row 2; (2, 1) row 1; (2, 2) row 0.
    assert maps.pair_source.tolist() == [1, 3, 2, 4, 5]
    assert maps.pair_step.tolist() == [0, 1, 0, 1, 2]
    assert maps.pair_teacher.tolist() == [0, 0, 1, 1, 1]
    assert maps.num_active == (3, 2, 1)


def test_ttt_maps_of_a_packed_batch_are_those_of_its_samples() -> None:
    mask, cu_seqlens = random_batch(3, 6, 0.5)
    packed = ops.ttt_maps(mask, cu_seqlens, 4)
    for step in range(4):
        alone = []
        for a, b in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
            bounds = torch.tensor([0, b - a], dtype=torch.int32)
            alone.append(ops.ttt_maps(mask[a:b], bounds, 4).active[step] + a)
        assert torch.equal(packed.active[step], torch.cat(alone))


def test_ttt_maps_invariants() -> None:
    mask, cu_seqlens = random_batch(5, 20, 0.4)
    maps = ops.ttt_maps(mask, cu_seqlens, 7)
    rows = torch.cat(maps.active)[maps.pair_source.long()]
    scored = maps.teacher_rows[maps.pair_teacher.long()]
    assert torch.equal(rows + maps.pair_step, scored)
    assert mask[scored.long()].all()
    assert torch.equal(maps.pair_teacher, maps.pair_teacher.sort().values)
    for step in range(1, 7):
        assert torch.equal(maps.active[step - 1][maps.parent[step].long()].int(), maps.active[step])


def test_ttt_maps_take_a_bool_mask() -> None:
    mask, cu_seqlens = random_batch(1, 4, 0.5)
    assert_same(ops.ttt_maps(mask.bool(), cu_seqlens, 3), ops.ttt_maps(mask, cu_seqlens, 3))


def test_ttt_maps_name_the_sample_whose_last_position_is_scored() -> None:
    mask = torch.tensor([0, 0, 1, 1], dtype=torch.uint8)
    cu_seqlens = torch.tensor([0, 2, 2, 4], dtype=torch.int32)
    for compute in (ops.ttt_maps, reference.ttt_maps):
        with pytest.raises(ValueError, match=r"last position of every sample, got 1 .* sample 2"):
            compute(mask, cu_seqlens, 3)


@pytest.mark.parametrize(
    ("cu_seqlens", "length", "match"),
    [
        ([0, 3], 2, r"cu_seqlens must end at T, got 3"),
        ([1, 4], 2, r"cu_seqlens must start at 0, got 1"),
        ([0, 5, 3, 4], 2, r"cu_seqlens must not fall, got 3"),
        ([], 2, r"cu_seqlens must hold N\+1 entries, at least 1, got 0"),
        ([0, 4], 0, r"ttt_length must be in \[1, 64\], got 0"),
        ([0, 4], 65, r"ttt_length must be in \[1, 64\], got 65"),
    ],
)
def test_ttt_maps_name_what_does_not_fit(cu_seqlens: list[int], length: int, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        ops.ttt_maps(
            torch.zeros(4, dtype=torch.uint8), torch.tensor(cu_seqlens, dtype=torch.int32), length
        )


def test_ttt_fill_refuses_outputs_of_another_size() -> None:
    mask = torch.tensor([1, 0], dtype=torch.uint8)
    cu_seqlens = torch.tensor([0, 2], dtype=torch.int32)
    counts = torch.empty(4, dtype=torch.int64)
    _C.ttt_counts(mask, cu_seqlens, counts)
    one, none = torch.empty(1, dtype=torch.int32), torch.empty(0, dtype=torch.int32)
    sizes = [one, none, one, one, one, one]
    for k, name in enumerate(["active", "parent", "pair_source", None, None, "teacher_rows"]):
        if name is None:  # bound to pair_source's size by the shape check
            continue
        wrong = list(sizes)
        wrong[k] = torch.empty(2, dtype=torch.int32)
        if k == 2:
            wrong[3] = wrong[4] = wrong[2]
        with pytest.raises(ValueError, match=f"ttt_fill: {name} must have as many entries"):
            _C.ttt_fill(mask, cu_seqlens, counts, *wrong)


def random_samples(
    lengths: list[int], widths: list[int], dtypes: list[torch.dtype]
) -> tuple[list[Tensor], list[Tensor], list[list[Tensor]]]:
    generator = torch.Generator().manual_seed(0)
    ids, masks, features = [], [], []
    for length in lengths:
        ids.append(torch.randint(0, 1 << 30, (length,), generator=generator, dtype=torch.int32))
        masks.append(torch.randint(0, 2, (length,), generator=generator, dtype=torch.uint8))
        features.append(
            [
                torch.randn(length, width, generator=generator).to(dtype)
                for width, dtype in zip(widths, dtypes, strict=True)
            ]
        )
    return ids, masks, features


@pytest.mark.parametrize(
    ("lengths", "widths"),
    [
        ([5], [3, 1]),
        ([0, 4, 0, 1], [3, 2]),  # samples without tokens
        ([2, 3], []),  # no features
        ([7, 5], [0, 4]),  # a feature without width
        ([300, 1, 700], [512, 96]),  # large: more than one thread, more than one piece
    ],
)
def test_pack_samples_follow_the_definition(lengths: list[int], widths: list[int]) -> None:
    dtypes = [torch.float32, torch.bfloat16][: len(widths)]
    samples = random_samples(lengths, widths, dtypes)
    got, want = ops.pack_samples(*samples), reference.pack_samples(*samples)
    for a, b in zip((*got[:4], *got[4]), (*want[:4], *want[4]), strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def encoded_samples(lengths: list[int], width: int, groups: int) -> tuple[list[Tensor], ...]:
    """(codes [S, width], scales [S, groups]): every code, NaN too, scales of many magnitudes."""
    generator = torch.Generator().manual_seed(1)
    codes = [
        torch.randint(0, 256, (n, width), generator=generator, dtype=torch.int32).to(torch.uint8)
        for n in lengths
    ]
    scales = [
        torch.exp(torch.randn(n, groups, generator=generator, dtype=torch.float32) * 4)
        for n in lengths
    ]
    return codes, scales


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("lengths", "width", "groups"),
    [([5, 3], 96, 3), ([0, 4, 1], 10, 5), ([2], 0, 1), ([700, 1, 300], 512, 4)],
)
def test_pack_samples_decode_fp8(
    dtype: torch.dtype, lengths: list[int], width: int, groups: int
) -> None:
    """Sample 0 is plain, the others encoded; the second feature is plain everywhere."""
    ids, masks, features = random_samples(lengths, [width, 3], [dtype, torch.float32])
    codes, group_scales = encoded_samples(lengths, width, groups)
    scales: list[list[Tensor | None]] = [[scale, None] for scale in group_scales]
    scales[0][0] = None if len(lengths) > 1 else scales[0][0]
    for row, code, scale in zip(features, codes, scales, strict=True):
        row[0] = row[0] if scale[0] is None else code
    got = ops.pack_samples(ids, masks, features, scales=scales, dtype=dtype)
    want = reference.pack_samples(ids, masks, features, scales=scales, dtype=dtype)
    for a, b in zip((*got[:4], *got[4]), (*want[:4], *want[4]), strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    as_fp8 = [
        [row[0] if s[0] is None else row[0].view(torch.float8_e4m3fn), row[1]]
        for row, s in zip(features, scales, strict=True)
    ]
    again = ops.pack_samples(ids, masks, as_fp8, scales=scales, dtype=dtype)
    assert again[4][0].view(torch.uint8).equal(got[4][0].view(torch.uint8))


def test_pack_samples_name_the_scales_that_do_not_fit() -> None:
    ids, masks, _ = random_samples([2, 3], [], [])
    codes, scales = encoded_samples([2, 3], 6, 3)
    features = [[code] for code in codes]
    with pytest.raises(ValueError, match="groups of feature 0 of sample 1 must divide its width 6"):
        ops.pack_samples(ids, masks, features, scales=[[scales[0]], [torch.ones(3, 4)]])
    with pytest.raises(
        ValueError, match=r"scales of feature 0 of sample 0 must be \[S=2, groups\]"
    ):
        ops.pack_samples(ids, masks, features, scales=[[scales[1]], [scales[1]]])
    with pytest.raises(ValueError, match="feature 0 of sample 1 must be bf16, got"):
        ops.pack_samples(ids, masks, features, scales=[[scales[0]], [None]])
    with pytest.raises(
        ValueError,
        match=r"packed feature 0 must be f32, bf16 or, on the CPU, f16 to",
    ):
        ops.pack_samples(ids, masks, features, scales=[[s] for s in scales], dtype=torch.float64)
    with pytest.raises(ValueError, match="as many scales as features, or none, got 2"):
        ops.pack_samples(ids, masks, features, scales=[[scales[0], None], [scales[1]]])


def test_pack_samples_name_the_sample_that_does_not_fit() -> None:
    ids, masks, features = random_samples([2, 3], [4], [torch.float32])
    with pytest.raises(ValueError, match="at least one sample, got none"):
        ops.pack_samples([], [], [])
    with pytest.raises(ValueError, match="of as many samples, got 2, 1, 2 and 2"):
        ops.pack_samples(ids, masks[:1], features)
    with pytest.raises(ValueError, match=r"mask of sample 1 must be \[S=3\] u8, got \[2\] u8"):
        ops.pack_samples(ids, [masks[0], masks[0]], features)
    with pytest.raises(ValueError, match=r"ids of sample 0 must be i32, got \[2\] i64"):
        ops.pack_samples([ids[0].long(), ids[1]], masks, features)
    with pytest.raises(ValueError, match=r"feature 0 of sample 1 must be \[S=3, width=4\] f32"):
        ops.pack_samples(ids, masks, [features[0], [torch.ones(3, 5)]])
    with pytest.raises(ValueError, match="feature 0 of sample 1 must be contiguous"):
        ops.pack_samples(ids, masks, [features[0], [torch.ones(4, 3).T]])
    with pytest.raises(ValueError, match="as many features as the output, got 0"):
        ops.pack_samples(ids, masks, [features[0], []])


def test_crc32c_known_values() -> None:
    """RFC 3720, section B.4."""
    for checksum in (_C.crc32c, _C.crc32c_table):
        assert checksum(b"123456789") == 0xE3069283
        assert checksum(b"") == 0
        assert checksum(bytes(32)) == 0x8A9136AA
        assert checksum(b"\xff" * 32) == 0x62A8AB43
        assert checksum(bytes(range(32))) == 0x46DD794E


def test_crc32c_paths_agree_whole_and_in_parts() -> None:
    rng = random.Random(0)
    # Around a word, a lane of 1024 bytes and a group of three of them.
    for size in [0, 1, 7, 8, 9, 1023, 3071, 3072, 3073, 3080, 10_007, 50_001]:
        data = rng.randbytes(size)
        whole = _C.crc32c(data)
        assert whole == _C.crc32c_table(data)
        cut = rng.randrange(size + 1)
        assert whole == _C.crc32c(data[cut:], _C.crc32c(data[:cut]))
        source = torch.frombuffer(bytearray(data or b"\0"), dtype=torch.uint8)[:size]
        target = torch.zeros_like(source)
        assert _C.copy_crc32c(target, source) == whole
        assert torch.equal(target, source)


def test_crc32c_names_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="one-dimensional and contiguous, got 1 dimensions"):
        _C.crc32c(memoryview(b"12345678")[::2])
    with pytest.raises(ValueError, match="dst must be of as many bytes as src, got 4"):
        _C.copy_crc32c(torch.zeros(1), torch.zeros(2))
    with pytest.raises(ValueError, match="copy_crc32c: dst must be contiguous"):
        _C.copy_crc32c(torch.zeros(4, 2)[:, 0], torch.zeros(4))
