"""Metric sums of a step: added over micro-batches and ranks, then turned into ratios.

A rank without a micro-batch does not know which metrics the method has. So the ranks agree on a
layout: once, and again when a metric shows up that it does not name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from specforge_ext.records import StepLoss
from specforge_ext.trainer.distributed import World


@dataclass(frozen=True)
class Layout:
    """Shapes of the metrics by name, in the order in which they travel, and their denominators."""

    shapes: Mapping[str, tuple[int, ...]]
    ratios: Mapping[str, str]

    @property
    def numel(self) -> int:
        return sum(shape[0] if shape else 1 for shape in self.shapes.values())


class MetricSums:
    """Gathers the metrics of one step after the other. Shapes are [] or [K]; sums are float64."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._layout = Layout({}, {})
        self._local: dict[str, Tensor] = {}
        self._ratios: dict[str, str] = {}

    @property
    def ratios(self) -> Mapping[str, str]:
        return self._layout.ratios

    def add(self, loss: StepLoss) -> None:
        """The metrics of one micro-batch."""
        for name, value in loss.metrics.items():
            value = value.detach().to(torch.float64)
            held = self._local.get(name)
            self._local[name] = value if held is None else held + value
        self._ratios.update(loss.ratios)

    def is_unknown(self) -> bool:
        """This rank holds something the agreed layout does not name: all ranks must `agree`."""
        layout = self._layout
        named = all(layout.shapes.get(n) == tuple(v.shape) for n, v in self._local.items())
        return not named or any(layout.ratios.get(n) != y for n, y in self._ratios.items())

    def agree(self) -> None:
        """All ranks: take every rank's metrics into the layout. ValueError if they contradict."""
        shapes = dict(self._layout.shapes)
        ratios = dict(self._layout.ratios)
        mine = ({n: tuple(v.shape) for n, v in self._local.items()}, self._ratios)
        for rank, (their_shapes, their_ratios) in enumerate(
            self._world.gather(mine, "layout of the metrics")
        ):
            for name, shape in their_shapes.items():
                known = shapes.setdefault(name, shape)
                if len(shape) > 1 or known != shape:
                    wanted = "[] or [K]" if len(shape) > 1 else str(list(known))
                    raise ValueError(
                        f"StepLoss.metrics[{name!r}] of rank {rank}: wanted {wanted}, "
                        f"got {list(shape)}"
                    )
            ratios.update(their_ratios)
        for name, denominator in ratios.items():
            for key in (name, denominator):
                if key not in shapes:
                    raise ValueError(
                        f"StepLoss.ratios[{name!r}]: wanted one of the metrics "
                        f"{', '.join(sorted(shapes))}, got {key!r}"
                    )
        self._layout = Layout(dict(sorted(shapes.items())), dict(sorted(ratios.items())))

    def reduce(self) -> dict[str, Tensor]:
        """All ranks: the sums over all ranks, float64 on the CPU; starts the next step."""
        if not self._layout.shapes:
            return {}
        parts = [
            self._local[name].reshape(-1).cpu()
            if name in self._local
            else torch.zeros(shape[0] if shape else 1, dtype=torch.float64)
            for name, shape in self._layout.shapes.items()
        ]
        flat = self._world.sum(torch.cat(parts), "sum of the metrics")
        self._local = {}
        self._ratios = {}
        sizes = [shape[0] if shape else 1 for shape in self._layout.shapes.values()]
        return {
            name: part.reshape(shape)
            for (name, shape), part in zip(
                self._layout.shapes.items(), torch.split(flat, sizes), strict=True
            )
        }


def report(
    sums: Mapping[str, Tensor], ratios: Mapping[str, str]
) -> dict[str, float | list[float | None] | None]:
    """Ratios under the names of their numerators, and the sums that belong to no ratio.

    A ratio whose denominator is 0 is None.
    """
    inner = set(ratios) | set(ratios.values())
    out: dict[str, float | list[float | None] | None] = {
        name: value.tolist() for name, value in sums.items() if name not in inner
    }
    for name, denominator in ratios.items():
        if name in sums:
            out[name] = _divide(sums[name], sums[denominator])
    return out


def _divide(above: Tensor, below: Tensor) -> float | list[float | None] | None:
    quotient = above / below
    defined = (below != 0).expand(quotient.shape)
    if quotient.dim() == 0:
        return float(quotient) if bool(defined) else None
    return [
        float(q) if bool(ok) else None for q, ok in zip(quotient.tolist(), defined, strict=True)
    ]
