"""The producer and consumer processes of `transfer.py`, and the one that tells them what to do.

Each producer has a pipe to each consumer, for messages about samples, and each process one to the
coordinator, which waits while they work. In a round of a way, every producer delivers a sample to
every consumer. The clocks of all processes are one (CLOCK_MONOTONIC).
"""

from __future__ import annotations

import gc
import multiprocessing
import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

from common import PeakMeter
from transfer_ways import (
    TIMEOUT_S,
    Consumer,
    Producer,
    Shared,
    Tensors,
    Way,
    count_equal_bytes,
    make_sample,
    tensors_of,
    touch,
)


class DeliveryError(AssertionError):
    """Other bytes came than were sent."""


@dataclass(frozen=True)
class Cost:
    """CPU seconds and page faults of one process, or of several."""

    cpu_s: float
    minor_faults: int
    major_faults: int

    @staticmethod
    def now() -> Cost:
        usage = resource.getrusage(resource.RUSAGE_SELF)
        return Cost(time.process_time(), usage.ru_minflt, usage.ru_majflt)

    def since(self, before: Cost) -> Cost:
        return Cost(
            self.cpu_s - before.cpu_s,
            self.minor_faults - before.minor_faults,
            self.major_faults - before.major_faults,
        )


@dataclass(frozen=True)
class Arrival:
    """When a consumer held the sample, had read it and had let go of it.

    equal_bytes: compared and found equal, where that was asked for; None if they were not.
    """

    viewed: float
    released: float
    equal_bytes: int | None


@dataclass(frozen=True)
class Delivery:
    """Seconds of one sample: from the start until it was a view, and until it was let go of."""

    view_s: float
    whole_s: float


@dataclass(frozen=True)
class Round:
    """wall_s: from the first start to the last release. cost: of all processes."""

    deliveries: tuple[Delivery, ...]
    wall_s: float
    cost: Cost
    equal_bytes: int


class Looker:
    """Reads a byte of every page of what comes, and compares all of it when asked."""

    def __init__(self, wanted: Tensors) -> None:
        self._wanted = wanted
        self._sum = touch(wanted)

    def look(self, consumer: Consumer, message: Any, *, compare: bool) -> Arrival:
        tensors = consumer.receive(message)
        viewed = time.perf_counter()
        equal = 0 if touch(tensors) == self._sum else None
        if compare:
            equal = count_equal_bytes(tensors, self._wanted)
        del tensors
        consumer.release()
        return Arrival(viewed, time.perf_counter(), equal)


class Here:
    """The consuming end of a way within one process."""

    def receive(self, message: Tensors) -> Tensors:
        return message

    def release(self) -> None:
        pass

    def close(self) -> None:
        pass


class ProducerProcess:
    """What it answers to the coordinator's orders, which are its public methods."""

    def __init__(self, mib: int, pipes: list[Connection], links: dict[str, list[Any]]) -> None:
        self._sample = make_sample(mib)
        self._looker = Looker(tensors_of(self._sample))
        self._pipes = pipes
        self._links = links
        self._producers: dict[str, Producer] = {}
        self._meter = PeakMeter(torch.device("cpu"))
        self._before = Cost.now()

    def open(self, name: str, make: Callable[..., Producer]) -> tuple[list[Any], str]:
        self._meter = PeakMeter(torch.device("cpu"))
        producer = make(self._sample, self._links[name])
        self._producers[name] = producer
        return producer.handles, producer.protocol

    def prepare(self, name: str) -> None:
        self._producers[name].prepare()
        self._before = Cost.now()

    def deliver(
        self, name: str, *, within: bool, raw: bool, compare: bool
    ) -> tuple[list[float], list[Arrival]]:
        """When each delivery began, and how it ended if all is `within` this process."""
        producer = self._producers[name]
        starts: list[float] = []
        arrivals: list[Arrival] = []

        def look(message: Tensors) -> None:
            arrivals.append(self._looker.look(Here(), message, compare=compare))

        for index, pipe in enumerate(self._pipes):
            starts.append(time.perf_counter())
            producer.deliver(index, look if within else pipe.send_bytes if raw else pipe.send)
        return starts, arrivals

    def finish(self, name: str) -> Cost:
        self._producers[name].recover()
        return Cost.now().since(self._before)

    def peak_bytes(self) -> int:
        return self._meter.bytes()

    def close(self) -> None:
        for producer in self._producers.values():
            producer.close()


