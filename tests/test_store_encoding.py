"""The encoding fp8_e4m3_row: what is put comes back rounded, in every store, or is refused."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from encoding_cases import LAYOUT, codes_and_scales, make_feature_sample, outliers, rounded
from specforge_ext import ops
from specforge_ext.config import parse
from specforge_ext.loader.stream import pack
from specforge_ext.records import EncodedFeature, FeatureLayout, FeatureSpec, Sample
from specforge_ext.store import STORES, mooncake, payload
from specforge_ext.store.base import CorruptFeature, UnknownEncoding
from specforge_ext.store.mooncake_master import Master
from specforge_ext.store.ref import (
    check_ref,
    ref_from_bytes,
    ref_from_json,
    ref_to_bytes,
    ref_to_json,
)
from store_cases import TIMEOUT_S, make_prompt, same_bytes
from store_kinds import KINDS, ON_GPU, VARIANTS, Opened, flip, settings_of

FP8 = "fp8_e4m3_row"
SMALL = 1 << 19


@pytest.fixture(scope="module")
def master() -> Iterator[str | None]:
    if mooncake.unavailable() is not None:
        yield None
        return
    master = Master()
    yield master.address
    master.close()


@pytest.fixture(scope="module")
def kept(master: str | None) -> Iterator[dict[object, list[Any]]]:
    kept: dict[object, list[Any]] = {}
    yield kept
    for group in reversed(kept.values()):
        for it in group:
            it.close()


@pytest.fixture(params=VARIANTS)
def opened(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    master: str | None,
    kept: dict[object, list[Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Opened]:
    settings = settings_of(request.param, monkeypatch)
    kind = request.param.removesuffix(ON_GPU)
    if kind == "shared_dir":
        settings["directory"] = tmp_path / "store"
    if kind == "mooncake_store":
        settings["master"] = master
    opened = Opened(kind, settings, kept)
    yield opened
    opened.close()


def put(writer: Any, sample: Sample, **more: Any) -> Any:
    arguments = {"layout_hash": LAYOUT.hash, "timeout_s": TIMEOUT_S, "layers": LAYOUT.layers}
    ref = writer.put(sample, **{**arguments, **more})
    assert ref_from_json(ref_to_json(ref)) == ref_from_bytes(ref_to_bytes(ref)) == ref
    return ref


# No token, one, an odd number; a page of scales.
@pytest.mark.parametrize("num_tokens", [0, 1, 7, 401])
@pytest.mark.parametrize("encoding", ["none", FP8])
def test_round_trip(opened: Opened, encoding: str, num_tokens: int) -> None:
    writer = opened.writer(SMALL, encoding=encoding)
    reader = opened.reader(writer)
    sample = make_feature_sample(3, num_tokens)
    ref = put(writer, sample)
    assert {t.encoding for t in ref.tensors[2:]} == {encoding}
    assert [t.dtype for t in ref.tensors[2:]] == [spec.dtype for spec in LAYOUT.features]
    wanted = sample.features if encoding == "none" else rounded(sample)
    with reader.open(ref, layout_hash=LAYOUT.hash, verify=True) as lease:
        assert all(
            isinstance(f, EncodedFeature) == (encoding == FP8)
            for f in lease.sample.features.values()
        )
        came = payload.decoded(lease.sample)
        assert torch.equal(came.prompt.input_ids, sample.prompt.input_ids)
        assert torch.equal(came.prompt.loss_mask, sample.prompt.loss_mask)
        assert came.features.keys() == wanted.keys()
        assert all(same_bytes(came.features[name], wanted[name]) for name in wanted)
        del came  # some of its tensors are views
    reader.ack(ref)
    assert (writer.health().num_samples, writer.health().used_bytes) == (0, 0)


def test_nothing_is_copied_twice(opened: Opened) -> None:
    """Codes and scales are views of the store's memory, where vectors may be loaded from."""
    writer = opened.writer(SMALL, encoding=FP8)
    reader = opened.reader(writer)
    ref = put(writer, make_feature_sample(1))
    with reader.open(ref, layout_hash=LAYOUT.hash, verify=True) as lease:
        views = codes_and_scales(lease.sample)
        first = ref.tensors[2]  # a prompt may be a copy
        start = views[first.name][0].data_ptr() - first.offset
        for tensor in ref.tensors[2:]:
            codes, scales = views[tensor.name]
            assert codes.data_ptr() - start == tensor.offset
            assert scales.data_ptr() - start == tensor.scales_offset
            assert tensor.offset % 64 == tensor.scales_offset % 64 == 0


