"""One stream for several drafts: the union of their layouts, and each draft's view of a batch.

A source (layers, final norm, dtype) that several drafts read is stored once. Views copy nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from specforge_ext.loader.stream import StepData, nothing_yet
from specforge_ext.records import FeatureLayout, FeatureSpec, PackedBatch

Names = Mapping[str, str]
"""A draft's own name of a feature -> its name in the stream."""


@dataclass(frozen=True)
class Union:
    """layout: of the stream. names: of each draft, in the order in which they were given."""

    layout: FeatureLayout
    names: Mapping[str, Names]


def unite(layouts: Mapping[str, FeatureLayout]) -> Union:
    """layouts: by draft. One alone keeps its layout as it is.

    A feature keeps the name that its first reader gave it; where that is taken by another source,
    it is `<draft>.<name>`.
    """
    features: dict[FeatureSpec, FeatureSpec] = {}  # by source -> as it is in the stream
    names: dict[str, dict[str, str]] = {}
    for draft, layout in layouts.items():
        names[draft] = {}
        for spec in layout.features:
            source = replace(spec, name="")
            if source not in features:
                taken = {held.name for held in features.values()}
                name = f"{draft}.{spec.name}" if spec.name in taken else spec.name
                features[source] = replace(spec, name=name)
            names[draft][spec.name] = features[source].name
    return Union(FeatureLayout(tuple(features.values())), names)


def view(data: StepData, names: Names) -> StepData:
    """A step as a draft of these names sees it: its own features under its own names.

    What is coming up is not shown: it would be another object than the batch that comes.
    """
    batches = tuple(view_batch(batch, names) for batch in data.micro_batches)
    return replace(data, micro_batches=batches, upcoming=nothing_yet)


def view_batch(batch: PackedBatch, names: Names) -> PackedBatch:
    features = {own: batch.features[shared] for own, shared in names.items()}
    return replace(batch, features=features)
