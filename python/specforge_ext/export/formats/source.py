"""Finds out which format a directory has, and reads it."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from specforge_ext.export.checkpoint import key_problems, read_config, read_tensors, value_problems
from specforge_ext.export.formats import dflash, eagle3, settings, speculators
from specforge_ext.export.formats.portable import Format, Portable, Target, mapping
from specforge_ext.methods import METHODS, Method
from specforge_ext.methods._export import OWN_KEY
from specforge_ext.methods._fused.export import LAYER_IDS_KEY
from specforge_ext.methods.eagle3.export import EAGLE_KEY

FORMATS = ("sglang", "vllm", "speculators", "specforge", "modelopt")
TRAINING_STATE = "training_state.pt"
"""SpecForge's checkpoint of a training run; the draft is its `draft_state_dict`."""


def read_files(
    source: Path, config: Path | None = None
) -> tuple[Mapping[str, object], dict[str, Tensor]]:
    """config.json and tensors of a directory, or of a SpecForge training_state.pt.

    config: the draft's config.json beside a training_state.pt. ValueError where one of them is not
    there or cannot be read.
    """
    state = source if source.is_file() else source / TRAINING_STATE
    if not state.is_file():
        if config is not None:
            raise ValueError(
                f"--config: wanted none beside a directory with its own config.json, got {config}"
            )
        return read_config(source), read_tensors(source)
    if config is None:
        raise ValueError(f"--config: wanted the draft's config.json, which {state} does not hold")
    try:
        held = torch.load(state, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{state}: wanted tensors and plain values only: {error}") from None
    tensors = held.get("draft_state_dict") if isinstance(held, dict) else None
    if not isinstance(tensors, dict):
        raise ValueError(f"{state}: wanted SpecForge's draft_state_dict, found none")
    settled = read_config(config.parent, name=config.name)
    settled.setdefault(OWN_KEY, {"format": "specforge"})
    return settled, cast("dict[str, Tensor]", tensors)


def interpret(
    config: Mapping[str, object],
    tensors: Mapping[str, Tensor],
    *,
    form: str | None = None,
    target: Target | None = None,
    ignored: tuple[str, ...] = (),
    notes: list[str] | None = None,
) -> tuple[str, Portable]:
    """The format and the draft.

    form: one of FORMATS, None to find out. ignored: keys of config.json that the caller knows to
    change nothing. notes: gets what was changed to fit the target. ValueError lists or names what
    is wrong, and asks for the format where the files fit several that mean different things.
    """
    form = form or _form(config)
    draft = module_of(_method(config)).read(config, tensors, form, target, ignored)
    _check(draft)
    if target is not None:
        fitting = dict(draft.config)
        settings.check_target(fitting, target, [] if notes is None else notes)
        draft = replace(draft, config=fitting)
    return form, draft


def module_of(method: str) -> Format:
    """The formats of a method."""
    return {"eagle3": eagle3, "dflash": dflash}[method]


def _method(config: Mapping[str, object]) -> str:
    kind = config.get(speculators.KIND)
    own = mapping(config, OWN_KEY).get("method")
    for name, architectures in (
        ("eagle3", eagle3.ARCHITECTURES),
        ("dflash", dflash.ARCHITECTURES),
    ):
        named = kind == name
        if kind is None:
            named = config.get("architectures") in [[a] for a in architectures]
        if named and own in (None, name):
            return name
    said = own or kind or config.get("architectures")
    raise ValueError(f"config.json: wanted an EAGLE-3 or a DFlash draft, got {said!r}")


def _form(config: Mapping[str, object]) -> str:
    """ValueError, with the question to answer, where the files could be of several formats."""
    if speculators.KIND in config:
        return "speculators"
    own = config.get(OWN_KEY)
    section = mapping(config, EAGLE_KEY)
    if isinstance(own, Mapping):
        said = own.get("format")
        if said in FORMATS:
            return cast(str, said)
        return "sglang" if LAYER_IDS_KEY in section else "vllm"
    if config.get("architectures") in [[n] for n in dflash.ARCHITECTURES]:
        return "sglang"  # the same in all but speculators
    if section.keys() & eagle3.MODELOPT_MARKS:
        return "modelopt"
    for key, why in (
        (LAYER_IDS_KEY, "are counted from 0 by some and from 1 by others"),
        ("norm_output", "is another thing in SpecForge than in servers"),
    ):
        if config.get(key) is not None or section.get(key) is not None:
            raise ValueError(
                f"--from: wanted one of {', '.join(FORMATS)}, since the checkpoint does not tell "
                f"which it is, and {key} {why}"
            )
    return "vllm"


def _check(draft: Portable) -> None:
    """As `read_strict`, of what the draft is in our own export."""
    factory = METHODS.get(draft.method)
    method: Method = factory(factory.Config())
    problems = key_problems(draft.tensors, method.schema(draft.config))
    problems += value_problems(draft.tensors)
    if draft.embedding is not None:
        rows = {"embed_tokens.weight": draft.embedding}
        shape = (cast(int, draft.config["vocab_size"]), cast(int, draft.config["hidden_size"]))
        problems += key_problems(rows, {"embed_tokens.weight": (shape, None)})
        problems += value_problems(rows)
    if problems:
        raise ValueError(f"{len(problems)} problem(s): " + "; ".join(problems))