class ConsumerProcess:
    """As ProducerProcess. Consumers have one end of a way for each producer."""

    def __init__(self, mib: int, pipes: list[Connection], links: dict[str, list[Any]]) -> None:
        self._looker = Looker(tensors_of(make_sample(mib)))
        self._pipes = pipes
        self._links = links
        self._consumers: dict[str, list[Consumer]] = {}
        self._meter = PeakMeter(torch.device("cpu"))
        self._before = Cost.now()

    def open(self, name: str, make: Callable[..., Consumer], handles: list[Any]) -> None:
        self._meter = PeakMeter(torch.device("cpu"))
        ends = zip(handles, self._links[name], strict=True)
        self._consumers[name] = [make(handle, link) for handle, link in ends]

    def expect(self) -> None:
        self._before = Cost.now()

    def consume(self, name: str, *, raw: bool, compare: bool) -> tuple[list[Arrival], Cost]:
        """One sample of each producer, as they come; arrivals in the order of the producers. Its
        deadline is the coordinator's."""
        arrivals: dict[int, Arrival] = {}
        waiting = {pipe: index for index, pipe in enumerate(self._pipes)}
        while waiting:
            ready: Sequence[Any] = wait(list(waiting)) if len(waiting) > 1 else list(waiting)
            for pipe in ready:
                index = waiting.pop(pipe)
                consumer = self._consumers[name][index]
                message = pipe.recv_bytes() if raw else pipe.recv()
                arrivals[index] = self._looker.look(consumer, message, compare=compare)
        ordered = [arrivals[index] for index in range(len(self._pipes))]
        return ordered, Cost.now().since(self._before)

    def peak_bytes(self) -> int:
        return self._meter.bytes()

    def close(self) -> None:
        for consumers in self._consumers.values():
            for consumer in consumers:
                consumer.close()


def obey(
    kind: type[ProducerProcess] | type[ConsumerProcess],
    orders: Connection,
    mib: int,
    pipes: list[Connection],
    links: dict[str, list[Any]],
) -> None:
    """What runs in each process: answers orders, (method, arguments), until it is None."""
    torch.set_num_threads(1)
    served = kind(mib, pipes, links)
    gc.freeze()  # collections within the clock should not go through all of torch
    orders.send(None)
    while (order := orders.recv()) is not None:
        method, positional, named = order
        orders.send(getattr(served, method)(*positional, **named))
    served.close()
    orders.send(None)


