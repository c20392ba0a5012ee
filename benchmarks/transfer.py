"""Features from one process to another on the same host: wall time and CPU seconds of both.

A round starts when the producer holds a sample in its own memory and ends when the consumer has
read a byte of every page of it; `view_s` ends when the consumer holds the tensor, read or not.
`specforge_ext/in-place` starts at publish: its sample was written into the arena to begin with.
All ways take turns within one pair of processes, after each has delivered the right bytes once.
`memcpy` is the copy into touched memory of the same process, the floor of everything that copies.
Peak memory counts both processes, hence shared pages twice.
"""

from __future__ import annotations

import itertools
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.multiprocessing
from safetensors.torch import load_file, save_file
from torch import Tensor

from common import BenchScript, PeakMeter, Report, Timing
from specforge_ext.records import FeatureLayout, FeatureSpec, Prompt, Sample, SampleRef
from specforge_ext.store.payload import SampleLease
from specforge_ext.store.shm import ShmConfig, ShmReservation, ShmStore

WIDTH = 4 * 4096
PAGE_BYTES = 4096
TIMEOUT_S = 60.0
LAYOUT = FeatureLayout((FeatureSpec("h", (1, 2, 3, 4), WIDTH, "bfloat16"),))


class Producer(Protocol):
    """One way, at the sending end. Only `send` is timed as wall time; all of it as CPU time."""

    handle: Any  # what the receiving end is made from

    def prepare(self) -> None: ...

    def send(self) -> Any: ...

    def recover(self) -> None: ...


class Consumer(Protocol):
    def receive(self, message: Any) -> Tensor: ...

    def release(self) -> None: ...


def make_sample(mib: int) -> Sample:
    num_tokens = (mib << 20) // (WIDTH * 2)
    ids = torch.arange(num_tokens, dtype=torch.int32)
    prompt = Prompt("sample", ids, torch.ones(num_tokens, dtype=torch.uint8))
    generator = torch.Generator().manual_seed(1)
    words = torch.randint(0, 1 << 62, (mib << 17,), generator=generator)
    return Sample(prompt, {"h": words.view(torch.bfloat16).view(num_tokens, WIDTH)})


def touch(feature: Tensor) -> int:
    """Read a byte of every page."""
    return int(feature.reshape(-1).view(torch.uint8)[::PAGE_BYTES].sum(dtype=torch.int64))


class ShmProducer:
    def __init__(self, sample: Sample, *, checksum: bool) -> None:
        self._sample = sample
        nbytes = sample.features["h"].nbytes
        config = ShmConfig(capacity_bytes=2 * nbytes, checksum=checksum)
        self._writer = ShmStore.writer(config)
        self.handle = (self._writer.address(), checksum)

    def prepare(self) -> None:
        pass

    def send(self) -> SampleRef:
        return self._writer.put(self._sample, layout_hash=LAYOUT.hash, timeout_s=TIMEOUT_S)

    def recover(self) -> None:
        pass


class InPlaceProducer(ShmProducer):
    def prepare(self) -> None:
        sample = self._sample
        self._reserved: ShmReservation = self._writer.reserve(
            sample.prompt, LAYOUT, timeout_s=TIMEOUT_S
        )
        self._reserved.features["h"].copy_(sample.features["h"])

    def send(self) -> SampleRef:
        return self._reserved.publish()


class ShmConsumer:
    def __init__(self, handle: tuple[str, bool]) -> None:
        address, self._verify = handle
        self._reader = ShmStore.reader(address)
        self._open: tuple[SampleRef, SampleLease] | None = None

    def receive(self, message: SampleRef) -> Tensor:
        lease = self._reader.open(message, layout_hash=LAYOUT.hash, verify=self._verify)
        self._open = (message, lease)
        return lease.sample.features["h"]

    def release(self) -> None:
        if self._open is not None:
            ref, lease = self._open
            lease.release()
            self._reader.ack(ref)
            self._open = None


class FileProducer:
    """As vLLM's connector does: one file per sample in a memory file system."""

    def __init__(self, sample: Sample) -> None:
        self._features = dict(sample.features)
        self._folder = tempfile.TemporaryDirectory(dir="/dev/shm")
        self._paths = (f"{self._folder.name}/{i}.safetensors" for i in itertools.count())
        self.handle = None

    def prepare(self) -> None:
        pass

    def send(self) -> str:
        path = next(self._paths)
        save_file(self._features, path)
        return path

    def recover(self) -> None:
        pass


class FileConsumer:
    def __init__(self, handle: None) -> None:
        self._path: str | None = None

    def receive(self, message: str) -> Tensor:
        self._path = message
        return load_file(message)["h"]

    def release(self) -> None:
        if self._path is not None:
            Path(self._path).unlink()
            self._path = None


class QueueProducer:
    def __init__(self, sample: Sample) -> None:
        self._feature = sample.features["h"]
        self.handle = torch.multiprocessing.get_context("spawn").Queue()

    def prepare(self) -> None:
        # Without a new tensor the memory that an earlier round moved into shared memory is reused.
        self._fresh = self._feature.clone()

    def send(self) -> None:
        self.handle.put(self._fresh)

    def recover(self) -> None:
        del self._fresh


class QueueConsumer:
    def __init__(self, handle: Any) -> None:
        self._queue = handle

    def receive(self, message: None) -> Tensor:
        tensor = self._queue.get(timeout=TIMEOUT_S)
        assert isinstance(tensor, Tensor)
        return tensor

    def release(self) -> None:
        pass


class CopyProducer:
    def __init__(self, sample: Sample) -> None:
        self._feature = sample.features["h"]
        self._copy = torch.zeros_like(self._feature)
        self.handle = None

    def prepare(self) -> None:
        pass

    def send(self) -> int:
        self._copy.copy_(self._feature)
        return touch(self._copy)

    def recover(self) -> None:
        pass


