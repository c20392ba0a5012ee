"""A rank's stream of micro-batches: requests ahead, copies out of the store, hands on in order."""

from __future__ import annotations

import logging
import queue
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor

from specforge_ext import ops
from specforge_ext.config import Config
from specforge_ext.copies import Stage, copied, counting
from specforge_ext.loader.order import GlobalStep, OrderConfig, micro_batches
from specforge_ext.loader.source import Delivery, FeatureLink, Skipped
from specforge_ext.records import (
    DTYPES,
    EncodedFeature,
    FeatureLayout,
    PackedBatch,
    Prompt,
    Sample,
    SampleRef,
    StoredSample,
)
from specforge_ext.store.base import StoreReader, TransferTimeout

log = logging.getLogger(__name__)

END_S = 5.0
"""For the thread to finish the batch that it packs; waits for the producer end with the link."""


VERIFY_EVERY = 16
"""Of the samples, with verify = sample."""


class StreamConfig(Config):
    """in_flight_steps: steps asked of the producer ahead of the one being received.

    prefetch_steps: packed steps that wait in the trainer's memory.
    timeout_s: deadline of a wait for one step's features.
    verify: which samples have all their checksums compared when they are opened: off, sample (one
        in VERIFY_EVERY) or full.
    max_skipped: samples that a rank may miss, from its start on, before it stops.
    """

    in_flight_steps: int = Field(default=2, ge=0)
    prefetch_steps: int = Field(default=2, ge=1)
    timeout_s: float = Field(default=120.0, gt=0)
    verify: Literal["off", "sample", "full"] = "full"
    max_skipped: int = Field(default=0, ge=0)

    @field_validator("verify", mode="before")
    @classmethod
    def _off_is_false_in_yaml(cls, value: object) -> object:
        return {False: "off", True: "full"}[value] if isinstance(value, bool) else value


def nothing_yet() -> PackedBatch | None:
    return None


@dataclass(frozen=True)
class StepData:
    """What one rank trains on in one optimizer step.

    step: index of the global step, from 0. micro_batches: any number, also none; ranks may differ.
    wait_s: seconds this rank stood still for the data. samples, tokens: counts of this rank's part.
    skipped: samples of this rank's share that could not be produced.
    delivered_bytes: of the features in the micro-batches. copied: bytes of features that were
    copied for them up to here, producer included, by stage (copies.py).
    upcoming: the next step's first micro-batch if it is packed by now, else None.
    """

    step: int
    micro_batches: tuple[PackedBatch, ...]
    wait_s: float
    samples: int
    tokens: int
    skipped: tuple[Skipped, ...] = ()
    delivered_bytes: int = 0
    copied: Mapping[Stage, int] = field(default_factory=dict)
    upcoming: Callable[[], PackedBatch | None] = nothing_yet


class TooManySkipped(RuntimeError):
    """More samples are missing than `max_skipped` allows."""


