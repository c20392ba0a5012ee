"""The kinds of prompts, each with its config."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, NonNegativeInt, PositiveInt
from torch import Tensor

from specforge_ext.config import Config
from specforge_ext.prompts.base import (
    Generate,
    PromptSet,
    Skipped,
    Tokenizer,
    build_training_prompts,
)
from specforge_ext.prompts.cache import cached, content_key
from specforge_ext.prompts.python_stdlib import Split, read_source, stdlib_files
from specforge_ext.prompts.read import Conversation, Record, check_file, read_jsonl
from specforge_ext.prompts.regenerate import Turns, regenerate
from specforge_ext.prompts.template import ChatTemplate
from specforge_ext.prompts.tokenize import TokenizeOptions, tokenize
from specforge_ext.prompts.tokenizer import tokenizer_hash

CHARACTERS_PER_TOKEN = 16
"""Of source text that is cut out for each token of a prefix: several times what a token needs."""


class JsonlConfig(Config):
    """paths: JSONL files (prompts/read.py), read in order. max_length: tokens of a prompt.

    train_only_last_turn: score the last answer of a conversation only.
    template_options: variables of the chat template.
    regenerate: answers that the target writes anew.
    cache_dir: where tokenised prompts are kept; none: nowhere. Regenerated ones are not kept.
    """

    paths: tuple[Path, ...]
    max_length: PositiveInt = 4096
    train_only_last_turn: bool = False
    template_options: dict[str, Any] = Field(default_factory=dict)
    regenerate: Literal["none", "last", "all"] = "none"
    cache_dir: Path | None = None


class JsonlPrompts:
    """A PromptSource: conversations, texts and ids from files."""

    Config = JsonlConfig

    def __init__(self, config: JsonlConfig) -> None:
        self._config = config
        self._options = TokenizeOptions(
            max_length=config.max_length,
            train_only_last_turn=config.train_only_last_turn,
            template_options=config.template_options,
        )

    def check(self) -> None:
        for path in self._config.paths:
            check_file(path)

    def load(self, tokenizer: Tokenizer, generate: Generate | None = None) -> PromptSet:
        config = self._config
        self.check()
        if config.regenerate != "none":
            if generate is None:
                raise ValueError(
                    f"regenerate: wanted a target to write for {config.regenerate!r}, got none"
                )
            return self._regenerated(tokenizer, generate, config.regenerate)
        key = content_key(config.paths, tokenizer_hash(tokenizer), asdict(self._options))
        return cached(
            config.cache_dir, key, lambda: tokenize(self._records(), tokenizer, self._options)
        )

    def content_key(self) -> str:
        options = self._config.model_dump(mode="json", exclude={"paths", "cache_dir"})
        self.check()
        return content_key(self._config.paths, options)

    def longest(self, *, max_new_tokens: int) -> int:
        """max_length: what the target writes anew is cut too."""
        return self._config.max_length

    def _records(self) -> list[Record]:
        return [record for path in self._config.paths for record in read_jsonl(path)]

    def _regenerated(self, tokenizer: Tokenizer, generate: Generate, turns: Turns) -> PromptSet:
        """With the target's answers in conversations; texts and ready ids stay as they are."""
        records = self._records()
        chats = [record for record in records if isinstance(record, Conversation)]
        others = [record for record in records if not isinstance(record, Conversation)]
        skipped: list[Skipped] = []
        if chats:
            template = ChatTemplate(tokenizer, self._config.template_options)
            chats, skipped = regenerate(
                chats, template, generate, turns=turns, max_prefix=self._config.max_length
            )
        prompts = tokenize([*chats, *others], tokenizer, self._options)
        return replace(prompts, skipped=(*skipped, *prompts.skipped))


class PythonStdlibConfig(Config):
    """Prefixes of the standard library's sources, which the target continues.

    split: files that the demo target was trained on, or its held-out ones. num_prompts: distinct
    prefixes. prefix_tokens: length of each. seed: of the choice.
    """

    split: Split = "train"
    num_prompts: PositiveInt
    prefix_tokens: PositiveInt = 32
    seed: NonNegativeInt = 0


class PythonStdlibPrompts:
    """A PromptSource: text that the target writes after the beginnings of lines of Python."""

    Config = PythonStdlibConfig

    def __init__(self, config: PythonStdlibConfig) -> None:
        self._config = config

    def load(self, tokenizer: Tokenizer, generate: Generate | None = None) -> PromptSet:
        if generate is None:
            raise ValueError("python_stdlib: wanted a target to continue the prefixes, got none")
        prefixes = self.prefixes(tokenizer)
        return build_training_prompts(prefixes, generate(prefixes))

    def check(self) -> None:
        """The interpreter's library is always there."""

    def content_key(self) -> str:
        digest = hashlib.sha256(self._config.model_dump_json().encode())
        for path in stdlib_files(self._config.split):
            digest.update(path.read_bytes())
        return digest.hexdigest()[:32]

    def longest(self, *, max_new_tokens: int) -> int:
        return self._config.prefix_tokens + max_new_tokens

    def prefixes(self, tokenizer: Tokenizer) -> list[Tensor]:
        """num_prompts distinct tensors, [prefix_tokens] int32, each cut at the start of a line.

        A pure function of the config, the tokenizer and the interpreter's library. ValueError if
        the split has not that many.
        """
        config = self._config
        sources = [read_source(path) for path in stdlib_files(config.split)]
        starts = line_starts(sources)
        order = np.random.Generator(np.random.PCG64(config.seed)).permutation(len(starts))
        width = config.prefix_tokens * CHARACTERS_PER_TOKEN
        found: dict[tuple[int, ...], None] = {}
        for first in range(0, len(order), config.num_prompts):
            chunk = starts[order[first : first + config.num_prompts]].tolist()
            cuts = [sources[file][at : at + width] for file, at in chunk]
            for ids in tokenizer(cuts, add_special_tokens=False)["input_ids"]:
                if len(ids) >= config.prefix_tokens:
                    found[tuple(ids[: config.prefix_tokens])] = None
                if len(found) == config.num_prompts:
                    return [torch.tensor(ids, dtype=torch.int32) for ids in found]
        raise ValueError(
            f"num_prompts: wanted {config.num_prompts} distinct prefixes of "
            f"{config.prefix_tokens} tokens from the split {config.split!r}, found {len(found)}"
        )


def line_starts(sources: Sequence[str]) -> np.ndarray[Any, np.dtype[np.int64]]:
    """[lines, 2] int64: source and offset in characters of every line that is not blank."""
    rows: list[tuple[int, int]] = []
    for index, source in enumerate(sources):
        at = 0
        for line in source.splitlines(keepends=True):
            if not line.isspace():
                rows.append((index, at))
            at += len(line)
    return np.array(rows, dtype=np.int64).reshape(-1, 2)
