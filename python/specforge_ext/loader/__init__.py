"""Order, stream, collate: from sample refs to packed batches."""

from specforge_ext.loader.order import GlobalStep, OrderConfig, global_steps, micro_batches, share
from specforge_ext.loader.source import Delivery, FeatureLink, Skipped
from specforge_ext.loader.stream import StepData, Stream, StreamConfig, TooManySkipped
from specforge_ext.loader.union import Names, Union, unite, view

__all__ = [
    "Delivery",
    "FeatureLink",
    "GlobalStep",
    "Names",
    "OrderConfig",
    "Skipped",
    "StepData",
    "Stream",
    "StreamConfig",
    "TooManySkipped",
    "Union",
    "global_steps",
    "micro_batches",
    "share",
    "unite",
    "view",
]
