"""Features written straight into a store: room for a request's samples, all of them or none."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Self

from torch import Tensor

from specforge_ext.records import FeatureLayout, Prompt, Sample, SampleRef
from specforge_ext.store.base import Reservation, ReservingWriter, StoreWriter


def reserving(writer: StoreWriter) -> ReservingWriter | None:
    """The writer, if features can be written into its memory; else they have to be `put`."""
    return writer if isinstance(writer, ReservingWriter) and writer.writes_in_place else None


class Reservations:
    """Room for some samples, taken in their order when the context is entered.

    One deadline holds for all of them; when it ends, or another error comes, none stays. Leaving
    the context gives back what was not published; leaving it by an exception takes back what was
    published too, for nobody has heard of it.
    """

    def __init__(
        self,
        writer: ReservingWriter,
        prompts: Sequence[Prompt],
        layout: FeatureLayout,
        *,
        timeout_s: float,
    ) -> None:
        ids = [prompt.sample_id for prompt in prompts]
        if len(set(ids)) != len(ids):
            twice = next(i for i in ids if ids.count(i) > 1)
            raise ValueError(f"request: wanted each sample once, got {twice!r} {ids.count(twice)}x")
        self._writer = writer
        self._prompts = prompts
        self._layout = layout
        self._timeout_s = timeout_s
        self._open: dict[str, Reservation] = {}
        self._published: list[SampleRef] = []

    def __enter__(self) -> Self:
        """StoreFull at once if they could never lie in the store together; TransferTimeout."""
        self._writer.expect_room(self._prompts, self._layout)
        deadline = time.monotonic() + self._timeout_s
        try:
            for prompt in self._prompts:
                self._open[prompt.sample_id] = self._writer.reserve(
                    prompt, self._layout, timeout_s=max(0.0, deadline - time.monotonic())
                )
        except BaseException:
            self._abort_all()
            raise
        return self

    def views(self, prompt: Prompt) -> Mapping[str, Tensor]:
        """Where the prompt's features are to be written; for `into` of an engine."""
        return self._reservation(prompt).features

    def publish(self, sample: Sample) -> SampleRef:
        """Its features are written. ValueError if they are other tensors than the views."""
        views = self._reservation(sample.prompt).features
        other = [name for name, view in views.items() if sample.features.get(name) is not view]
        if other or len(views) != len(sample.features):
            raise ValueError(
                f"sample {sample.prompt.sample_id!r}: wanted features {sorted(views)} written in "
                f"place, got other tensors for {other or sorted(sample.features)}"
            )
        self._published.append(self._open.pop(sample.prompt.sample_id).publish())
        return self._published[-1]

    def abort(self, prompt: Prompt) -> None:
        """It is not going to be written, or must not be read."""
        self._reservation(prompt)
        self._open.pop(prompt.sample_id).abort()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._abort_all()
        if error is not None:
            for ref in self._published:
                self._writer.abort(ref)

    def _reservation(self, prompt: Prompt) -> Reservation:
        if prompt.sample_id not in self._open:
            raise ValueError(
                f"sample {prompt.sample_id!r}: wanted one that is reserved, got one of no, or of "
                "an ended, reservation"
            )
        return self._open[prompt.sample_id]

    def _abort_all(self) -> None:
        while self._open:
            self._open.popitem()[1].abort()


class ForwardedReservation:
    """A reservation in memory that another store looks after; `published` gives its ref a name."""

    def __init__(self, inner: Reservation, published: Callable[[SampleRef], SampleRef]) -> None:
        self._inner = inner
        self._published = published

    @property
    def features(self) -> Mapping[str, Tensor]:
        return self._inner.features

    def publish(self) -> SampleRef:
        return self._published(self._inner.publish())

    def abort(self) -> None:
        self._inner.abort()