def test_packed_as_put(opened: Opened) -> None:
    """Samples of either encoding, and some that never saw a store, in one batch."""
    plain, fp8 = opened.writer(SMALL), opened.writer(SMALL, encoding=FP8)
    samples = [make_feature_sample(i, n) for i, n in enumerate((5, 1, 0, 12))]
    leases = [
        opened.reader(writer).open(put(writer, s), layout_hash=LAYOUT.hash, verify=True)
        for writer, s in zip((fp8, plain, fp8), samples[:3], strict=True)
    ]
    batch = pack([*(lease.sample for lease in leases), samples[3]], LAYOUT)
    for name in LAYOUT.layers:
        wanted = torch.cat(
            [
                rounded(samples[0])[name],
                samples[1].features[name],
                rounded(samples[2])[name],
                samples[3].features[name],
            ]
        )
        assert same_bytes(batch.features[name], wanted)
    assert batch.lengths == (5, 1, 0, 12)


def test_about_half_the_bytes(opened: Opened) -> None:
    layout = FeatureLayout((FeatureSpec("h", (1, 2, 3, 4), 4 * 256, "bfloat16"),))
    sample = Sample(make_prompt(1, 100), {"h": outliers(100, 1024, 1).bfloat16()})
    sizes = {}
    for encoding in ("none", FP8):
        writer = opened.writer(SMALL, encoding=encoding)
        sizes[encoding] = put(writer, sample, layers=layout.layers).nbytes
        features = sizes[encoding] - 100 * (4 + 1)
        assert 0 <= features - 100 * layout.stored_bytes_per_token(encoding) < 4 * 64
    assert 0.5 < sizes[FP8] / sizes["none"] < 0.51


def test_every_corrupt_byte_is_seen(opened: Opened) -> None:
    """One bit of each byte of codes and scales in turn."""
    writer = opened.writer(SMALL, encoding=FP8)
    reader = opened.reader(writer)
    layout = FeatureLayout((FeatureSpec("h", (1, 2), 6, "float32"),))
    sample = Sample(make_prompt(1, 3), {"h": outliers(3, 6, 1)})
    ref = put(writer, sample, layers=layout.layers)
    [tensor] = ref.tensors[2:]
    places = [
        *range(tensor.offset, tensor.offset + tensor.nbytes),
        *range(tensor.scales_offset, tensor.end),
    ]
    assert len(places) == 3 * 6 + 3 * 2 * 4
    for at in places:
        flip(writer, ref, at)
        with pytest.raises(CorruptFeature, match="h: wanted crc32c"):
            reader.open(ref, layout_hash=LAYOUT.hash, verify=True)
        flip(writer, ref, at)
    reader.open(ref, layout_hash=LAYOUT.hash, verify=True).release()