class Worker:
    """A process, as the coordinator sees it."""

    def __init__(self, name: str, *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._name = name
        self._orders, theirs = context.Pipe()
        kind, *rest = arguments
        self._process = context.Process(target=obey, args=(kind, theirs, *rest), daemon=True)
        self._process.start()
        theirs.close()

    def order(self, method: str, *positional: Any, **named: Any) -> None:
        self._orders.send((method, positional, named))

    def answer(self, what: str) -> Any:
        """TimeoutError after 60 s; RuntimeError if the process has ended."""
        if not self._orders.poll(TIMEOUT_S):
            raise TimeoutError(f"waited {TIMEOUT_S} s for {self._name}: {what}")
        try:
            return self._orders.recv()
        except EOFError:
            self._process.join(TIMEOUT_S)
            code = self._process.exitcode
            raise RuntimeError(f"{self._name} ended with code {code}: {what}") from None

    def ask(self, method: str, *positional: Any, **named: Any) -> Any:
        self.order(method, *positional, **named)
        return self.answer(method)

    def let_end(self) -> None:
        self._orders.send(None)

    def end(self) -> None:
        self.answer("to close")
        self._process.join(TIMEOUT_S)

    def kill(self) -> None:
        self._process.kill()
        self._process.join(TIMEOUT_S)


class Fleet:
    """N producers and M consumers, with the links of some ways between them.

    `kill` it in any case: an error leaves its processes as they are.

    peak_bytes: by way, of all processes, from before it was set up until it had delivered once.
    protocols: by way, what carries the bytes. verified_bytes: by way, how many were compared.
    """

    def __init__(
        self, mib: int, ways: Sequence[Way], shared: Shared, *, producers: int, consumers: int
    ) -> None:
        self._shared = shared
        self.peak_bytes: dict[str, int] = {}
        self.protocols: dict[str, str] = {}
        self.verified_bytes: dict[str, int] = {}
        context = multiprocessing.get_context("spawn")
        pairs = [(p, c) for p in range(producers) for c in range(consumers)]
        pipes = {pair: context.Pipe(duplex=False) for pair in pairs}
        links = {(way.name, *pair): way.link(shared) for way in ways for pair in pairs}
        self._producers = [
            Worker(
                f"producer {p}",
                ProducerProcess,
                mib,
                [pipes[p, c][1] for c in range(consumers)],
                {way.name: [links[way.name, p, c][0] for c in range(consumers)] for way in ways},
            )
            for p in range(producers)
        ]
        self._consumers = [
            Worker(
                f"consumer {c}",
                ConsumerProcess,
                mib,
                [pipes[p, c][0] for p in range(producers)],
                {way.name: [links[way.name, p, c][1] for p in range(producers)] for way in ways},
            )
            for c in range(consumers)
        ]
        for receiving, sending in pipes.values():
            receiving.close()
            sending.close()
        for worker in (*self._producers, *self._consumers):
            worker.answer("to start")

    def open(self, way: Way) -> None:
        """Sets a way up, and lets it deliver once, compared byte for byte: DeliveryError."""
        workers = [*self._producers, *(self._consumers if way.consumer else [])]
        opened = [worker.ask("open", way.name, way.producer) for worker in self._producers]
        self.protocols[way.name] = opened[0][1]
        for index, worker in enumerate(workers[len(self._producers) :]):
            handles = [handles[index] for handles, _ in opened]
            worker.ask("open", way.name, way.consumer, handles)
        self.verified_bytes[way.name] = self.round(way, compare=True).equal_bytes
        self.peak_bytes[way.name] = sum(worker.ask("peak_bytes") for worker in workers)

    def round(self, way: Way, *, compare: bool = False) -> Round:
        """DeliveryError if other bytes came than were sent."""
        receivers = [] if way.consumer is None else self._consumers
        for worker in self._producers:
            worker.ask("prepare", way.name)
        for worker in receivers:
            worker.ask("expect")
        servers = self._server_cpu_s(way)
        for worker in receivers:
            worker.order("consume", way.name, raw=way.raw, compare=compare)
        for worker in self._producers:
            within = way.consumer is None
            worker.order("deliver", way.name, within=within, raw=way.raw, compare=compare)
        delivered = [worker.answer(f"{way.name}, to deliver") for worker in self._producers]
        received = [worker.answer(f"{way.name}, to receive") for worker in receivers]
        costs = [cost for _, cost in received]
        costs += [worker.ask("finish", way.name) for worker in self._producers]
        costs.append(Cost(self._server_cpu_s(way) - servers, 0, 0))
        starts = [start for starts, _ in delivered for start in starts]
        if receivers:
            arrivals = [
                by_producer[p] for p in range(len(delivered)) for by_producer, _ in received
            ]
        else:
            arrivals = [arrival for _, within in delivered for arrival in within]
        return _round(way.name, starts, arrivals, costs)

    def close(self) -> None:
        """All at once: Mooncake takes seconds."""
        workers = [*self._consumers, *self._producers]
        for worker in workers:
            worker.let_end()
        for worker in workers:
            worker.end()

    def kill(self) -> None:
        for worker in (*self._consumers, *self._producers):
            worker.kill()

    def _server_cpu_s(self, way: Way) -> float:
        if way.master is None:
            return 0.0
        tasks = Path(f"/proc/{self._shared.masters[way.master].pid}/task")
        return sum(int(p.read_text().split()[0]) for p in tasks.glob("*/schedstat")) / 1e9


def _round(name: str, starts: list[float], arrivals: list[Arrival], costs: list[Cost]) -> Round:
    equal_bytes = 0
    for arrival in arrivals:
        if arrival.equal_bytes is None:
            raise DeliveryError(f"{name}: other bytes came than were sent")
        equal_bytes += arrival.equal_bytes
    return Round(
        tuple(
            Delivery(arrival.viewed - start, arrival.released - start)
            for start, arrival in zip(starts, arrivals, strict=True)
        ),
        max(arrival.released for arrival in arrivals) - min(starts),
        Cost(
            sum(cost.cpu_s for cost in costs),
            sum(cost.minor_faults for cost in costs),
            sum(cost.major_faults for cost in costs),
        ),
        equal_bytes,
    )
