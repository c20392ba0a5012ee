"""A conversation through the chat template: token ids, and which tokens the assistant wrote.

Each conversation is tokenised once. A template with {% generation %} marks the assistant's text
itself. For any other, the text of an assistant's message is found by rendering the conversation
once more with that message's content replaced by a character that occurs nowhere: what both
renderings have in common at their start and at their end is not the message. This holds for
templates that strip the content or take thoughts out of it, and does not care where else the same
words occur.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from jinja2 import TemplateError

from specforge_ext.prompts.base import Tokenizer

Messages = Sequence[Mapping[str, Any]]
Span = tuple[int, int]

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_PRIVATE_USE = range(0xE000, 0xF900)


@dataclass(frozen=True)
class Encoded:
    """Token ids of a text, and for each 1 if the assistant wrote it."""

    input_ids: list[int]
    mask: list[int]


@dataclass(frozen=True)
class ChatTemplate:
    """The template of a tokenizer, with its options fixed (such as enable_thinking)."""

    tokenizer: Tokenizer
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.tokenizer.chat_template:
            raise ValueError(
                f"chat template: wanted one in the tokenizer {self.tokenizer.name_or_path!r}, "
                "found none; conversations cannot be rendered without it"
            )

    @cached_property
    def marks_generation(self) -> bool:
        return _GENERATION.search(self.tokenizer.get_chat_template()) is not None

    def render(self, messages: Messages) -> str:
        """The text of a conversation. jinja2.TemplateError if the template refuses it."""
        text: str = self.tokenizer.apply_chat_template(
            [dict(m) for m in messages], tokenize=False, **self.options
        )
        return text

    def prefix(self, messages: Messages) -> list[int]:
        """Ids of a conversation, and of what comes before the assistant's next words."""
        text = self.tokenizer.apply_chat_template(
            [dict(m) for m in messages],
            tokenize=False,
            add_generation_prompt=True,
            **self.options,
        )
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def encode(self, messages: Messages, *, last_turn_only: bool = False) -> Encoded:
        """Ids and mask. jinja2.TemplateError if the template refuses the conversation.

        Without {% generation %}, the token that ends the assistant's turn counts as its own; a
        token that begins before the message (merged with the header) does not.
        last_turn_only: the mask keeps the last answer alone.
        """
        if self.marks_generation:
            return self._encode_marked(messages, last_turn_only)
        text = self.render(messages)
        out = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        spans = self.assistant_spans(messages, text)
        chosen = spans[-1:] if last_turn_only else spans
        return Encoded(out["input_ids"], mask_of_spans(out["offset_mapping"], chosen))

    def assistant_spans(self, messages: Messages, text: str) -> list[Span]:
        """Character ranges of the assistant's messages in their rendering `text`, ends included."""
        spans = []
        for index, message in enumerate(messages):
            if message["role"] == "assistant":
                replaced = list(messages)
                replaced[index] = {**message, "content": _unused_character(text)}
                start, end = changed_span(text, self.render(replaced))
                if text.startswith(self._end_of_turn, end):
                    end += len(self._end_of_turn)
                spans.append((start, end))
        return spans

    def _encode_marked(self, messages: Messages, last_turn_only: bool) -> Encoded:
        out = self.tokenizer.apply_chat_template(
            [dict(m) for m in messages],
            return_dict=True,
            return_assistant_tokens_mask=True,
            **self.options,
        )
        mask: list[int] = out["assistant_masks"]
        return Encoded(out["input_ids"], _last_run(mask) if last_turn_only else mask)

    @cached_property
    def _end_of_turn(self) -> str:
        """What the template writes after an answer, up to its first special token; "" if none."""
        content = chr(_PRIVATE_USE[0])
        probe = [{"role": "user", "content": "?"}, {"role": "assistant", "content": content}]
        try:
            _, _, after = self.render(probe).rpartition(content)
        except TemplateError as error:
            raise ValueError(
                f"chat template: wanted one that renders a question and its answer: {error}"
            ) from error
        body = after.lstrip()
        added = self.tokenizer.added_tokens_decoder.values()
        special = [token.content for token in added if token.special]
        first = max((s for s in special if body.startswith(s)), key=len, default="")
        return after[: len(after) - len(body)] + first if first else ""


def changed_span(text: str, other: str) -> Span:
    """The range of `text` outside the longest start, and then end, in common with `other`."""
    limit = min(len(text), len(other))
    start = next((i for i in range(limit) if text[i] != other[i]), limit)
    limit -= start
    tail = next((i for i in range(limit) if text[-1 - i] != other[-1 - i]), limit)
    return start, len(text) - tail


def mask_of_spans(offsets: Sequence[Span], spans: Sequence[Span]) -> list[int]:
    """1 for each token that begins within a span. offsets: character range of each token."""
    ranges = np.array(offsets, dtype=np.int64).reshape(-1, 2)
    mask = np.zeros(len(ranges), dtype=bool)
    for start, end in spans:
        mask |= (ranges[:, 0] >= start) & (ranges[:, 0] < end) & (ranges[:, 1] > ranges[:, 0])
    return [int(value) for value in mask]


def _unused_character(text: str) -> str:
    """One of the private-use characters, which no template and hardly a text has."""
    return next(chr(code) for code in _PRIVATE_USE if chr(code) not in text)


def _last_run(mask: list[int]) -> list[int]:
    """The last unbroken run of ones alone."""
    end = len(mask)
    while end and not mask[end - 1]:
        end -= 1
    start = end
    while start and mask[start - 1]:
        start -= 1
    return [int(start <= i < end) for i in range(len(mask))]
