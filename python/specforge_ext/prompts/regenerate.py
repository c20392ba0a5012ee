"""Answers of the target in place of a data set's own: a draft learns what its target says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from jinja2 import TemplateError
from torch import Tensor

from specforge_ext.prompts.base import Generate, Skipped, Tokenizer
from specforge_ext.prompts.read import Conversation
from specforge_ext.prompts.template import ChatTemplate

Turns = Literal["last", "all"]


def regenerate(
    conversations: Sequence[Conversation],
    template: ChatTemplate,
    generate: Generate,
    *,
    turns: Turns,
    max_prefix: int,
) -> tuple[list[Conversation], list[Skipped]]:
    """The conversations, in order, with the assistant's content written by the target, as text.

    turns: "last" rewrites the last answer, given the earlier ones as they are; "all" rewrites every
    answer in order, each given the rewritten ones before it. A conversation that ends with another
    role gets an answer at its end. What the target says is decoded without its special tokens.
    max_prefix: tokens before an answer; a conversation that has more, or that the template refuses,
    is skipped.
    """
    state = dict(enumerate(map(_ending_with_answer, conversations)))
    answers = [_answers(conversation, turns) for conversation in state.values()]
    skipped: list[Skipped] = []
    for turn in range(max(map(len, answers), default=0)):
        prefixes: dict[int, Tensor] = {}
        for row in [row for row in state if turn < len(answers[row])]:
            prefix = _prefix(template, state[row], answers[row][turn], max_prefix)
            if isinstance(prefix, Skipped):
                skipped.append(prefix)
                del state[row]
            else:
                prefixes[row] = prefix
        for row, written in zip(prefixes, generate(list(prefixes.values())), strict=True):
            text = _decode(template.tokenizer, written.tolist())
            state[row] = _replaced(state[row], answers[row][turn], text)
    return list(state.values()), skipped


def _prefix(
    template: ChatTemplate, conversation: Conversation, index: int, max_prefix: int
) -> Tensor | Skipped:
    """What comes before message `index`, [n] int32; or why it cannot be given to the target."""
    try:
        ids = template.prefix(conversation.messages[:index])
    except TemplateError as error:
        return Skipped(conversation.where, f"the chat template refuses it: {error}")
    if len(ids) > max_prefix:
        reason = f"{len(ids)} tokens before an answer, at most {max_prefix} wanted"
        return Skipped(conversation.where, reason)
    return torch.tensor(ids, dtype=torch.int32)


def _ending_with_answer(conversation: Conversation) -> Conversation:
    """With an empty answer at its end, unless it ends with one already."""
    if conversation.messages[-1]["role"] == "assistant":
        return conversation
    empty = {"role": "assistant", "content": ""}
    return replace(conversation, messages=(*conversation.messages, empty))


def _answers(conversation: Conversation, turns: Turns) -> list[int]:
    """Indices of the messages to write, in order. What opens a conversation answers nothing."""
    found = [
        i
        for i, message in enumerate(conversation.messages)
        if i > 0 and message["role"] == "assistant"
    ]
    return found[-1:] if turns == "last" else found


def _replaced(conversation: Conversation, index: int, content: str) -> Conversation:
    messages = list(conversation.messages)
    messages[index] = {**messages[index], "content": content}
    return replace(conversation, messages=tuple(messages))


def _decode(tokenizer: Tokenizer, ids: list[int]) -> str:
    text: str = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text
