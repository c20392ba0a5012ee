"""What a store offers: samples between processes, by reference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, runtime_checkable

from torch import Tensor

from specforge_ext.config import Config
from specforge_ext.records import (
    ENCODINGS,
    Encoding,
    FeatureLayout,
    Prompt,
    Sample,
    SampleRef,
    StoredSample,
)


class StoreConfig(Config):
    """What every store's config has.

    checksum: compute a crc32c of every tensor while it is copied in. Without one, readers cannot
        verify (stream.verify: off).
    encoding: of features: none, or fp8_e4m3_row, which halves their bytes and rounds them; for
        features of float32, bfloat16 and float16, all finite.
    """

    checksum: bool = True
    encoding: Encoding = "none"


class StoreError(RuntimeError):
    """Base of the typed errors of a store."""


class StaleRef(StoreError):
    """The ref's generation or epoch is not the store's any more."""


class CorruptFeature(StoreError):
    """The bytes are not those that were put: short, or the checksum differs."""


class ProducerLost(StoreError):
    """The process that fills the store is gone."""


class LayoutMismatch(StoreError):
    """The ref was made for another FeatureLayout."""


class UnknownEncoding(StoreError, ValueError):
    """Features are encoded in a way that this release cannot decode: `encoding`."""

    def __init__(self, where: str, encoding: str) -> None:
        super().__init__(f"{where}: wanted one of {', '.join(ENCODINGS)}, got {encoding!r}")
        self.where = where
        self.encoding = encoding

    def __reduce__(self) -> tuple[type[UnknownEncoding], tuple[str, str]]:
        return type(self), (self.where, self.encoding)


class StoreFull(StoreError):
    """A sample, or samples that are wanted together, that can never fit: `needed` and `available`
    bytes."""

    def __init__(self, needed: int, available: int, what: str = "sample") -> None:
        super().__init__(f"{what} of {needed} bytes does not fit a store of {available} bytes")
        self.what = what
        self.needed = needed
        self.available = available

    def __reduce__(self) -> tuple[type[StoreFull], tuple[int, int, str]]:
        # An exception is pickled with its text alone, which is not what the constructor takes.
        return type(self), (self.needed, self.available, self.what)


class TransferTimeout(StoreError):
    """A wait ended at its deadline: what it waited for, and for how many seconds."""

    def __init__(self, what: str, waited_s: float) -> None:
        super().__init__(f"waited {waited_s:.1f} s for {what}")
        self.what = what
        self.waited_s = waited_s

    def __reduce__(self) -> tuple[type[TransferTimeout], tuple[str, float]]:
        return type(self), (self.what, self.waited_s)


@dataclass(frozen=True)
class Capabilities:
    """What a store of this kind, opened as it is, can do.

    protocol: what carries the bytes: "memory", "file", "tcp", "rdma" or "cuda"; the one in use,
    which is the one asked for. zero_copy: views are of the memory that `put` wrote. across_hosts:
    readers may be on other hosts. outlives_producer: what was put stays readable when its process
    died.
    on_gpu: a writer's `put` takes tensors of a GPU as they are; a reader's views of features are of
    its memory, and checksums are verified there. Who queues work on such views waits for it before
    the lease is released.
    """

    kind: str
    protocol: str
    zero_copy: bool
    across_hosts: bool
    outlives_producer: bool
    on_gpu: bool = False

    def describe(self) -> str:
        """For a log: "mooncake_p2p over tcp"."""
        return f"{self.kind} over {self.protocol}"


class Health(Protocol):
    """A store at one moment, as its writer sees it. used_bytes, num_samples: not yet free again."""

    @property
    def capacity_bytes(self) -> int: ...

    @property
    def used_bytes(self) -> int: ...

    @property
    def num_samples(self) -> int: ...


class Lease(Protocol):
    """A sample whose tensors are views of the store's memory, valid until `release`.

    Views that outlive the lease keep the memory from being recycled.
    """

    @property
    def sample(self) -> StoredSample: ...

    def release(self) -> None: ...

    def __enter__(self) -> Lease: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None: ...


class StoreWriter(Protocol):
    @property
    def capacity_bytes(self) -> int:
        """Payload that fits at the same time."""
        ...

    def put(
        self,
        sample: Sample,
        *,
        layout_hash: str,
        timeout_s: float,
        layers: Mapping[str, int] | None = None,
    ) -> SampleRef:
        """Copy a sample in, encoded as configured, and publish it. Waits for room.

        features[name]: [S, width], CPU; any of DTYPES, or of FP8_DTYPES to be encoded.
        layers[name]: L, which divides the width: `FeatureLayout.layers`. Wanted by encodings only.
        ValueError for other tensors, or values that are not finite where an encoding has none;
        StoreFull at once if it can never fit; TransferTimeout if readers free no room in time.
        """
        ...

    def abort(self, ref: SampleRef) -> None:
        """Nobody is going to read this sample any more: as a reader's `ack`."""
        ...

    def reap(self) -> int:
        """Take back what ended processes held or left; how many such things there were."""
        ...

    def health(self) -> Health: ...

    def capabilities(self) -> Capabilities: ...

    def address(self) -> str:
        """What a reader needs to attach."""
        ...

    def close(self) -> None: ...


class Reservation(Protocol):
    """Room for one sample. Ends with `publish` or `abort`, of which one may be called, once."""

    @property
    def features(self) -> Mapping[str, Tensor]:
        """[S, width] views to write to, of unspecified content. Not after the end."""
        ...

    def publish(self) -> SampleRef:
        """Make the sample readable."""
        ...

    def abort(self) -> None:
        """Give the room back."""
        ...


@runtime_checkable
class ReservingWriter(Protocol):
    """A StoreWriter whose memory others may write to: see store/reserving.py."""

    @property
    def writes_in_place(self) -> bool:
        """False where it stores other bytes than those of the features, and has to `put`."""
        ...

    def expect_room(self, prompts: Sequence[Prompt], layout: FeatureLayout) -> None:
        """StoreFull if these samples could never lie in the store at the same time."""
        ...

    def reserve(self, prompt: Prompt, layout: FeatureLayout, *, timeout_s: float) -> Reservation:
        """Room for a sample whose features the caller writes. Waits; StoreFull, TransferTimeout."""
        ...

    def abort(self, ref: SampleRef) -> None:
        """Nobody is going to read this sample any more: as a reader's `ack`."""
        ...


class StoreReader(Protocol):
    def open(self, ref: SampleRef, *, layout_hash: str, verify: bool) -> Lease:
        """Lease a sample. StaleRef, CorruptFeature, LayoutMismatch, ProducerLost."""
        ...

    def ack(self, ref: SampleRef) -> None:
        """The sample is done with: its memory may be reused once no lease is left."""
        ...

    @property
    def producer_alive(self) -> bool: ...

    def capabilities(self) -> Capabilities: ...

    def close(self) -> None: ...
