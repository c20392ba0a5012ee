"""Prompts: reading, chat templates and masks, building of sets."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from jinja2 import TemplateError

from prompt_cases import (
    ALTERNATING,
    ENDLESS,
    MARKED,
    PLAIN,
    STRIPPED,
    THINKING,
    chat,
    make_tokenizer,
    scored,
    scored_by,
)
from specforge_ext.prompts.base import build_set
from specforge_ext.prompts.read import Conversation, Text, Tokens, parse_record, read_jsonl
from specforge_ext.prompts.sources import JsonlConfig, JsonlPrompts
from specforge_ext.prompts.template import ChatTemplate, changed_span, mask_of_spans
from specforge_ext.prompts.tokenize import TokenizeOptions, tokenize

# Reading


def test_every_form_is_read(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    lines = [
        {"messages": [{"role": "user", "content": "a", "name": "x"}], "id": 3},
        {"conversations": [{"from": "human", "value": "b"}, {"from": "gpt", "value": "c"}]},
        {"conversations": [{"role": "system", "content": "d"}]},
        {"text": "é\n"},
        {"input_ids": [1, 2, 3], "loss_mask": [0, 1, 1]},
    ]
    path.write_text("\n\n".join(json.dumps(line) for line in lines) + "\n", encoding="utf-8")
    assert list(read_jsonl(path)) == [
        Conversation(f"{path}:1", ({"role": "user", "content": "a", "name": "x"},)),
        Conversation(f"{path}:3", chat("b", "c")),
        Conversation(f"{path}:5", ({"role": "system", "content": "d"},)),
        Text(f"{path}:7", "é\n"),
        Tokens(f"{path}:9", (1, 2, 3), (0, 1, 1)),
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", r"f:1: wanted one JSON object in UTF-8, got"),
        (b'"\xff"', r"f:1: wanted one JSON object in UTF-8, got"),
        (b"[1]", r"f:1: wanted a JSON object, got \[1\]"),
        (b'{"prompt": 1}', r"f:1: wanted one of the keys .*; got 'prompt'"),
        (b"{}", r"f:1: wanted one of the keys .*; got none"),
        (b'{"messages": []}', r"f:1: messages: wanted a list of messages, got \[\]"),
        (b'{"messages": {"a": 1}}', r"f:1: messages: wanted a list of messages, got"),
        (b'{"messages": [3]}', r"f:1: messages\[0\]: wanted an object, got 3"),
        (b'{"messages": [{"role": "user"}]}', r"messages\[0\].content: wanted a string, got noth"),
        (
            b'{"messages": [{"role": 1, "content": ""}]}',
            r"messages\[0\].role: wanted a string, got",
        ),
        (b'{"conversations": [{"from": "gpt"}]}', r"conversations\[0\].value: wanted a string"),
        (b'{"text": ["a"]}', r'f:1: text: wanted a string, got \["a"\]'),
        (b'{"input_ids": [1]}', r"f:1: loss_mask: wanted a list of integers, got nothing"),
        (b'{"input_ids": "1", "loss_mask": []}', r"input_ids: wanted a list of integers, got \"1"),
        (b'{"input_ids": [1], "loss_mask": []}', r"loss_mask: wanted 1 values, .* got 0"),
        (b'{"input_ids": [1], "loss_mask": [2]}', r"loss_mask\[0\]: wanted an integer in 0..1"),
        (b'{"input_ids": [0, -1], "loss_mask": [1, 1]}', r"input_ids\[1\]: wanted .* got -1"),
        (b'{"input_ids": [true], "loss_mask": [1]}', r"input_ids\[0\]: wanted .* got true"),
        (b'{"input_ids": [2147483648], "loss_mask": [1]}', r"input_ids\[0\]: wanted .* got 21474"),
    ],
)
def test_bad_lines_are_named(line: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_record(line, where="f:1")


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="paths: wanted a JSONL file, found none at"):
        list(read_jsonl(tmp_path / "none.jsonl"))
    source = JsonlPrompts(JsonlConfig(paths=(tmp_path / "none.jsonl",)))
    with pytest.raises(ValueError, match="paths: wanted a JSONL file, found none at"):
        source.load(make_tokenizer())


# Templates and masks


@pytest.mark.parametrize("template", [PLAIN, STRIPPED, MARKED, THINKING])
def test_answers_are_scored_with_their_end(template: str) -> None:
    messages = chat("what is it?", "hello there", "user", "is it <|im_end")
    assert scored_by(template, messages) == ["hello there<|im_end|>", "is it <|im_end<|im_end|>"]
    assert scored_by(template, messages, last_turn_only=True) == ["is it <|im_end<|im_end|>"]


@pytest.mark.parametrize("template", [PLAIN, STRIPPED, MARKED, THINKING])
def test_the_conversation_is_tokenised_as_it_is(template: str) -> None:
    tokenizer = make_tokenizer(template)
    chat_template = ChatTemplate(tokenizer)
    messages = chat("what is it?", "hello there")
    encoded = chat_template.encode(messages)
    text = chat_template.render(messages)
    assert encoded.input_ids == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(encoded.input_ids) == text


def test_whitespace_that_the_template_strips() -> None:
    assert scored_by(STRIPPED, chat("a", " \n hello there\n\n ", "b", "\n")) == [
        "hello there<|im_end|>",
        "<|im_end|>",
    ]


def test_answers_that_repeat_what_surrounds_them() -> None:
    """Searching for the words of an answer, or for what follows it, would go astray here."""
    tricky = "user\n<|im_end|>\n<|im_start|>user\na"
    assert scored_by(PLAIN, chat("a", "a", tricky, "a", "a", "b\n")) == [
        "a<|im_end|>",
        "a<|im_end|>",
        "b\n<|im_end|>",
    ]


def test_thoughts_that_the_template_moves_or_drops() -> None:
    first, last = "<think>is it?</think>\n\nhello", "<think>what</think>there"
    messages = chat("a", first, "b", last)
    text = ChatTemplate(make_tokenizer(THINKING)).render(messages)
    assert "is it?" not in text and "<think>\nwhat\n</think>\n\nthere" in text
    assert scored_by(THINKING, messages) == ["hello<|im_end|>", "what\n</think>\n\nthere<|im_end|>"]


def test_without_an_end_token_the_answer_alone_is_scored() -> None:
    """Nor is the next turn's first special token taken for an end."""
    assert scored_by(ENDLESS, chat("a", "hello", "b", "there")) == ["hello", "there"]


