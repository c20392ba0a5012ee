"""Residual streams of chosen layers, and the features of a layout made of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from specforge_ext.copies import copied
from specforge_ext.records import DTYPES, FeatureLayout, FeatureSpec, TargetSpec


def check_layout(layout: FeatureLayout, spec: TargetSpec) -> None:
    """ValueError if the target cannot give the features of the layout."""
    for feature in layout.features:
        wanted = len(feature.layer_ids) * spec.hidden_size
        if feature.width != wanted:
            raise ValueError(
                f"layout.{feature.name}.width: wanted {wanted} ({len(feature.layer_ids)} layers of "
                f"{spec.hidden_size}) for {spec.name!r}, got {feature.width}"
            )
        bad = [i for i in feature.layer_ids if not 0 <= i <= spec.num_layers]
        if bad:
            raise ValueError(
                f"layout.{feature.name}.layer_ids: wanted 0..{spec.num_layers} for {spec.name!r}, "
                f"got {bad}"
            )
        if feature.final_norm and feature.layer_ids != (spec.num_layers,):
            raise ValueError(
                f"layout.{feature.name}.final_norm: wanted layer_ids ({spec.num_layers},), "
                f"got {feature.layer_ids}"
            )


def stream_ids(layout: FeatureLayout) -> tuple[int, ...]:
    """Ids whose raw residual stream is needed: those of the features without the final norm."""
    raw = (spec.layer_ids for spec in layout.features if not spec.final_norm)
    return tuple(sorted({i for ids in raw for i in ids}))


@contextmanager
def capture(layers: Sequence[nn.Module], ids: tuple[int, ...]) -> Iterator[dict[int, Tensor]]:
    """Within the context a forward fills the mapping: id k -> [B, n, H], the stream after k layers.

    Id 0 is the input of the first layer, which is the embedding with whatever the model does to it.
    """
    streams: dict[int, Tensor] = {}

    def enter(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        streams[0] = args[0] if args else kwargs["hidden_states"]

    def leave(index: int, output: Tensor | tuple[Tensor, ...]) -> None:
        streams[index] = output if isinstance(output, Tensor) else output[0]

    handles = []
    for i in ids:
        if i == 0:
            handles.append(layers[0].register_forward_pre_hook(enter, with_kwargs=True))
        else:
            handles.append(
                layers[i - 1].register_forward_hook(lambda _m, _a, out, i=i: leave(i, out))
            )
    try:
        yield streams
    finally:
        for handle in handles:
            handle.remove()


def assemble(
    layout: FeatureLayout, streams: Mapping[int, Tensor], last_hidden: Tensor
) -> dict[str, Tensor]:
    """Features of the layout from streams [..., H] and the state after the final norm [..., H].

    Each is [..., width], contiguous, of the layout's dtype, and owns its memory.
    """
    return {spec.name: _join(spec, streams, last_hidden) for spec in layout.features}


def fill(
    layout: FeatureLayout,
    streams: Mapping[int, Tensor],
    last_hidden: Tensor,
    out: Mapping[str, Tensor],
) -> None:
    """The features of `assemble`, written to `out`: each layer to its columns, converted on the
    way.

    Where `out` is on the host and the streams are not, this only begins: the current stream of
    their device says when it is done. Between devices torch copies nothing but whole tensors of one
    dtype without a temporary of its own, so that there layers are joined before.
    """
    for spec in layout.features:
        target = out[spec.name]
        parts = _parts(spec, streams, last_hidden)
        if target.device != parts[0].device and not _is_whole(parts, target):
            parts = [_join(spec, streams, last_hidden)]
            copied("gather", parts[0].nbytes)
        columns = target.chunk(len(parts), dim=-1)
        for column, part in zip(columns, parts, strict=True):
            column.copy_(part, non_blocking=True)
        copied("engine", target.nbytes)


def _is_whole(parts: Sequence[Tensor], target: Tensor) -> bool:
    return len(parts) == 1 and parts[0].dtype == target.dtype and parts[0].is_contiguous()


def _parts(
    spec: FeatureSpec, streams: Mapping[int, Tensor], last_hidden: Tensor
) -> Sequence[Tensor]:
    return [last_hidden] if spec.final_norm else [streams[i] for i in spec.layer_ids]


def _join(spec: FeatureSpec, streams: Mapping[int, Tensor], last_hidden: Tensor) -> Tensor:
    parts = _parts(spec, streams, last_hidden)
    return torch.cat([part.to(DTYPES[spec.dtype]) for part in parts], dim=-1)
