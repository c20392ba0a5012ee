"""The recipe: all of a run in one file. Each section belongs to the component it configures."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, NonNegativeFloat, model_validator

from specforge_ext.config import Config, ConfigT, override, parse, read_yaml
from specforge_ext.engines import ENGINES
from specforge_ext.loader import OrderConfig, StreamConfig
from specforge_ext.methods import METHODS, LimitsDepth, Method
from specforge_ext.registry import Registry, unknown_name
from specforge_ext.runs.data import SPLITS, DataConfig, prompt_source
from specforge_ext.store import STORES
from specforge_ext.store.base import StoreConfig
from specforge_ext.trainer import TrainerConfig

RECIPES = Path(__file__).resolve().parents[1] / "recipes"


class EvaluateConfig(Config):
    """Real speculative decoding after training; see docs/acceptance.md.

    num_prompts: held-out prompts (0: no evaluation). max_new_tokens: tokens a prompt.
    depth: tokens proposed in a round. temperatures: 0 is greedy.
    baselines: evaluate the untrained draft and a bigram draft too.
    """

    num_prompts: int = Field(default=64, ge=0)
    max_new_tokens: int = 64
    depth: int = Field(default=4, ge=1)
    temperatures: tuple[NonNegativeFloat, ...] = (0.0, 0.8)
    baselines: bool = True
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _has_full_rounds(self) -> Self:
        """Prefill says one token and a full round depth + 1; only full rounds count."""
        if self.max_new_tokens < self.depth + 2:
            raise ValueError(
                f"max_new_tokens: wanted at least depth + 2 = {self.depth + 2}, "
                f"got {self.max_new_tokens}"
            )
        return self


class ExportConfig(Config):
    """dtype: of the exported tensors."""

    dtype: Literal["float32", "bfloat16"] = "bfloat16"


class RunConfig(Config):
    """seed: of the draft's initial weights, the data order and generation.

    num_threads: CPU threads of each trainer rank and of the producer (None: the cores, divided).
    start_timeout_s: deadline for the producer's start. prepare_timeout_s: deadline between two
    signs of progress while it writes the data.
    """

    seed: int = Field(default=0, ge=0)
    num_threads: int | None = Field(default=None, ge=1)
    start_timeout_s: float = Field(default=300.0, gt=0)
    prepare_timeout_s: float = Field(default=600.0, gt=0)


SECTIONS = (
    "name", "output_dir", "run", "engine", "data", "method", "store",
    "order", "stream", "trainer", "evaluate", "export", "drafts",
)  # fmt: skip
DRAFT_KEYS = ("name", "method", "trainer", "evaluate")
_DRAFT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_TAKEN = ("data", "checkpoints", "export", "tensorboard")
"""Folders of output_dir that are not drafts."""


@dataclass(frozen=True)
class Recipe:
    """A validated recipe. engine, method and store are (kind, that implementation's config).

    drafts: where one stream trains several, each one's own recipe, by name: what it would be alone,
    with a folder of output_dir. method, trainer and evaluate are the first one's then.
    """

    name: str
    output_dir: Path
    run: RunConfig
    engine: tuple[str, Config]
    data: DataConfig
    method: tuple[str, Config]
    store: tuple[str, StoreConfig]
    order: OrderConfig
    stream: StreamConfig
    trainer: TrainerConfig
    evaluate: EvaluateConfig
    export: ExportConfig
    source: dict[str, Any]
    drafts: Mapping[str, Recipe] = field(default_factory=dict)

    @property
    def parts(self) -> Mapping[str, Recipe]:
        """A recipe for each draft that is trained; a single one has the name ""."""
        return self.drafts or {"": self}

    @property
    def text_temperature(self) -> float:
        """Of the target when it wrote the training text; 1 where it did not, or was greedy."""
        generate = self.data.generate
        return generate.temperature if generate and generate.temperature > 0 else 1.0


def load(recipe: str | None, assignments: list[str]) -> Recipe:
    """recipe: a path, or the name of a shipped recipe; None is the demo."""
    return build(override(read_yaml(find(recipe or "demo")), assignments))


def split_arguments(arguments: list[str]) -> tuple[str | None, list[str]]:
    """`[RECIPE] [key.sub=value ...]` for `load`."""
    named = bool(arguments) and "=" not in arguments[0]
    return (arguments[0] if named else None), arguments[named:]


def find(recipe: str) -> Path:
    path = Path(recipe)
    if path.is_file():
        return path
    name = recipe.removesuffix(".yaml")
    if name in shipped():
        return RECIPES / f"{name}.yaml"
    if path.is_dir():
        raise ValueError(f"{recipe}: wanted a recipe's YAML file, got a directory")
    raise ValueError(
        f"{recipe}: no such file, and {unknown_name('recipe', Path(name).name, shipped())}"
    )


def shipped() -> list[str]:
    """Names of the package's recipes."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def build(data: dict[str, Any]) -> Recipe:
    """ValueError names the unknown or wrong key, and the nearest known one."""
    for key in data:
        if key not in SECTIONS:
            raise ValueError(unknown_name("key", key, list(SECTIONS)))
    if not isinstance(data.get("name"), str):
        raise ValueError(f"name: wanted the name of the recipe, got {data.get('name')!r}")
    output_dir = data.get("output_dir") or f"runs/{data['name']}"
    if not isinstance(output_dir, str):
        raise ValueError(f"output_dir: wanted the path of a folder, got {output_dir!r}")
    if "drafts" in data:
        parts = _drafts(data)
        first = next(iter(parts.values()))
        folder = first.output_dir.parent
        return replace(first, name=data["name"], output_dir=folder, source=data, drafts=parts)
    texts = _section(DataConfig, data, "data")
    for split in SPLITS:
        prompt_source(getattr(texts, split), where=f"data.{split}")
    method = _kind(METHODS, data, "method")
    evaluation = _section(EvaluateConfig, data, "evaluate")
    check_depth(METHODS.get(method[0])(method[1]), evaluation)
    return Recipe(
        name=data["name"],
        output_dir=Path(output_dir),
        run=_section(RunConfig, data, "run"),
        engine=_kind(ENGINES, data, "engine"),
        data=texts,
        method=method,
        store=_store(data),
        order=_section(OrderConfig, data, "order"),
        stream=_section(StreamConfig, data, "stream"),
        trainer=_section(TrainerConfig, data, "trainer"),
        evaluate=evaluation,
        export=_section(ExportConfig, data, "export"),
        source=data,
    )


def _drafts(data: dict[str, Any]) -> dict[str, Recipe]:
    """Each draft's own recipe. ValueError names what is wrong with an entry."""
    entries = data["drafts"]
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"drafts: wanted a list of {{name, method, ...}}, got {entries!r}")
    if "method" in data:
        raise ValueError("method: wanted none beside drafts, each of which has its own")
    common = {key: value for key, value in data.items() if key != "drafts"}
    output_dir = Path(data.get("output_dir") or f"runs/{data['name']}")
    parts: dict[str, Recipe] = {}
    for i, entry in enumerate(entries):
        name = _draft_name(entry, where=f"drafts.{i}")
        if name in parts:
            raise ValueError(f"drafts.{i}.name: wanted a name of its own, got {name!r} again")
        own = {
            **common,
            "name": f"{data['name']}/{name}",
            "output_dir": str(output_dir / name),
            "method": entry.get("method"),
            **{
                key: {**_mapping(data, key), **_mapping(entry, key)}
                for key in ("trainer", "evaluate")
            },
        }
        try:
            parts[name] = build(own)
        except ValueError as error:
            raise ValueError(f"drafts.{i} ({name}): {error}") from None
    return parts


