"""Samples as bytes, and bytes as samples again: what every store does the same way.

A sample's extent holds its tensors raw, or their codes and scales, each at a multiple of 64 bytes;
the rest is in its SampleRef. S is the number of tokens of a sample.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import TracebackType
from typing import Protocol, Self

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from specforge_ext import _C, ops
from specforge_ext.copies import copied
from specforge_ext.records import (
    DTYPE_NAMES,
    DTYPES,
    FP8_DTYPES,
    EncodedFeature,
    Encoding,
    Prompt,
    Sample,
    SampleRef,
    StoredSample,
    TensorRef,
)
from specforge_ext.store.base import CorruptFeature, LayoutMismatch, StaleRef, StoreError
from specforge_ext.store.ref import check_ref, plan_tensors

PROMPT_NAMES = ("input_ids", "loss_mask")


class Extent(Protocol):
    """A sample's bytes, kept where they are for as long as a view of them lives.

    It is a buffer too, which no type of Python 3.11 says.
    """

    @property
    def nbytes(self) -> int: ...

    def crc32c(self, offset: int, nbytes: int) -> int: ...


class TensorExtent:
    """A sample's bytes as a tensor, on whatever device. whole: [nbytes] uint8."""

    def __init__(self, whole: Tensor) -> None:
        self.whole = whole

    @property
    def nbytes(self) -> int:
        return self.whole.numel()

    def crc32c(self, offset: int, nbytes: int) -> int:
        """Computed where the bytes lie, on the current stream; of a copy on the host in a build
        without CUDA kernels."""
        part = self.whole[offset : offset + nbytes]
        return ops.crc32c(part if _C.cuda_compiled else part.cpu())


class SampleLease:
    """Ends when `release` was called (or the lease dropped) and no view of it lives any more."""

    def __init__(self, sample: StoredSample) -> None:
        """sample: of views that keep what they show."""
        self._sample_id = sample.prompt.sample_id
        self._sample: StoredSample | None = sample

    @property
    def sample(self) -> StoredSample:
        if self._sample is None:
            raise StoreError(f"lease of sample {self._sample_id!r}: wanted before its release")
        return self._sample

    def release(self) -> None:
        """May be called more than once."""
        self._sample = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.release()


def tensors_of(sample: Sample, *, on_gpu: bool = False) -> dict[str, Tensor]:
    """All tensors of a sample by name. ValueError for those that cannot travel.

    on_gpu: features may be on a GPU; a prompt is always on the CPU.
    """
    prompt = {"input_ids": sample.prompt.input_ids, "loss_mask": sample.prompt.loss_mask}
    if clash := prompt.keys() & sample.features.keys():
        raise ValueError(f"Sample.features: wanted no name of the prompt's, got {sorted(clash)}")
    for name, tensor in sample.features.items():
        on_cpu = tensor.device.type == "cpu"
        if not (on_cpu or (on_gpu and tensor.is_cuda)) or tensor.dtype not in DTYPE_NAMES:
            raise ValueError(
                f"Sample.features[{name!r}]: wanted one of {sorted(DTYPES)} on the CPU"
                f"{' or a GPU' if on_gpu else ''}, got {tensor.dtype} on {tensor.device}"
            )
    return {**prompt, **sample.features}


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """(dtype, shape) of the features among a sample's tensors."""
    return {
        name: (DTYPE_NAMES[tensor.dtype], tuple(tensor.shape))
        for name, tensor in tensors.items()
        if name not in PROMPT_NAMES
    }


def plan_sample(
    sample: Sample,
    *,
    store: str,
    layout_hash: str,
    encoding: Encoding,
    layers: Mapping[str, int] | None,
    on_gpu: bool = False,
) -> tuple[SampleRef, dict[str, Tensor]]:
    """As `plan`, and the sample's tensors by name. ValueError for what cannot travel."""
    tensors = tensors_of(sample, on_gpu=on_gpu)
    features = shapes_of(tensors)
    num_scales = _num_scales(features, encoding, layers or {}) if encoding != "none" else {}
    return plan(sample.prompt, features, store, layout_hash, num_scales=num_scales), tensors


def _num_scales(
    features: Mapping[str, tuple[str, tuple[int, ...]]], encoding: str, layers: Mapping[str, int]
) -> dict[str, int]:
    """Of each token, by name: one a layer."""
    for name, (dtype, shape) in features.items():
        if dtype not in FP8_DTYPES or len(shape) != 2:
            raise ValueError(
                f"Sample.features[{name!r}]: wanted [tokens, width], one of "
                f"{', '.join(FP8_DTYPES)}, for encoding {encoding}, got {list(shape)} {dtype}"
            )
        if name not in layers:
            raise ValueError(
                f"layers[{name!r}]: wanted the number of its layers for encoding {encoding}, "
                f"got those of {sorted(layers)}"
            )
    return {name: layers[name] for name in features}


