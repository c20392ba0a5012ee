"""The data set of a run: prompts from the recipe's sources, with the target's own continuations.

Written once, by the producer, into `output_dir/data` under a hash of all that shaped it, and read
by every rank. What lies there already is used again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from specforge_ext.config import Config, parse
from specforge_ext.engines import Engine
from specforge_ext.prompts import PROMPTS, Generate, PromptSet, PromptSource
from specforge_ext.prompts.cache import cached, load
from specforge_ext.prompts.tokenizer import open_tokenizer, tokenizer_hash

Progress = Callable[[int, int, str], None]
SPLITS = ("train", "heldout")


class GenerateConfig(Config):
    """How the target writes: at most max_new_tokens; temperature 0 is greedy.

    stop_at_eos: end at the target's end token. chunk: prefixes between two signs of progress.
    """

    max_new_tokens: int = Field(96, ge=2)
    temperature: float = Field(0.8, ge=0)
    stop_at_eos: bool = True
    chunk: int = Field(256, ge=1)


class DataConfig(Config):
    """train, heldout: {kind, ...}, a kind of prompts and its config (prompts/sources.py).

    generate: how the target writes answers, for the kinds that want it to.
    tokenizer: directory or hub name; None: the target's own.
    """

    train: dict[str, Any]
    heldout: dict[str, Any]
    generate: GenerateConfig | None = None
    tokenizer: str | None = None


@dataclass(frozen=True)
class Dataset:
    """train: what is trained on. heldout: token ids of the prompts to evaluate on, [n] int32 each.

    fingerprint: changes when anything that shaped the training texts does.
    """

    train: PromptSet
    heldout: tuple[Tensor, ...]
    fingerprint: str

    def describe(self) -> str:
        scored = int(self.train.loss_mask.sum())
        text = f"{len(self.train)} samples, {self.train.input_ids.numel()} tokens, {scored} scored"
        if self.train.skipped:
            first = self.train.skipped[0]
            text += f"; {len(self.train.skipped)} left out, first {first.where}: {first.reason}"
        if self.train.num_truncated:
            text += f"; {self.train.num_truncated} cut at their max_length"
        return f"{text}; {len(self.heldout)} held-out prompts"


def prepare(
    config: DataConfig,
    engine: Engine,
    *,
    directory: Path,
    seed: int,
    progress: Progress,
) -> dict[str, str]:
    """Write what is not there yet; where the files are, for `read_dataset`.

    ValueError for a bad source.
    """
    tokenizer = open_tokenizer(config.tokenizer or engine.spec.name)
    files: dict[str, str] = {}
    for split in SPLITS:
        source = prompt_source(getattr(config, split), where=f"data.{split}")
        key = fingerprint(config, source, engine, tokenizer_hash(tokenizer), seed)
        generate = _writer(config.generate, engine, seed, progress, split)
        try:
            cached(directory, key, partial(source.load, tokenizer, generate))
        except ValueError as error:
            raise ValueError(f"data.{split}: {error}") from error
        files[split] = str(directory / f"prompts-{key}.safetensors")
    return files


def prompt_source(section: dict[str, Any], *, where: str) -> PromptSource:
    """The source of a {kind, ...} section. ValueError names the bad key."""
    options = dict(section)
    kind = options.pop("kind", None)
    if not isinstance(kind, str):
        raise ValueError(f"{where}.kind: wanted one of {', '.join(PROMPTS)}, got {kind!r}")
    factory = PROMPTS.get(kind)
    source: PromptSource = factory(parse(factory.Config, options, where=where))
    return source


def fingerprint(
    config: DataConfig, source: PromptSource, engine: Engine, tokenizer: str, seed: int
) -> str:
    """A hash of all that shapes the texts: sources, tokenizer, the target and how it writes."""
    norm = engine.weights(device=torch.device("cpu")).final_norm.float().numpy().tobytes()
    writes = config.generate.model_dump(exclude={"chunk"}) if config.generate else None
    parts = [source.content_key(), tokenizer, writes, hashlib.sha256(norm).hexdigest(), seed]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def read_dataset(files: dict[str, str]) -> Dataset:
    """What `prepare` wrote. ValueError if a file is damaged."""
    train, heldout = load(Path(files["train"])), load(Path(files["heldout"]))
    prefixes = tuple(_prefix(p.input_ids, p.loss_mask) for p in heldout)
    return Dataset(train, prefixes, fingerprint=Path(files["train"]).stem)


def _prefix(input_ids: Tensor, loss_mask: Tensor) -> Tensor:
    """The tokens before the first that the target wrote; at least one."""
    return input_ids[: max(1, int(loss_mask.argmax()))]


def _writer(
    config: GenerateConfig | None, engine: Engine, seed: int, progress: Progress, split: str
) -> Generate | None:
    if config is None:
        return None

    def write(prefixes: Sequence[Tensor]) -> list[Tensor]:
        order = sorted(range(len(prefixes)), key=lambda i: len(prefixes[i]))
        out: dict[int, Tensor] = {}
        for start in range(0, len(order), config.chunk):
            chosen = order[start : start + config.chunk]
            texts = engine.generate(
                [prefixes[i] for i in chosen],
                max_new_tokens=config.max_new_tokens,
                temperature=config.temperature,
                seed=seed,
                stop_at_eos=config.stop_at_eos,
            )
            out.update(zip(chosen, texts, strict=True))
            progress(len(out), len(prefixes), f"{split}: texts written by the target")
        return [out[i] for i in range(len(prefixes))]

    return write
