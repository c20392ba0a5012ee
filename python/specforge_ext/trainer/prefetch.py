"""Batches to the device, one ahead: the next one travels while this one is computed on."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from specforge_ext.copies import copied
from specforge_ext.records import PackedBatch
from specforge_ext.trainer.data import StepData


class SideQueue(Protocol):
    """Work of the device beside that of the current stream. A mark is a place in either's order."""

    def run(self, copy: Callable[[], PackedBatch]) -> tuple[PackedBatch, Any]:
        """Queue what `copy` does; its result, and the mark after it."""
        ...

    def join(self, mark: Any) -> None:
        """What is queued on the current stream from now on comes after the mark."""
        ...

    def keep(self, tensor: Tensor) -> None:
        """Memory of the side: not used again before what the current stream has when it is let go
        is done."""
        ...

    def current(self) -> Any:
        """The mark after what the current stream has by now."""
        ...

    def wait(self, mark: Any) -> None:
        """The host waits until the device has come there."""
        ...


class CudaSide:
    """A SideQueue of one CUDA device: a stream of its own, with events as marks."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def run(self, copy: Callable[[], PackedBatch]) -> tuple[PackedBatch, Any]:
        # The copies' memory belongs to this stream, so that they need not wait for the current one;
        # what that one still reads there is guarded by `keep`.
        with torch.cuda.stream(self._stream):
            batch = copy()
            mark = torch.cuda.Event()  # type: ignore[no-untyped-call]
            mark.record(self._stream)
        return batch, mark

    def join(self, mark: Any) -> None:
        torch.cuda.current_stream(self._device).wait_event(mark)

    def keep(self, tensor: Tensor) -> None:
        tensor.record_stream(torch.cuda.current_stream(self._device))

    def current(self) -> Any:
        mark = torch.cuda.Event()  # type: ignore[no-untyped-call]
        mark.record(torch.cuda.current_stream(self._device))
        return mark

    def wait(self, mark: Any) -> None:
        mark.synchronize()


class DevicePrefetcher:
    """Two batches of features on the device: one in use, the next one on its way.

    The host queues work ahead of the device, so that a third may still be computed on; it waits
    before there are more, and never for a copy. Batches travel from page-locked memory
    (`loader.pack`). On the CPU they are handed on as they are.
    """

    def __init__(self, device: torch.device, side: SideQueue | None = None) -> None:
        self._device = device
        self._side = side if side or device.type == "cpu" else CudaSide(device)
        self._ahead: tuple[PackedBatch, PackedBatch, Any] | None = None  # host, device, mark
        self._done: deque[Any] = deque()  # marks after what was computed on the last batches

    def batches(self, data: StepData) -> Iterator[PackedBatch]:
        """The step's micro-batches on the device, for use on the current stream.

        With the last of them the next step's first one is sent, if it is packed by then.
        """
        hosts = data.micro_batches
        if self._side is None:
            yield from hosts
            return
        for index, host in enumerate(hosts):
            batch = self._arrived(self._side, host)
            upcoming = hosts[index + 1] if index + 1 < len(hosts) else data.upcoming()
            self._ahead = None if upcoming is None else self._sent(self._side, upcoming)
            yield batch
            self._done.append(self._side.current())

    def _sent(self, side: SideQueue, host: PackedBatch) -> tuple[PackedBatch, PackedBatch, Any]:
        while len(self._done) > 1:
            side.wait(self._done.popleft())
        return host, *side.run(lambda: host.to(self._device))

    def _arrived(self, side: SideQueue, host: PackedBatch) -> PackedBatch:
        """Sent before if it is the batch that was expected next, else now."""
        ahead, self._ahead = self._ahead, None
        if ahead is None or ahead[0] is not host:
            ahead = self._sent(side, host)
        _, batch, mark = ahead
        side.join(mark)
        for tensor in tensors_of(batch):
            side.keep(tensor)
        moved = [f.nbytes for name, f in batch.features.items() if f is not host.features[name]]
        copied("device", sum(moved))
        return batch


def tensors_of(batch: PackedBatch) -> list[Tensor]:
    fixed = [batch.input_ids, batch.loss_mask, batch.positions, batch.cu_seqlens]
    return [*fixed, *batch.features.values()]