def plan(
    prompt: Prompt,
    features: Mapping[str, tuple[str, tuple[int, ...]]],
    store: str,
    layout_hash: str,
    *,
    num_scales: Mapping[str, int],
) -> SampleRef:
    """The sample's ref but for slot, generation and checksums. ValueError if it cannot be read."""
    shapes = {
        "input_ids": ("int32", (len(prompt),)),
        "loss_mask": ("uint8", (len(prompt),)),
        **features,
    }
    named = [(name, dtype, shape) for name, (dtype, shape) in shapes.items()]
    tensors = plan_tensors(named, num_scales=num_scales)
    ref = SampleRef(
        sample_id=prompt.sample_id,
        store=store,
        slot=0,
        generation=1,
        layout_hash=layout_hash,
        num_tokens=len(prompt),
        nbytes=tensors[-1].end,
        tensors=tensors,
    )
    check_ref(ref)
    return ref


def feature_bytes(ref: SampleRef) -> int:
    """Of a sample's extent, what is not the prompt's: as encoded, with scales."""
    features = [t for t in ref.tensors if t.name not in PROMPT_NAMES]
    return sum(t.nbytes + t.scales_nbytes for t in features)


def raw_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a CPU tensor; a copy of it only if it is not contiguous."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data


def write_into(
    slot: _C.ArenaReservation, planned: SampleRef, tensors: Mapping[str, Tensor], *, checksum: bool
) -> tuple[TensorRef, ...]:
    """Copy a planned sample into memory; its tensors' refs, with crc32c if `checksum`.

    ValueError if values that are to be encoded are not finite.
    """
    copied("put", feature_bytes(planned))
    return tuple(_write(slot, t, tensors[t.name], checksum) for t in planned.tensors)


def _write(slot: _C.ArenaReservation, ref: TensorRef, tensor: Tensor, checksum: bool) -> TensorRef:
    if ref.encoding == "none":
        return replace(ref, checksum=slot.write(ref.offset, raw_bytes(tensor), checksum))
    return encode(ref, tensor, _encoded_view(slot, ref), checksum=checksum)


def copy_into(
    extent: TensorExtent, planned: SampleRef, tensors: Mapping[str, Tensor], *, checksum: bool
) -> tuple[TensorRef, ...]:
    """As `write_into`, on the current stream of the extent's device: copies may be queued still."""
    return tuple(_copy(extent, t, tensors[t.name], checksum) for t in planned.tensors)


def _copy(extent: TensorExtent, ref: TensorRef, tensor: Tensor, checksum: bool) -> TensorRef:
    if ref.encoding != "none":
        here = tensor.to(extent.whole.device)
        return encode(ref, here, _encoded_view(extent, ref), checksum=checksum)
    [into] = _views(extent, (ref,))
    into.copy_(tensor, non_blocking=True)
    return replace(ref, checksum=extent.crc32c(ref.offset, ref.nbytes)) if checksum else ref


def encode(ref: TensorRef, tensor: Tensor, into: EncodedFeature, *, checksum: bool) -> TensorRef:
    """Write a feature's codes and scales; its ref with crc32c of both, if `checksum`."""
    try:
        rows = ops.fp8_pack(
            tensor.detach().contiguous(),
            layers=ref.num_scales,
            checksum=checksum,
            out=(into.codes, into.scales),
        )
    except ValueError as error:
        raise ValueError(f"Sample.features[{ref.name!r}]: {error}") from None
    return replace(ref, checksum=rows.crc)


def room_for(ref: TensorRef) -> EncodedFeature:
    """Memory of its own for an encoded feature."""
    return EncodedFeature(
        codes=torch.empty(ref.shape, dtype=torch.uint8),
        scales=torch.empty(ref.shape[0], ref.num_scales),
        dtype=DTYPES[ref.dtype],
    )


def decoded(sample: StoredSample) -> Sample:
    """With plain tensors: a new one for each feature that was encoded, the others are its own."""
    return Sample(sample.prompt, {name: _decoded(f) for name, f in sample.features.items()})