def test_a_token_merged_with_the_header_is_not_the_assistants() -> None:
    tokenizer = make_tokenizer(PLAIN)
    messages = chat("a", "\n\nhello there")
    assert "assistant\n\n\nhello" in ChatTemplate(tokenizer).render(messages)
    merged = tokenizer("\n\n\nhello", return_offsets_mapping=True)
    assert merged["offset_mapping"][0] == (0, 2)  # of the header and the answer
    assert scored_by(PLAIN, messages) == ["\nhello there<|im_end|>"]


def test_mask_equals_that_of_a_template_that_marks() -> None:
    """Random conversations: offsets and {% generation %} must agree token for token."""
    rng = random.Random(0)
    words = ["hello", " there", "\nx", "é", "is it", "<|im_end|>", " ", "user\n", "日本"]
    plain, marked = (ChatTemplate(make_tokenizer(t)) for t in (PLAIN, MARKED))
    for _ in range(100):
        contents = ["x" + "".join(rng.choices(words, k=rng.randint(0, 6))) for _ in range(4)]
        a, b = plain.encode(chat(*contents)), marked.encode(chat(*contents))
        assert a == b


def test_mask_of_spans_takes_tokens_that_begin_within() -> None:
    offsets = [(0, 2), (2, 2), (2, 5), (5, 6), (5, 6), (6, 9)]
    assert mask_of_spans(offsets, [(2, 6)]) == [0, 0, 1, 1, 1, 0]
    assert mask_of_spans(offsets, [(1, 3), (8, 9)]) == [0, 0, 1, 0, 0, 0]
    assert mask_of_spans(offsets, []) == [0] * 6
    assert mask_of_spans([], [(0, 3)]) == []


def test_changed_span_is_what_differs() -> None:
    assert changed_span("abab", "ab*ab") == (2, 2)
    assert changed_span("aXXa", "a*a") == (1, 3)
    assert changed_span("same", "same") == (4, 4)
    assert changed_span("", "*") == (0, 0)


def test_template_options_reach_the_template() -> None:
    tokenizer = make_tokenizer("{{ mood }}" + PLAIN)
    chat_template = ChatTemplate(tokenizer, {"mood": "calm"})
    assert chat_template.render(chat("a")).startswith("calm<|im_start|>")
    assert tokenizer.decode(chat_template.prefix(chat("a"))).startswith("calm<|im_start|>")


