"""Base of all config models, recipe files and their overrides.

Each component owns its config model beside its code; this module knows none of them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from specforge_ext.registry import unknown_name


class Config(BaseModel):
    """Frozen, unknown keys forbidden, numbers finite. Units are part of the names of the fields."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _no_flag_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        """YAML reads `yes` as true, which would count as 1."""
        field = cls.model_fields[str(info.field_name)]
        kinds = _kinds(field.annotation)
        if isinstance(value, bool) and kinds & {int, float} and not kinds & {bool, Any}:
            raise ValueError("wanted neither true nor false")
        return value


def _kinds(annotation: Any) -> set[Any]:
    """The types that an annotation is made of."""
    parts = get_args(annotation)
    return {kind for part in parts for kind in _kinds(part)} if parts else {annotation}


def _word(value: object) -> object:
    return {False: "off", True: "on"}[value] if isinstance(value, bool) else value


Switch = Annotated[Literal["auto", "on", "off"], BeforeValidator(_word)]
"""Of a field that YAML, and so an override, would make a boolean of: on and off are words."""

ConfigT = TypeVar("ConfigT", bound=BaseModel)


def parse(model: type[ConfigT], data: dict[str, Any], *, where: str = "") -> ConfigT:
    """Validate `data`; ValueError names every bad key, what was wanted and what came.

    where: prefix of the keys in messages, e.g. "trainer".
    """
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise ValueError("; ".join(_explain(model, e, where) for e in error.errors())) from None


def parse_json(model: type[ConfigT], text: str, *, where: str = "") -> ConfigT:
    """As `parse`, of JSON."""
    try:
        data = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{where}: not valid JSON: {error}") from None
    if not isinstance(data, dict):
        raise ValueError(f"{where}: wanted an object, got {type(data).__name__}")
    return parse(model, data, where=where)


def defaults(model: type[BaseModel]) -> dict[str, Any]:
    """The defaults of a model's fields as JSON values; fields that must be given are left out."""
    return model.model_construct().model_dump(mode="json")


def _explain(model: type[BaseModel], error: Any, where: str) -> str:
    path = [str(p) for p in error["loc"]]
    key = ".".join([where, *path] if where else path)
    if error["type"] == "extra_forbidden":
        owner = _owner(model, path[:-1])
        known = list(owner.model_fields) if owner else []
        return f"{key}: {unknown_name('key', path[-1], known)}"
    if error["type"] == "missing":
        return f"{key}: required, but not given"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error" and ", got " in message:  # of a section: too much to repeat
        return f"{key}: {message}"
    return f"{key}: {message}, got {error['input']!r}"


def _owner(model: type[BaseModel], path: list[str]) -> type[BaseModel] | None:
    """The config model that holds the last key of a path."""
    for name in path:
        info = model.model_fields.get(name)
        annotation = info.annotation if info else None
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return None
        model = annotation
    return model


def read_yaml(path: Path) -> dict[str, Any]:
    """A recipe file as plain data. ValueError if it is not a mapping, or has a key twice."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: wanted YAML in UTF-8: {error}") from None
    data = _yaml(text, where=str(path))
    if not isinstance(data, dict):
        raise ValueError(f"{path}: wanted a mapping at the top, got {type(data).__name__}")
    return data


def override(data: dict[str, Any], assignments: list[str]) -> dict[str, Any]:
    """Apply `key.sub=value` (the value is YAML) to nested mappings; returns a new mapping."""
    out = _copy(data)
    for assignment in assignments:
        key, separator, value = assignment.partition("=")
        if not separator or not key:
            raise ValueError(f"override {assignment!r}: wanted key.sub=value")
        *parents, last = key.split(".")
        node = out
        for name in parents:
            child = node.setdefault(name, {})
            if not isinstance(child, dict):
                raise ValueError(f"override {assignment!r}: {name!r} is a value, not a section")
            node = child
        node[last] = _yaml(value, where=f"override {assignment!r}")
    return out


class _NoKeyTwice(yaml.SafeLoader):
    """YAML forbids equal keys in a mapping, PyYAML takes the last of them without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"the key {key.value!r} is given twice", problem_mark=key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _yaml(text: str, *, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_NoKeyTwice)
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{where}: not valid YAML: {reason}") from None


def _copy(data: dict[str, Any]) -> dict[str, Any]:
    return {k: _copy(v) if isinstance(v, dict) else v for k, v in data.items()}