def test_without_checksums(opened: Opened) -> None:
    writer = opened.writer(SMALL, encoding=FP8, checksum=False)
    reader = opened.reader(writer)
    sample = make_feature_sample(1)
    ref = put(writer, sample)
    assert all(tensor.checksum is None for tensor in ref.tensors)
    with reader.open(ref, layout_hash=LAYOUT.hash, verify=False) as lease:
        came = payload.decoded(lease.sample).features
        assert all(same_bytes(came[name], x) for name, x in rounded(sample).items())
    with pytest.raises(CorruptFeature, match="input_ids: wanted a checksum to verify"):
        reader.open(ref, layout_hash=LAYOUT.hash, verify=True)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite(opened: Opened, value: float) -> None:
    """Refused by name, and the room is free again; without an encoding they travel."""
    sample = make_feature_sample(1)
    sample.features["aux"][4, 55] = value
    writer = opened.writer(SMALL, encoding=FP8)
    with pytest.raises(
        ValueError, match=r"\['aux'\]: fp8_pack: x must be finite, .* in token 4, layer 1"
    ):
        put(writer, sample)
    assert (writer.health().num_samples, writer.health().used_bytes) == (0, 0)
    plain = opened.writer(SMALL)
    with opened.reader(plain).open(
        put(plain, sample), layout_hash=LAYOUT.hash, verify=True
    ) as lease:
        assert same_bytes(lease.sample.features["aux"], sample.features["aux"])


@pytest.mark.parametrize(
    ("features", "layers", "message"),
    [
        (
            {"h": torch.zeros(7, 4, dtype=torch.int64)},
            {"h": 1},
            r"\['h'\]: wanted \[tokens, width\], one of float32, bfloat16, float16, for encoding "
            r"fp8_e4m3_row, got \[7, 4\] int64",
        ),
        ({"h": torch.zeros(7)}, {"h": 1}, r"\['h'\]: wanted \[tokens, width\], .* got \[7\] float"),
        ({"h": torch.zeros(7, 4)}, None, r"layers\['h'\]: wanted the number .* those of \[\]"),
        ({"h": torch.zeros(7, 4)}, {"g": 1}, r"layers\['h'\]: .* got those of \['g'\]"),
        (
            {"h": torch.zeros(7, 4)},
            {"h": 3},
            r"num_scales: wanted a divisor of .* 4, got 3",
        ),
        ({"h": torch.zeros(7, 4)}, {"h": 0}, r"num_scales: wanted an integer in 1..4, got 0"),
        (
            {"h": torch.zeros(7, 0)},
            {"h": 1},
            r"num_scales: wanted a divisor of .* 0, got 1",
        ),
    ],
)
def test_features_that_cannot_be_encoded(
    opened: Opened, features: dict[str, torch.Tensor], layers: dict[str, int], message: str
) -> None:
    writer = opened.writer(SMALL, encoding=FP8)
    with pytest.raises(ValueError, match=message):
        put(writer, Sample(make_prompt(1, 7), features), layers=layers)
    assert writer.health().num_samples == 0


@pytest.mark.parametrize("kind", KINDS)
def test_config(kind: str) -> None:
    model = STORES.get(kind).Config
    assert model().encoding == "none"
    assert parse(model, {"encoding": FP8}, where="store").encoding == FP8
    with pytest.raises(ValueError, match=r"store.encoding: .*'none' or 'fp8_e4m3_row', got 'int4'"):
        parse(model, {"encoding": "int4"}, where="store")


def test_rows_written_in_place_cannot_be_encoded() -> None:
    store = STORES.get("shm")
    writer = store.writer(store.Config(capacity_bytes=SMALL, encoding=FP8))
    with pytest.raises(
        ValueError, match=r"store.encoding: wanted none for features .* in place, got fp8_e4m3_row"
    ):
        writer.reserve(make_prompt(1, 7), LAYOUT, timeout_s=TIMEOUT_S)
    assert writer.health().num_samples == 0


def test_a_ref_of_an_encoding_to_come() -> None:
    store = STORES.get("shm")
    writer = store.writer(store.Config(capacity_bytes=SMALL, encoding=FP8))
    ref = put(writer, make_feature_sample(1))
    newer = replace(ref.tensors[2], encoding="int4_row")
    with pytest.raises(
        UnknownEncoding, match=r"ref.tensors\[2\].encoding: wanted one of none, fp8_.*'int4_row'"
    ) as caught:
        store.reader(writer.address()).open(
            replace(ref, tensors=(*ref.tensors[:2], newer, *ref.tensors[3:])),
            layout_hash=LAYOUT.hash,
            verify=False,
        )
    assert caught.value.encoding == "int4_row"
    back = pickle.loads(pickle.dumps(caught.value))
    assert (type(back), str(back), back.where) == (
        UnknownEncoding,
        str(caught.value),
        caught.value.where,
    )