WAYS: dict[str, tuple[Callable[[Sample], Producer], Callable[[Any], Consumer] | None]] = {
    "memcpy": (CopyProducer, None),
    "specforge_ext": (lambda s: ShmProducer(s, checksum=True), ShmConsumer),
    "specforge_ext/no-checksum": (lambda s: ShmProducer(s, checksum=False), ShmConsumer),
    "specforge_ext/in-place": (lambda s: InPlaceProducer(s, checksum=False), ShmConsumer),
    "safetensors-file": (FileProducer, FileConsumer),
    "torch-multiprocessing": (QueueProducer, QueueConsumer),
}


def consume(pipe: Connection, mib: int, handles: dict[str, Any]) -> None:
    """The other process: answers every message with when it had read it, and its CPU seconds."""
    torch.set_num_threads(1)
    wanted = make_sample(mib).features["h"].view(torch.int16)
    meter = PeakMeter(torch.device("cpu"))
    consumers = {name: WAYS[name][1](handle) for name, handle in handles.items()}  # type: ignore[misc]
    checked = dict.fromkeys(handles, False)
    cpu = time.process_time()
    pipe.send("ready")
    while (order := pipe.recv()) is not None:
        name, message = order
        feature = consumers[name].receive(message)
        viewed = time.perf_counter()
        total = touch(feature)
        end = time.perf_counter()
        if not checked[name]:
            if not torch.equal(feature.view(torch.int16), wanted):
                raise AssertionError(f"{name}: other bytes came than were sent")
            checked[name] = True
        del feature
        consumers[name].release()
        before, cpu = cpu, time.process_time()
        pipe.send((viewed, end, cpu - before, total))
    pipe.send(meter.bytes())


class Pair:
    """The two processes, with some ways set up between them; `close` tells their peak memory."""

    def __init__(self, mib: int, names: list[str]) -> None:
        sample = make_sample(mib)
        self._total = touch(sample.features["h"])
        self._meter = PeakMeter(torch.device("cpu"))
        self._producers = {name: WAYS[name][0](sample) for name in names}
        handles = {n: p.handle for n, p in self._producers.items() if WAYS[n][1] is not None}
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=consume, args=(theirs, mib, handles), daemon=True)
        self._process.start()
        theirs.close()
        if self._receive() != "ready":
            raise RuntimeError("the consumer did not start")

    def round(self, name: str) -> tuple[float, float, float]:
        """Seconds of one delivery: until the tensor was there, until it was read, CPU."""
        producer = self._producers[name]
        producer.prepare()
        cpu = time.process_time()
        start = time.perf_counter()
        message = producer.send()
        if WAYS[name][1] is None:
            viewed = end = time.perf_counter()
            other_cpu, total = 0.0, message
        else:
            self._pipe.send((name, message))
            viewed, end, other_cpu, total = self._receive()
        producer.recover()
        if total != self._total:
            raise AssertionError(f"{name}: other bytes came than were sent")
        return viewed - start, end - start, time.process_time() - cpu + other_cpu

    def close(self) -> int:
        """Ends the other process; peak memory of both, stores included, bytes."""
        self._pipe.send(None)
        peak_bytes = self._meter.bytes() + int(self._receive())
        self._process.join(TIMEOUT_S)
        return peak_bytes

    def _receive(self) -> Any:
        if not self._pipe.poll(TIMEOUT_S):
            raise TimeoutError(f"waited {TIMEOUT_S} s for the consumer process")
        return self._pipe.recv()


def measure(mib: int, rounds: int) -> dict[str, tuple[Timing, float]]:
    """By way: the timing, and the median seconds until the consumer held the tensor."""
    pair = Pair(mib, list(WAYS))
    results: dict[str, list[tuple[float, float, float]]] = {name: [] for name in WAYS}
    for index in range(-2, rounds):
        for name in WAYS:
            result = pair.round(name)
            if index >= 0:
                results[name].append(result)
    pair.close()
    return {name: summarize(values) for name, values in results.items()}


def summarize(values: list[tuple[float, float, float]]) -> tuple[Timing, float]:
    viewed, wall, cpu = zip(*values, strict=True)
    first, _, third = statistics.quantiles(wall, n=4, method="inclusive")
    timing = Timing(statistics.median(wall), third - first, statistics.median(cpu), len(values))
    return timing, statistics.median(viewed)


def deliver_twice(mib: int, name: str) -> int:
    """Peak memory of both processes above their imports and their own copy of the sample."""
    pair = Pair(mib, [name])
    for _ in range(2):
        pair.round(name)
    return pair.close()


def main() -> None:
    script = BenchScript(__doc__ or "")
    torch.set_num_threads(1)
    if script.peak is not None:
        case, name = script.peak
        print(f'{{"peak_bytes": {deliver_twice(int(case.removesuffix(" MiB")), name)}}}')
        return
    report = Report("transfer", baseline="memcpy")
    for mib, rounds in [(64, 9)] if script.quick else [(1, 41), (64, 21), (256, 7)]:
        case = f"{mib} MiB"
        timings = measure(mib, rounds)
        floor, _ = timings["memcpy"]
        for name, (timing, view_s) in timings.items():
            gigabytes = (mib << 20) / 1e9
            in_place = name.endswith("in-place")
            report.add(
                case,
                name,
                timing,
                None if script.quick else script.peak_bytes(case, name),
                view_s=view_s,
                gb_per_s=None if in_place else gigabytes / timing.median_s,
                cpu_s_per_gb=timing.cpu_s / gigabytes,
                share_of_floor=None if in_place else floor.median_s / timing.median_s,
            )
    if script.json is not None:
        report.write(script.json)


if __name__ == "__main__":
    main()
