"""Cached forward through transformers itself, for what the lean forward does not know."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import DynamicCache

from specforge_ext.engines.capture import capture
from specforge_ext.engines.columns import ColumnOutput
from specforge_ext.engines.hf_model import TargetModel


def check_attention(target: TargetModel) -> None:
    """ValueError if the model mixes tokens otherwise than by attention: that has no columns."""
    kinds = set(getattr(target.config, "layer_types", None) or ())
    other = kinds - {"full_attention", "sliding_attention"}
    if other:
        raise ValueError(
            f"model {target.spec.name!r}: wanted attention layers for cached decoding, "
            f"got {', '.join(sorted(other))}"
        )


class TransformersModel:
    """ColumnModel around the base model with a DynamicCache and explicit masks."""

    def __init__(self, target: TargetModel) -> None:
        check_attention(target)
        self._target = target
        self._window = _sliding_window(target)
        self._cache = DynamicCache()

    def start(self, num_rows: int, capacity: int) -> None:
        self._cache = DynamicCache()

    def append(
        self,
        input_ids: Tensor,
        positions: Tensor,
        *,
        mask: Tensor | None,
        stream_ids: tuple[int, ...] = (),
    ) -> ColumnOutput:
        columns = self._cache.get_seq_length() + input_ids.shape[1]
        if self._window is not None and columns > self._window:
            raise ValueError(
                f"model {self._target.spec.name!r}: wanted at most sliding_window = {self._window} "
                f"columns in cached decoding, got {columns}"
            )
        with capture(self._target.layers, stream_ids) as streams:
            last_hidden = self._target.last_hidden(
                input_ids,
                position_ids=positions,
                attention_mask=None if mask is None else self._additive(mask),
                past_key_values=self._cache,
                use_cache=True,
            )
        return ColumnOutput(last_hidden, streams)

    def select(self, rows: Tensor) -> None:
        self._cache.batch_select_indices(rows)

    def _additive(self, mask: Tensor) -> Tensor:
        """[B, 1, n, C] of the model's dtype: the form that every attention implementation takes."""
        out = torch.zeros(mask.shape, dtype=self._target.dtype, device=mask.device)
        return out.masked_fill_(~mask, torch.finfo(out.dtype).min)[:, None]


def _sliding_window(target: TargetModel) -> int | None:
    """The window in effect; below it, sliding attention is full attention."""
    if not getattr(target.config, "use_sliding_window", True):
        return None
    return getattr(target.config, "sliding_window", None)
