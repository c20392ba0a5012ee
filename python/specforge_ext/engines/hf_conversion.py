"""Tensors that transformers' modules hold in another form than files do, e.g. experts as one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from specforge_ext.engines.hf_model import no_progress_bar


def converted(
    model: Any, names: Iterable[str], read: Callable[[str], Tensor], path: str
) -> Tensor | None:
    """The model's parameter `path`, made of the files' tensors by transformers' own rules for its
    architecture; None if there is no rule, or nothing to make it of.

    model: on the meta device, and left so. names: of all tensors in the files; `read` is asked for
    those alone that the parameter is made of.
    """
    # The rules came with transformers 5, and so did the modules that need them.
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig
    except ModuleNotFoundError:
        return None
    rules: list[Any] = get_model_conversion_mapping(model)
    known: dict[str, Tensor] = model.state_dict()
    sources = [name for name in names if path in _made_of(name, rules, known, model)]
    if not sources:
        return None
    owner, _, entry = path.rpartition(".")
    held: Mapping[str, Any] = model.get_submodule(owner)._parameters
    before = dict(held)
    try:
        with no_progress_bar():
            convert_and_load_state_dict_in_model(
                model,
                {name: read(name) for name in sources},
                LoadStateDictConfig(weight_mapping=rules, dtype=known[path].dtype),
            )
        loaded: Tensor = held[entry].detach()
    finally:
        model.get_submodule(owner)._parameters.update(before)
    return None if loaded.is_meta else loaded


def _made_of(
    name: str, rules: Sequence[Any], known: dict[str, Tensor], model: Any
) -> tuple[str, ...]:
    """The parameters that transformers makes of a file's tensor."""
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    first, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, known)
    for rule in converters:
        if pattern in rule.source_patterns:
            # A tensor that several are made of is named after the first of them.
            return tuple(first.replace(rule.target_patterns[0], t, 1) for t in rule.target_patterns)
    return (first,)
