"""Ways for a sample to get from one process to another: what a way is, the floors, our stores.

A way has a producing and a consuming end. `deliver` says through `tell` that a sample comes, in the
words that the other end's `receive` wants; what is inside the clock is in `Way.clock`. Everything
runs between processes of one host and on loopback.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from specforge_ext.records import FeatureLayout, FeatureSpec, Prompt, Sample, SampleRef
from specforge_ext.store import STORES
from specforge_ext.store.base import Lease
from specforge_ext.store.mooncake_master import Master
from specforge_ext.store.ref import ref_from_bytes, ref_to_bytes
from specforge_ext.store.shm import ShmConfig, ShmReservation, ShmStore

HIDDEN = 4096
AUX_LAYERS = (1, 2, 3)
BYTES_PER_TOKEN = 2 * HIDDEN * (len(AUX_LAYERS) + 1)
LAYOUT = FeatureLayout(
    (
        FeatureSpec("aux", AUX_LAYERS, HIDDEN * len(AUX_LAYERS), "bfloat16"),
        FeatureSpec("last", (4,), HIDDEN, "bfloat16", final_norm=True),
    )
)
"""What EAGLE-3 needs of a target of hidden size 4096: 32 KiB a token."""
PAGE_BYTES = 4096
TIMEOUT_S = 60.0
TMPFS = "/dev/shm"
OURS = "specforge_ext"

Tensors = dict[str, Tensor]
Tell = Callable[[Any], None]


class Producer(Protocol):
    """The sending end, towards every consumer. Only `deliver` is timed."""

    @property
    def protocol(self) -> str: ...

    @property
    def handles(self) -> list[Any]:
        """What each consumer's end is made from; it is pickled."""
        ...

    def prepare(self) -> None:
        """Before the clock starts, for one delivery to each consumer."""
        ...

    def deliver(self, consumer: int, tell: Tell) -> None: ...

    def recover(self) -> None:
        """When every consumer has let go."""
        ...

    def close(self) -> None: ...


class Consumer(Protocol):
    def receive(self, message: Any) -> Tensors:
        """The sample's tensors, to be read."""
        ...

    def release(self) -> None:
        """Let go of the sample. The caller has dropped the tensors."""
        ...

    def close(self) -> None: ...


class Shared:
    """What ways have in common: servers, which end with it."""

    def __init__(self) -> None:
        self.masters: dict[str, Master] = {}

    def master(self, owner: str) -> Master:
        """Mooncake's, one for each way: objects without a preferred segment may land in any."""
        if owner not in self.masters:
            self.masters[owner] = Master()
        return self.masters[owner]

    def close(self) -> None:
        while self.masters:
            self.masters.popitem()[1].close()


Ends = tuple[Any, Any]
"""Of a link: what the producer gets, and what the consumer gets. They are inherited."""


@dataclass(frozen=True)
class Way:
    """producer: from the sample and the producer's ends of its links, one for each consumer.
    consumer: from a handle and its end of the link. None: all happens in the producer.
    clock: what is timed, from the first word to the last.
    absent: why it cannot be used here, or None.
    turns: deliveries in a round, where they are short and their spread matters.
    moves: whether the bytes move within the clock; else only the latency means something.
    raw: messages are bytes, which are sent as they are; else objects, which are pickled.
    master: owner of the Mooncake master whose CPU seconds are its too.
    """

    name: str
    producer: Callable[[Sample, list[Any]], Producer]
    consumer: Callable[[Any, Any], Consumer] | None
    clock: str
    link: Callable[[Shared], Ends] = lambda shared: (None, None)
    absent: Callable[[], str | None] = lambda: None
    turns: int = 1
    moves: bool = True
    raw: bool = False
    master: str | None = None


