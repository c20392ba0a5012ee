"""Bad values in the config of any method: an error that names the key and what came."""

from __future__ import annotations

import math
import re
from typing import Any, get_args

import pytest

from specforge_ext.config import Config, parse
from specforge_ext.methods import METHODS


def kinds(annotation: Any) -> set[Any]:
    """The types that a field's annotation is made of."""
    return {annotation} | {kind for part in get_args(annotation) for kind in kinds(part)}


def bad_values(annotation: Any) -> list[Any]:
    """Of numbers none may be negative, of lists none may be a word."""
    found = kinds(annotation)
    numbers: list[Any] = [-1, True, "many", math.nan, math.inf, -math.inf]
    if tuple in {getattr(kind, "__origin__", None) for kind in found}:
        return ["many", True, 3, [1.5]]
    if int in found or float in found:
        return numbers + ([1.5] if float not in found else [])
    if bool in found:
        return [-1, "perhaps", 1.5]
    return ["no such word", True, 3]


CASES = [
    (name, field, value)
    for name in METHODS
    for field, info in METHODS.get(name).Config.model_fields.items()
    for value in bad_values(info.annotation)
]


@pytest.mark.parametrize(("name", "field", "value"), CASES)
def test_bad_values_are_refused_by_name(name: str, field: str, value: Any) -> None:
    model: type[Config] = METHODS.get(name).Config
    came = re.escape(repr(value[0] if isinstance(value, list) else value))
    with pytest.raises(ValueError, match=rf"method\.{field}\b.*, got {came}"):
        parse(model, {field: value}, where="method")


COUNTS = {
    "eagle3": ("ttt_length", "num_layers", "draft_vocab_size", "top_k", "temperature", "num_heads"),
    "peagle": ("num_depths", "num_layers", "down_sample_ratio", "temperature", "head_dim"),
    "dflash": ("block_size", "num_anchors", "num_layers", "sliding_window", "gamma"),
    "domino": ("gru_hidden_dim", "emb_dim", "gamma", "num_kv_heads"),
    "dspark": ("markov_rank", "l1_weight", "intermediate_size"),
    "mtp": ("num_steps", "step_decay", "temperature", "kl_scale"),
}


@pytest.mark.parametrize(
    ("name", "field"), [(n, f) for n, fields in COUNTS.items() for f in fields]
)
def test_zero_is_refused_where_it_means_nothing(name: str, field: str) -> None:
    with pytest.raises(ValueError, match=rf"method\.{field}: .*greater than .*, got 0"):
        parse(METHODS.get(name).Config, {field: 0}, where="method")


def test_a_flag_is_no_number_and_a_number_no_flag() -> None:
    model = METHODS.get("eagle3").Config
    with pytest.raises(
        ValueError, match=r"method\.num_layers: .*wanted neither true nor false, got True"
    ):
        parse(model, {"num_layers": True}, where="method")
    assert parse(model, {"fc_norm": True}).fc_norm is True
