"""Chat templates, a tokenizer and helpers for the tests of prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from specforge_ext.prompts.template import ChatTemplate

HEAD = "{% for m in messages %}"
TAIL = "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
PLAIN = HEAD + "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n" + TAIL
STRIPPED = HEAD + "<|im_start|>{{ m.role }}\n\n{{ m.content | trim }}<|im_end|>" + TAIL
MARKED = (
    HEAD
    + "<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    + "<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}{{ '\n' }}"
    + TAIL
)
# Like reasoning models': earlier thoughts are dropped, the last answer always has a frame for them.
THINKING = (
    HEAD
    + "<|im_start|>{{ m.role }}\n{% set answer = m.content.split('</think>')[-1].lstrip() %}"
    + "{% if m.role != 'assistant' %}{{ m.content }}{% elif loop.last %}<think>\n"
    + "{% if '</think>' in m.content %}{{ m.content.split('</think>')[0][7:] | trim }}{% endif %}"
    + "{{ '\n' }}</think>\n\n{{ answer }}{% else %}{{ answer }}{% endif %}<|im_end|>{{ '\n' }}"
    + TAIL
)
ENDLESS = HEAD + "[{{ m.role }}]{{ m.content }}" + TAIL
ALTERNATING = (
    HEAD
    + "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    + "{{ raise_exception('roles must alternate') }}{% endif %}"
    + "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    + TAIL
)


def make_tokenizer(template: str | None = PLAIN) -> PreTrainedTokenizerFast:
    """A byte-level BPE with merges across letters, spaces and line ends."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = ["assistant\n\n\nhello there\n\n\n", "user\nwhat is it?\n", "assistant\n is it é\n"]
    core.train_from_iterator(text * 10, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    tokenizer.chat_template = template
    return tokenizer


def chat(*contents: str, first: str = "user") -> tuple[dict[str, str], ...]:
    roles = ["user", "assistant"] if first == "user" else ["assistant", "user"]
    return tuple({"role": roles[i % 2], "content": c} for i, c in enumerate(contents))


def scored(tokenizer: Any, ids: Sequence[int], mask: Sequence[int]) -> list[str]:
    """Text of each unbroken run of scored tokens."""
    runs: list[list[int]] = []
    for i, (token, one) in enumerate(zip(ids, mask, strict=True)):
        if one:
            if i and mask[i - 1]:
                runs[-1].append(token)
            else:
                runs.append([token])
    return [tokenizer.decode(run) for run in runs]


def scored_by(template: str, messages: Any, **options: Any) -> list[str]:
    tokenizer = make_tokenizer(template)
    encoded = ChatTemplate(tokenizer).encode(messages, **options)
    return scored(tokenizer, encoded.input_ids, encoded.mask)