class Stream:
    """Implements the trainer's StepSource. One background thread.

    Leaving `iterate` ends the thread and closes the link, whose answers may be on their way.
    """

    def __init__(
        self,
        *,
        steps: Sequence[GlobalStep],
        prompts: Sequence[Prompt],
        layout: FeatureLayout,
        link: FeatureLink,
        reader: StoreReader,
        order: OrderConfig,
        config: StreamConfig,
        rank: int,
        world_size: int,
    ) -> None:
        self._steps = steps
        self._prompts = prompts
        self._lengths = [len(p) for p in prompts]
        self._layout = layout
        self._link = link
        self._reader = reader
        self._order = order
        self._config = config
        self._rank = rank
        self._world_size = world_size

    @property
    def total_steps(self) -> int:
        return len(self._steps)

    def iterate(self, start_step: int) -> Iterator[StepData]:
        """Steps from `start_step` on. What the thread raises is raised here, at its step."""
        ready: queue.Queue[StepData | BaseException | None] = queue.Queue(
            maxsize=self._config.prefetch_steps
        )
        stop = threading.Event()
        thread = threading.Thread(
            target=self._run, args=(start_step, ready, stop), name="specforge-stream", daemon=True
        )
        thread.start()
        skipped = 0
        try:
            while (data := self._next(ready, start_step)) is not None:
                skipped += len(data.skipped)
                if skipped > self._config.max_skipped:
                    last = data.skipped[-1]
                    raise TooManySkipped(
                        f"{skipped} samples could not be produced, stream.max_skipped is "
                        f"{self._config.max_skipped}; the last: {last.sample_id}: {last.reason}"
                    )
                yield data
                start_step = data.step + 1
        finally:
            stop.set()
            self._link.close()
            thread.join(timeout=END_S)
            if thread.is_alive():
                log.warning("waited %.0f s for the end of the thread that fetches data", END_S)

    def _next(
        self, ready: queue.Queue[StepData | BaseException | None], step: int
    ) -> StepData | None:
        start = time.perf_counter()
        # The thread has its own deadline for the producer; this one only guards against its death.
        limit = self._config.timeout_s + 30.0
        try:
            item = ready.get(timeout=limit)
        except queue.Empty:
            raise TransferTimeout(f"the packed batch of step {step}", limit) from None
        if isinstance(item, BaseException):
            raise item
        if item is None:
            return None
        wait_s = time.perf_counter() - start
        return replace(item, wait_s=wait_s, upcoming=partial(_upcoming, ready))

    def _run(
        self,
        start_step: int,
        ready: queue.Queue[StepData | BaseException | None],
        stop: threading.Event,
    ) -> None:
        try:
            for data in self._deliveries(start_step, stop):
                _put(ready, data, stop)
            _put(ready, None, stop)
        except Exception as error:  # noqa: BLE001 - carried to the trainer's thread, and raised there
            _put(ready, error, stop)

    def _deliveries(self, start_step: int, stop: threading.Event) -> Iterator[StepData]:
        asked = start_step
        for step in self._steps[start_step:]:
            while asked < len(self._steps) and asked <= step.step + self._config.in_flight_steps:
                self._ask(self._steps[asked])
                asked += 1
            if stop.is_set():
                return
            delivery = self._link.receive(timeout_s=self._config.timeout_s)
            if delivery.step != step.step:
                raise RuntimeError(f"asked for step {step.step}, got step {delivery.step}")
            yield self._pack(step, delivery)

    def _plan(self, step: GlobalStep) -> list[list[int]]:
        return micro_batches(
            step, self._lengths, self._order, rank=self._rank, world_size=self._world_size
        )

    def _ask(self, step: GlobalStep) -> None:
        ids = [self._prompts[i].sample_id for part in self._plan(step) for i in part]
        self._link.request(step.step, ids)

    def _pack(self, step: GlobalStep, delivery: Delivery) -> StepData:
        refs = {ref.sample_id: ref for ref in delivery.refs}
        missing = {skipped.sample_id for skipped in delivery.skipped}
        plan = self._plan(step)
        asked = [self._prompts[i].sample_id for part in plan for i in part]
        if sorted(asked) != sorted([*refs, *missing]):
            raise RuntimeError(
                f"step {step.step}: wanted samples {sorted(asked)} or why not, "
                f"got {sorted(refs)} and not {sorted(missing)}"
            )
        batches: list[PackedBatch] = []
        with counting() as here:
            for part in plan:
                wanted = [p for p in map(self._prompts.__getitem__, part) if p.sample_id in refs]
                if wanted:
                    batches.append(self._collate([refs[p.sample_id] for p in wanted], wanted))
        return StepData(
            step=step.step,
            micro_batches=tuple(batches),
            wait_s=0.0,
            samples=sum(len(b.sample_ids) for b in batches),
            tokens=sum(b.num_tokens for b in batches),
            skipped=delivery.skipped,
            delivered_bytes=sum(_feature_bytes(batch) for batch in batches),
            copied=here + Counter(delivery.copied),
        )

    def _collate(self, refs: list[SampleRef], prompts: list[Prompt]) -> PackedBatch:
        """One copy: from the store's memory into the packed batch; then the store has it back."""
        with ExitStack() as stack:
            leases = [
                stack.enter_context(
                    self._reader.open(
                        ref,
                        layout_hash=self._layout.hash,
                        verify=is_verified(ref, self._config.verify),
                    )
                )
                for ref in refs
            ]
            samples = [lease.sample for lease in leases]
            for sample, prompt in zip(samples, prompts, strict=True):
                _check_same(sample, prompt)
            batch = pack(samples, self._layout)
            del samples, leases
        for ref in refs:
            self._reader.ack(ref)
        return batch


