"""Records -> prompts: one pass of the tokenizer over each, masks, truncation, what was left out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from jinja2 import TemplateError

from specforge_ext.prompts.base import PromptSet, Skipped, Tokenizer, build_set
from specforge_ext.prompts.read import Conversation, Record, Text
from specforge_ext.prompts.template import ChatTemplate, Encoded


@dataclass(frozen=True)
class TokenizeOptions:
    """max_length: tokens; longer prompts lose their end.

    train_only_last_turn: score the last answer only.
    template_options: variables of the chat template, such as {"enable_thinking": False}.
    """

    max_length: int
    train_only_last_turn: bool = False
    template_options: Mapping[str, Any] = field(default_factory=dict)


def tokenize(
    records: Iterable[Record], tokenizer: Tokenizer, options: TokenizeOptions
) -> PromptSet:
    """Prompts in the order of the records.

    Conversations score what the assistant wrote (prompts.template), texts every token (with the
    special tokens that the tokenizer adds by itself), ready ids what their mask says; the last
    position is never scored. A record that the template refuses, or that has no scored token left,
    is in `skipped`.
    """
    encoder = _Encoder(tokenizer, options)
    kept: list[tuple[list[int], list[int]]] = []
    skipped: list[Skipped] = []
    num_truncated = 0
    for record in records:
        try:
            encoded = encoder.encode(record)
        except TemplateError as error:
            skipped.append(Skipped(record.where, f"the chat template refuses it: {error}"))
            continue
        ids = encoded.input_ids[: options.max_length]
        mask = [*encoded.mask[: options.max_length][:-1], 0]
        if not any(mask):
            skipped.append(Skipped(record.where, _why_unscored(encoded, options)))
            continue
        num_truncated += len(encoded.input_ids) > len(ids)
        kept.append((ids, mask))
    return build_set(kept, skipped=skipped, num_truncated=num_truncated)


def _why_unscored(encoded: Encoded, options: TokenizeOptions) -> str:
    if any(encoded.mask[:-1]):
        return f"no scored token within max_length = {options.max_length}"
    return f"no scored token before the last of its {len(encoded.input_ids)}"


class _Encoder:
    """Encodes one record; the chat template is looked for when the first conversation comes."""

    def __init__(self, tokenizer: Tokenizer, options: TokenizeOptions) -> None:
        self._tokenizer = tokenizer
        self._options = options
        self._template: ChatTemplate | None = None

    def encode(self, record: Record) -> Encoded:
        if isinstance(record, Conversation):
            if self._template is None:
                self._template = ChatTemplate(self._tokenizer, self._options.template_options)
            last = self._options.train_only_last_turn
            return self._template.encode(record.messages, last_turn_only=last)
        if isinstance(record, Text):
            ids = self._tokenizer(record.text)["input_ids"]
            return Encoded(ids, [1] * len(ids))
        return Encoded(list(record.input_ids), list(record.loss_mask))