def change(ref: Any, **changes: Any) -> Any:
    return replace(ref, tensors=(*ref.tensors[:2], replace(ref.tensors[2], **changes)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoding": "none"}, r"\[2\].nbytes: wanted 240, the product .* got 120"),
        (
            {"encoding": "none", "nbytes": 240},
            r"\[2\].num_scales: wanted .* 0..0, got 3",
        ),
        (
            {"encoding": "none", "nbytes": 240, "num_scales": 0},
            r"\[2\].scales_offset: wanted an integer in 0..0, got 256",
        ),
        ({"encoding": "FP8"}, r"\[2\].encoding: wanted 1 to 32 small letters, .* got 'FP8'"),
        ({"encoding": ["x"]}, r"\[2\].encoding: wanted 1 to 32 small letters"),
        ({"nbytes": 240}, r"\[2\].nbytes: wanted 120, the product"),
        ({"dtype": "int32"}, r"\[2\].dtype: wanted one of float32, bfloat16, float16 with enc"),
        ({"dtype": "uint8"}, r"\[2\].dtype: wanted one of float32, bfloat16, float16 with enc"),
        ({"num_scales": 0}, r"\[2\].num_scales: wanted an integer in 1..24, got 0"),
        ({"num_scales": 25}, r"\[2\].num_scales: wanted an integer in 1..24, got 25"),
        ({"num_scales": 5}, r"\[2\].num_scales: wanted a divisor of the width, 24, got 5"),
        ({"num_scales": True}, r"\[2\].num_scales: wanted an integer in 1..24, got True"),
        ({"num_scales": 24}, r"ref h.scales: wanted an end within nbytes, 316, got 736"),
        ({"scales_offset": 260}, r"\[2\].scales_offset: wanted a multiple of 64, got 260"),
        ({"scales_offset": -64}, r"\[2\].scales_offset: wanted an integer in"),
        ({"scales_offset": 1 << 63}, r"\[2\].scales_offset: wanted an integer in"),
        ({"scales_offset": (1 << 63) - 64}, r"ref h.scales: wanted an end within nbytes, 316, got"),
        ({"scales_offset": 192}, r"ref h.scales.offset: wanted no overlap, at least 248, got 192"),
        ({"scales_offset": 64}, r"ref \S+.offset: wanted no overlap"),
    ],
)
def test_scales_of_a_ref_are_refused_by_name(changes: dict[str, Any], message: str) -> None:
    sample = Sample(make_prompt(1, 5), {"h": torch.ones(5, 24, dtype=torch.bfloat16)})
    arguments: dict[str, Any] = {"store": "shm:1", "layout_hash": "x", "encoding": FP8}
    ref, _ = payload.plan_sample(sample, **arguments, layers={"h": 3})
    assert (ref.tensors[2].offset, ref.tensors[2].scales_offset, ref.nbytes) == (128, 256, 316)
    check_ref(ref)
    with pytest.raises(ValueError, match=message):
        check_ref(change(ref, **changes))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_signal_to_noise_with_outlier_channels(dtype: torch.dtype) -> None:
    """Of the 99 % of channels that are not a hundred times larger: transport.md says 31.5 dB."""
    x = outliers(512, 4096, 0).to(dtype)
    y = ops.fp8_unpack(ops.fp8_pack(x), dtype=dtype)
    ordinary = torch.arange(4096) % 100 != 0
    signal, noise = (v[:, ordinary].double().square().sum() for v in (x, x.double() - y.double()))
    assert float(10 * torch.log10(signal / noise)) == pytest.approx(31.5, abs=0.1)