def make_sample(mib: int) -> Sample:
    num_tokens = (mib << 20) // BYTES_PER_TOKEN
    ids = torch.arange(num_tokens, dtype=torch.int32)
    prompt = Prompt("sample", ids, torch.ones(num_tokens, dtype=torch.uint8))
    generator = torch.Generator().manual_seed(1)
    words = torch.randint(0, 1 << 62, (mib << 17,), generator=generator).view(torch.bfloat16)
    aux = AUX_LAYERS[-1] * HIDDEN * num_tokens
    features = {
        "aux": words[:aux].view(num_tokens, -1),
        "last": words[aux:].view(num_tokens, -1),
    }
    return Sample(prompt, features)


def tensors_of(sample: Sample) -> Tensors:
    prompt = sample.prompt
    return {"input_ids": prompt.input_ids, "loss_mask": prompt.loss_mask, **sample.features}


def touch(tensors: Tensors) -> int:
    """Read a byte of every page of the features."""
    return sum(int(_bytes(tensors[s.name])[::PAGE_BYTES].sum()) for s in LAYOUT.features)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def count_equal_bytes(came: Tensors, wanted: Tensors) -> int | None:
    """How many were compared; None if one is not what was wanted."""
    if came.keys() != wanted.keys():
        return None
    for name, tensor in wanted.items():
        if came[name].shape != tensor.shape or came[name].dtype != tensor.dtype:
            return None
        if not torch.equal(_bytes(came[name]), _bytes(tensor)):
            return None
    return sum(tensor.nbytes for tensor in wanted.values())


class CopyProducer:
    """Into memory that was touched before, and read from there; all in one process."""

    protocol = "memory"

    def __init__(self, sample: Sample, links: list[Any]) -> None:
        self.handles: list[Any] = []
        self._tensors = tensors_of(sample)
        self._copies = {name: torch.zeros_like(t) for name, t in self._tensors.items()}

    def prepare(self) -> None:
        pass

    def deliver(self, consumer: int, tell: Tell) -> None:
        for name, tensor in self._tensors.items():
            self._copies[name].copy_(tensor)
        tell(self._copies)

    def recover(self) -> None:
        pass

    def close(self) -> None:
        pass


class MessageProducer(CopyProducer):
    """A message and nothing else, about a sample that the other process has already."""

    protocol = "pipe"

    def __init__(self, sample: Sample, links: list[Any]) -> None:
        self._num_tokens = len(sample.prompt)
        self.handles = [self._num_tokens for _ in links]

    def deliver(self, consumer: int, tell: Tell) -> None:
        tell(b"a sample")


class MessageConsumer:
    def __init__(self, handle: int, link: None) -> None:
        self._tensors = tensors_of(make_sample(handle * BYTES_PER_TOKEN >> 20))

    def receive(self, message: bytes) -> Tensors:
        return self._tensors

    def release(self) -> None:
        pass

    def close(self) -> None:
        pass


class StoreProducer:
    """One of our stores, with room for a sample of each consumer."""

    def __init__(
        self, sample: Sample, links: list[dict[str, Any]], *, kind: str, checksum: bool
    ) -> None:
        self._sample = sample
        self._folder = tempfile.TemporaryDirectory(dir=TMPFS)
        settings = dict(links[0])
        if kind == "shared_dir":
            settings["directory"] = Path(self._folder.name)
        if kind.startswith("mooncake"):
            settings["pool_bytes"] = capacity_bytes(sample, 1)
        store = STORES.get(kind)
        capacity = capacity_bytes(sample, len(links))
        config = store.Config(capacity_bytes=capacity, checksum=checksum, **settings)
        self._writer = store.writer(config)
        self.handles = [(kind, self._writer.address(), checksum) for _ in links]

    @property
    def protocol(self) -> str:
        return str(self._writer.capabilities().protocol)

    def prepare(self) -> None:
        pass

    def deliver(self, consumer: int, tell: Tell) -> None:
        ref = self._writer.put(self._sample, layout_hash=LAYOUT.hash, timeout_s=TIMEOUT_S)
        tell(ref_to_bytes(ref))

    def recover(self) -> None:
        pass

    def close(self) -> None:
        self._writer.close()
        self._folder.cleanup()