def _decoded(feature: Tensor | EncodedFeature) -> Tensor:
    if isinstance(feature, Tensor):
        return feature
    rows = ops.Fp8Rows(feature.codes, feature.scales, crc=None)
    return ops.fp8_unpack(rows, dtype=feature.dtype)


def expect_ref(ref: SampleRef, *, store: str) -> None:
    """ValueError for an impossible ref; StaleRef for one of another store, or of another epoch."""
    check_ref(ref)
    if ref.store != store:
        raise StaleRef(f"sample {ref.sample_id!r}: wanted store {store!r}, got {ref.store!r}")


def expect_layout(ref: SampleRef, layout_hash: str) -> None:
    if ref.layout_hash != layout_hash:
        raise LayoutMismatch(
            f"sample {ref.sample_id!r}: wanted layout {layout_hash!r}, got {ref.layout_hash!r}"
        )


def lease(extent: Extent, ref: SampleRef, *, verify: bool) -> SampleLease:
    """The sample whose bytes lie in an extent. CorruptFeature names what is wrong with them."""
    fault = find_fault(extent, ref, verify=verify)
    if fault is not None:
        del extent  # else it would live as long as the error's traceback
        raise CorruptFeature(f"sample {ref.sample_id!r}: {fault}")
    return SampleLease(stored_sample(extent, ref))


def find_fault(extent: Extent, ref: SampleRef, *, verify: bool) -> str | None:
    if extent.nbytes != ref.nbytes:
        return f"wanted {ref.nbytes} bytes, the store holds {extent.nbytes}"
    if not verify:
        return None
    return next(filter(None, (_bad_sum(extent, t) for t in ref.tensors)), None)


def _bad_sum(extent: Extent, tensor: TensorRef) -> str | None:
    if tensor.checksum is None:
        return f"{tensor.name}: wanted a checksum to verify, the ref has none"
    came = extent.crc32c(tensor.offset, tensor.nbytes)
    if tensor.num_scales:
        scales_crc = extent.crc32c(tensor.scales_offset, tensor.scales_nbytes)
        came = _C.crc32c_combine(came, scales_crc, tensor.scales_nbytes)
    if came == tensor.checksum:
        return None
    return f"{tensor.name}: wanted crc32c {tensor.checksum:08x}, got {came:08x}"


def views(extent: object, ref: SampleRef) -> dict[str, Tensor]:
    """Every tensor of a sample of encoding none, without a copy; each keeps the extent."""
    tensors = _views(extent, ref.tensors)
    return {t.name: tensor for t, tensor in zip(ref.tensors, tensors, strict=True)}


def stored_sample(extent: object, ref: SampleRef) -> StoredSample:
    """Views of all that a sample holds; of a TensorExtent, the prompt is a copy on the CPU."""
    if isinstance(extent, TensorExtent):
        return _sample_of_slices(extent.whole, ref)
    sample: StoredSample = _C.stored_sample(extent, ref, from_dlpack)
    return sample


def _sample_of_slices(whole: Tensor, ref: SampleRef) -> StoredSample:
    prompt: dict[str, Tensor] = {}
    features: dict[str, Tensor | EncodedFeature] = {}
    for t in ref.tensors:
        values = _slices(whole, t)
        if t.name in PROMPT_NAMES:
            prompt[t.name] = values[0].to("cpu", copy=True)
        elif t.encoding != "none":
            features[t.name] = EncodedFeature(values[0], values[1], DTYPES[t.dtype])
        else:
            features[t.name] = values[0]
    return StoredSample(Prompt(ref.sample_id, **prompt), features)


def _views(extent: object, refs: tuple[TensorRef, ...]) -> list[Tensor]:
    """Of each tensor; of one that is encoded two, its codes and its scales."""
    if isinstance(extent, TensorExtent):
        return [view for ref in refs for view in _slices(extent.whole, ref)]
    tensors: list[Tensor] = _C.tensor_views(extent, refs, from_dlpack)
    return tensors


def _slices(whole: Tensor, ref: TensorRef) -> list[Tensor]:
    codes = whole[ref.offset : ref.offset + ref.nbytes]
    if ref.encoding == "none":
        return [codes.view(DTYPES[ref.dtype]).view(ref.shape)]
    scales = whole[ref.scales_offset : ref.scales_offset + ref.scales_nbytes]
    return [codes.view(ref.shape), scales.view(torch.float32).view(ref.shape[0], ref.num_scales)]


def _encoded_view(extent: object, ref: TensorRef) -> EncodedFeature:
    codes, scales = _views(extent, (ref,))
    return EncodedFeature(codes, scales, DTYPES[ref.dtype])