def is_verified(ref: SampleRef, verify: str) -> bool:
    """The choice is the ref's alone: other samples in other epochs, the same when run again."""
    if verify != "sample":
        return verify == "full"
    return zlib.crc32(f"{ref.sample_id}/{ref.generation}".encode()) % VERIFY_EVERY == 0


def pack(samples: Sequence[Sample | StoredSample], layout: FeatureLayout) -> PackedBatch:
    """One packed batch of samples that lie anywhere on the host; every byte is read once.

    Encoded features are decoded on their way, to the dtype that the layout says. Of features on a
    GPU the batch is made there. Nothing reads the samples when this has returned.
    """
    names = [spec.name for spec in layout.features]
    found = [[_codes_and_scales(s.features[name]) for name in names] for s in samples]
    input_ids, loss_mask, positions, cu_seqlens, features = _gather(
        [s.prompt.input_ids for s in samples],
        [s.prompt.loss_mask for s in samples],
        [[values for values, _ in row] for row in found],
        scales=[[scales for _, scales in row] for row in found],
        dtype=[DTYPES[spec.dtype] for spec in layout.features],
        pin_memory=torch.cuda.is_available(),
    )
    batch = PackedBatch(
        sample_ids=tuple(s.prompt.sample_id for s in samples),
        lengths=tuple(len(s.prompt) for s in samples),
        input_ids=input_ids,
        loss_mask=loss_mask,
        positions=positions,
        features=dict(zip(names, features, strict=True)),
        cu_seqlens=cu_seqlens,
    )
    copied("collate", _feature_bytes(batch))
    return batch


def _feature_bytes(batch: PackedBatch) -> int:
    return sum(feature.nbytes for feature in batch.features.values())


def _upcoming(ready: queue.Queue[StepData | BaseException | None]) -> PackedBatch | None:
    """The first micro-batch of the step that is taken next; it stays where it is."""
    with ready.mutex:
        item = ready.queue[0] if ready.queue else None
    return item.micro_batches[0] if isinstance(item, StepData) and item.micro_batches else None


def _gather(
    ids: Sequence[Tensor],
    masks: Sequence[Tensor],
    features: Sequence[Sequence[Tensor]],
    *,
    scales: Sequence[Sequence[Tensor | None]],
    dtype: Sequence[torch.dtype],
    pin_memory: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, tuple[Tensor, ...]]:
    """`ops.pack_samples`, on the GPU if the features are; pin_memory: else."""
    place = next((t.device for row in features for t in row if t.is_cuda), None)
    if place is None:
        return ops.pack_samples(
            ids, masks, features, scales=scales, dtype=dtype, pin_memory=pin_memory
        )
    cuda: Any = torch.cuda  # parts of it have no types
    stream = cuda.Stream(place)  # the wait below is not for steps that train meanwhile
    with cuda.stream(stream):
        ids, masks = ([t.to(place) for t in row] for row in (ids, masks))
        packed = ops.pack_samples(ids, masks, features, scales=scales, dtype=dtype, device=place)
    # Freed memory goes back to this stream, which must not use it while another one reads it.
    for tensor in (*packed[:4], *packed[4]):
        tensor.record_stream(cuda.default_stream(place))
    stream.synchronize()
    return packed


def _codes_and_scales(feature: Tensor | EncodedFeature) -> tuple[Tensor, Tensor | None]:
    if isinstance(feature, EncodedFeature):
        return feature.codes, feature.scales
    return feature, None


def _check_same(sample: StoredSample, prompt: Prompt) -> None:
    """Features of other tokens than the prompt's would train silently; refuse them by name."""
    if not sample.prompt.input_ids.equal(prompt.input_ids):
        raise ValueError(
            f"sample {prompt.sample_id}: the store holds other token ids than the data"
        )


def _put(
    ready: queue.Queue[StepData | BaseException | None],
    item: StepData | BaseException | None,
    stop: threading.Event,
) -> None:
    while not stop.is_set():
        try:
            ready.put(item, timeout=0.2)
            return
        except queue.Full:
            continue