def capacity_bytes(sample: Sample, num_samples: int) -> int:
    """Of samples and what lies between their tensors, in pages."""
    nbytes = sum(tensor.nbytes for tensor in tensors_of(sample).values())
    return num_samples * (nbytes + 16 * PAGE_BYTES)


class InPlaceProducer:
    """The sample is written into the arena to begin with, as the engine does."""

    protocol = "memory"

    def __init__(self, sample: Sample, links: list[Any]) -> None:
        self._sample = sample
        self._num_consumers = len(links)
        config = ShmConfig(capacity_bytes=capacity_bytes(sample, len(links)), checksum=False)
        self._writer = ShmStore.writer(config)
        self._reserved: list[ShmReservation] = []
        self.handles = [("shm", self._writer.address(), False) for _ in links]

    def prepare(self) -> None:
        for _ in range(self._num_consumers):
            slot = self._writer.reserve(self._sample.prompt, LAYOUT, timeout_s=TIMEOUT_S)
            for name, feature in self._sample.features.items():
                slot.features[name].copy_(feature)
            self._reserved.append(slot)

    def deliver(self, consumer: int, tell: Tell) -> None:
        tell(ref_to_bytes(self._reserved.pop().publish()))

    def recover(self) -> None:
        pass

    def close(self) -> None:
        self._writer.close()


class StoreConsumer:
    def __init__(self, handle: tuple[str, str, bool], link: object) -> None:
        kind, address, self._verify = handle
        self._reader = STORES.get(kind).reader(address)
        self._open: tuple[SampleRef, Lease] | None = None

    def receive(self, message: bytes) -> Tensors:
        ref = ref_from_bytes(message)
        lease = self._reader.open(ref, layout_hash=LAYOUT.hash, verify=self._verify)
        self._open = (ref, lease)
        return tensors_of(lease.sample)

    def release(self) -> None:
        if self._open is not None:
            ref, lease = self._open
            lease.release()
            self._reader.ack(ref)
            self._open = None

    def close(self) -> None:
        self._reader.close()


def store_way(kind: str, *, checksum: bool = True) -> Way:
    sums = ("put: copy + crc32c", "open + verify") if checksum else ("put: copy", "open")
    return Way(
        name=f"specforge_ext/{kind}" + ("" if checksum else "/no-checksum"),
        producer=functools.partial(StoreProducer, kind=kind, checksum=checksum),
        consumer=StoreConsumer,
        clock=f"{sums[0]} | message | {sums[1]} | read | release + ack",
        link=_master_link if kind == "mooncake_store" else _plain_link,
        absent=STORES.get(kind).unavailable,
        raw=True,
        master=OURS if kind == "mooncake_store" else None,
    )


def _plain_link(shared: Shared) -> Ends:
    return {}, None


def _master_link(shared: Shared) -> Ends:
    return {"master": shared.master(OURS).address}, None


MEMCPY = Way("memcpy", CopyProducer, None, "copy into touched memory of the same process | read")
MESSAGE = Way(
    "message-only",
    MessageProducer,
    MessageConsumer,
    "message | read",
    turns=5,
    moves=False,
    raw=True,
)
IN_PLACE = Way(
    "specforge_ext/shm/in-place",
    InPlaceProducer,
    StoreConsumer,
    "publish (the bytes lie there, no checksum) | message | open | read | release + ack",
    turns=5,
    moves=False,
    raw=True,
)
WAYS = (
    MEMCPY,
    MESSAGE,
    IN_PLACE,
    store_way("shm", checksum=False),
    store_way("shm"),
    store_way("shared_dir"),
    store_way("mooncake_p2p"),
    store_way("mooncake_store", checksum=False),
    store_way("mooncake_store"),
)
