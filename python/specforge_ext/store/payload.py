"""Samples as bytes, and bytes as samples again: what every store does the same way.

A sample's extent holds its tensors raw, each at a multiple of 64 bytes; the rest is in its
SampleRef. S is the number of tokens of a sample.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from specforge_ext import _C
from specforge_ext.records import DTYPE_NAMES, DTYPES, Prompt, Sample, SampleRef, TensorRef
from specforge_ext.store.base import CorruptFeature, LayoutMismatch, StaleRef, StoreError
from specforge_ext.store.ref import check_ref, plan_tensors


class Extent(Protocol):
    """A sample's bytes, kept where they are for as long as a view of them lives.

    It is a buffer too, which no type of Python 3.11 says.
    """

    @property
    def nbytes(self) -> int: ...

    def crc32c(self, offset: int, nbytes: int) -> int: ...


class SampleLease:
    """Ends when `release` was called (or the lease dropped) and no view of it lives any more."""

    def __init__(self, extent: Extent, ref: SampleRef, tensors: dict[str, Tensor]) -> None:
        """tensors: of the ref, by name; the caller's own dictionary no more."""
        prompt = Prompt(ref.sample_id, tensors.pop("input_ids"), tensors.pop("loss_mask"))
        self._sample_id = ref.sample_id
        # A sample without a single byte has no view that would keep the extent.
        self._held: tuple[Extent, Sample] | None = (extent, Sample(prompt, tensors))

    @property
    def sample(self) -> Sample:
        if self._held is None:
            raise StoreError(f"lease of sample {self._sample_id!r}: wanted before its release")
        return self._held[1]

    def release(self) -> None:
        """May be called more than once."""
        self._held = None

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
        if name not in ("input_ids", "loss_mask")
    }


def plan(
    prompt: Prompt,
    features: Mapping[str, tuple[str, tuple[int, ...]]],
    store: str,
    layout_hash: str,
) -> SampleRef:
    """The sample's ref but for slot, generation and checksums. ValueError if it cannot be read."""
    shapes = {
        "input_ids": ("int32", (len(prompt),)),
        "loss_mask": ("uint8", (len(prompt),)),
        **features,
    }
    tensors = plan_tensors((name, dtype, shape) for name, (dtype, shape) in shapes.items())
    ref = SampleRef(
        sample_id=prompt.sample_id,
        store=store,
        slot=0,
        generation=1,
        layout_hash=layout_hash,
        num_tokens=len(prompt),
        nbytes=tensors[-1].offset + tensors[-1].nbytes,
        tensors=tensors,
    )
    check_ref(ref)
    return ref


def raw_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a CPU tensor; a copy of it only if it is not contiguous."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data


def write_into(
    slot: _C.ArenaReservation, planned: SampleRef, tensors: Mapping[str, Tensor], *, checksum: bool
) -> tuple[TensorRef, ...]:
    """Copy a planned sample into memory; its tensors' refs, with crc32c if `checksum`."""
    return tuple(
        TensorRef(
            *(t.name, t.dtype, t.shape, t.offset, t.nbytes, t.encoding),
            checksum=slot.write(t.offset, raw_bytes(tensors[t.name]), checksum),
        )
        for t in planned.tensors
    )


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


def lease(
    extent: Extent,
    ref: SampleRef,
    *,
    verify: bool,
    views_of: Callable[[Any, SampleRef], dict[str, Tensor]] | None = None,
) -> SampleLease:
    """The sample whose bytes lie in an extent. CorruptFeature names what is wrong with them.

    views_of: makes its tensors, prompt on the CPU; None: `views`, of a buffer.
    """
    fault = find_fault(extent, ref, verify=verify)
    if fault is not None:
        del extent  # else it would live as long as the error's traceback
        raise CorruptFeature(f"sample {ref.sample_id!r}: {fault}")
    return SampleLease(extent, ref, (views_of or views)(extent, ref))


def find_fault(extent: Extent, ref: SampleRef, *, verify: bool) -> str | None:
    if extent.nbytes != ref.nbytes:
        return f"wanted {ref.nbytes} bytes, the store holds {extent.nbytes}"
    return next(filter(None, (_bad_sum(extent, t) for t in ref.tensors if verify)), None)


def _bad_sum(extent: Extent, tensor: TensorRef) -> str | None:
    if tensor.checksum is None:
        return f"{tensor.name}: wanted a checksum to verify, the ref has none"
    came = extent.crc32c(tensor.offset, tensor.nbytes)
    if came == tensor.checksum:
        return None
    return f"{tensor.name}: wanted crc32c {tensor.checksum:08x}, got {came:08x}"


def views(extent: object, ref: SampleRef) -> dict[str, Tensor]:
    """Every tensor of a sample, without a copy; each keeps the extent."""
    return {tensor.name: _view(extent, tensor) for tensor in ref.tensors}


def cut(whole: Tensor, ref: TensorRef) -> Tensor:
    """One tensor of a sample whose bytes are the uint8 tensor `whole`, on whatever device."""
    bytes_ = whole[ref.offset : ref.offset + ref.nbytes]
    return bytes_.view(DTYPES[ref.dtype]).view(ref.shape)


def _view(extent: object, ref: TensorRef) -> Tensor:
    dtype = DTYPES[ref.dtype]
    if ref.nbytes == 0:
        return torch.empty(ref.shape, dtype=dtype)  # frombuffer refuses to see nothing
    count = ref.nbytes // dtype.itemsize
    return torch.frombuffer(extent, dtype=dtype, count=count, offset=ref.offset).view(ref.shape)