def test_templates_that_cannot_serve() -> None:
    with pytest.raises(
        ValueError, match=r"chat template: wanted one in the tokenizer .*found none"
    ):
        ChatTemplate(make_tokenizer(None))
    refusing = "{% if messages | length == 2 %}{{ raise_exception('no') }}{% endif %}" + PLAIN
    with pytest.raises(ValueError, match="wanted one that renders a question and its answer: no"):
        ChatTemplate(make_tokenizer(refusing)).encode(chat("a", "b", "c"))
    with pytest.raises(TemplateError):
        ChatTemplate(make_tokenizer(ALTERNATING)).encode(chat("a", "b", first="assistant"))


# Records to prompts


def test_prompts_skips_and_truncation() -> None:
    tokenizer = make_tokenizer(ALTERNATING)
    answer = chat("what is it?", "hello there")
    header = len(ChatTemplate(tokenizer).prefix(answer[:1]))
    whole = len(ChatTemplate(tokenizer).encode(answer).input_ids)
    records = [
        Conversation("f:1", answer),
        Conversation("f:2", chat("what", "x" * 50)),
        Conversation("f:3", chat("a" * 200, "b")),
        Conversation("f:4", chat("a", "b", first="assistant")),
        Conversation("f:5", chat("a")),
        Text("f:6", "hello there, what is it?"),
        Text("f:7", "x"),
        Tokens("f:8", (5, 6, 7, 8), (0, 1, 0, 1)),
        Tokens("f:9", (5, 6), (0, 1)),
        Conversation("f:10", answer),
    ]
    prompts = tokenize(records, tokenizer, TokenizeOptions(max_length=whole))
    assert [(s.where, s.reason) for s in prompts.skipped] == [
        ("f:3", f"no scored token within max_length = {whole}"),
        ("f:4", "the chat template refuses it: roles must alternate"),
        ("f:5", f"no scored token before the last of its {header_of(tokenizer, 'a')}"),
        ("f:7", "no scored token before the last of its 1"),
        ("f:9", "no scored token before the last of its 2"),
    ]
    assert prompts.num_truncated == 1
    assert len(prompts) == 5 and prompts.lengths == [len(p) for p in prompts]
    assert max(prompts.lengths) == whole
    first, second, text, ready, again = prompts
    assert scored(tokenizer, first.input_ids.tolist(), first.loss_mask.tolist()) == [
        "hello there<|im_end|>"
    ]
    assert second.loss_mask.tolist()[-2:] == [1, 0]
    assert text.loss_mask.tolist() == [1] * (len(text) - 1) + [0]
    assert (ready.input_ids.tolist(), ready.loss_mask.tolist()) == ([5, 6, 7, 8], [0, 1, 0, 0])
    assert torch.equal(first.input_ids, again.input_ids)
    assert again.sample_id == f"{first.sample_id}-1"
    assert len(set(prompts.sample_ids)) == len(prompts)
    assert all(int(p.loss_mask[-1]) == 0 and p.loss_mask.any() for p in prompts)
    assert header < whole


def header_of(tokenizer: Any, content: str) -> int:
    return len(ChatTemplate(tokenizer).encode(chat(content)).input_ids)


def test_train_only_last_turn() -> None:
    tokenizer = make_tokenizer()
    records = [Conversation("f:1", chat("a", "hello", "b", "there"))]
    options = TokenizeOptions(max_length=100, train_only_last_turn=True)
    (prompt,) = tokenize(records, tokenizer, options)
    assert scored(tokenizer, prompt.input_ids.tolist(), prompt.loss_mask.tolist()) == [
        "there<|im_end|>"
    ]


def test_sample_ids_are_of_the_content() -> None:
    a, b = [([1, 2, 3], [0, 1, 0])], [([1, 2, 3], [1, 1, 0])]
    assert build_set(a).sample_ids == build_set(a).sample_ids
    assert build_set(a).sample_ids != build_set(b).sample_ids
    assert build_set(b + a).sample_ids == (*build_set(b).sample_ids, *build_set(a).sample_ids)


def test_a_set_is_a_sequence() -> None:
    prompts = build_set([([i] * (i + 1), [1] * (i + 1)) for i in range(4)])
    assert [p.input_ids.tolist() for p in prompts] == [[0], [1, 1], [2] * 3, [3] * 4]
    assert prompts[-1].sample_id == prompts[3].sample_id
    assert [len(p) for p in prompts[1:3]] == [2, 3]
    with pytest.raises(IndexError, match="prompt 4 of 4"):
        prompts[4]
    assert list(build_set([])) == []