def _draft_name(entry: Any, *, where: str) -> str:
    if not isinstance(entry, dict):
        raise ValueError(f"{where}: wanted a section, got {entry!r}")
    for key in entry:
        if key not in DRAFT_KEYS:
            raise ValueError(f"{where}: {unknown_name('key', key, list(DRAFT_KEYS))}")
    name = entry.get("name")
    if not isinstance(name, str) or not _DRAFT_NAME.fullmatch(name) or name in _TAKEN:
        raise ValueError(
            f"{where}.name: wanted letters, digits, '_', '.' and '-', and none of "
            f"{', '.join(_TAKEN)}, got {name!r}"
        )
    return name


def check_depth(method: Method, evaluation: EvaluateConfig) -> None:
    """ValueError if evaluation would ask for more tokens in a round than the method can propose."""
    if not isinstance(method, LimitsDepth) or not evaluation.num_prompts:
        return
    if evaluation.depth > method.max_depth:
        raise ValueError(
            f"evaluate.depth: wanted at most {method.max_depth}, which is what {method.name} "
            f"proposes in a round with this config, got {evaluation.depth}"
        )


def _store(data: dict[str, Any]) -> tuple[str, StoreConfig]:
    kind, config = _kind(STORES, data, "store", default="shm")
    if not isinstance(config, StoreConfig):
        raise TypeError(f"store.kind {kind}: wanted a StoreConfig, got {type(config).__name__}")
    return kind, config


def _mapping(data: dict[str, Any], key: str) -> dict[str, Any]:
    value = data.get(key) or {}
    if not isinstance(value, dict):
        raise ValueError(f"{key}: wanted a section, got {value!r}")
    return value


def _section(model: type[ConfigT], data: dict[str, Any], key: str) -> ConfigT:
    return parse(model, _mapping(data, key), where=key)


def _kind(
    registry: Registry, data: dict[str, Any], key: str, default: str | None = None
) -> tuple[str, Config]:
    section = dict(_mapping(data, key))
    kind = section.pop("kind", default)
    if not isinstance(kind, str):
        raise ValueError(f"{key}.kind: wanted one of {', '.join(registry)}, got {kind!r}")
    model: type[Config] = registry.get(kind).Config
    return kind, parse(model, section, where=key)
