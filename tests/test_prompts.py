"""Prompts: reading, chat templates and masks, the cache, sources, answers of the target."""

from __future__ import annotations

import functools
import json
import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from jinja2 import TemplateError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from specforge_ext.assets import demo_target_path
from specforge_ext.config import parse
from specforge_ext.prompts import PROMPTS, Skipped, build_training_prompts
from specforge_ext.prompts.base import build_set
from specforge_ext.prompts.cache import cached, content_key, load, save
from specforge_ext.prompts.python_stdlib import Split, read_source, stdlib_files
from specforge_ext.prompts.read import Conversation, Text, Tokens, parse_record, read_jsonl
from specforge_ext.prompts.regenerate import regenerate
from specforge_ext.prompts.sources import JsonlConfig, JsonlPrompts, PythonStdlibPrompts
from specforge_ext.prompts.template import ChatTemplate, changed_span, mask_of_spans
from specforge_ext.prompts.tokenize import TokenizeOptions, tokenize
from specforge_ext.prompts.tokenizer import open_tokenizer, tokenizer_hash

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


# The cache


def jsonl(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return path


def test_second_read_does_not_tokenise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = jsonl(tmp_path / "a.jsonl", {"messages": chat("a", "hello")}, {"text": "x"})
    source = JsonlPrompts(JsonlConfig(paths=(path,), cache_dir=tmp_path / "cache"))
    first = source.load(make_tokenizer())
    (file,) = (tmp_path / "cache").iterdir()
    assert file.suffix == ".safetensors"

    def refuse(*args: object) -> None:
        raise AssertionError("tokenised again")

    monkeypatch.setattr("specforge_ext.prompts.sources.tokenize", refuse)
    second = source.load(make_tokenizer())
    assert second.sample_ids == first.sample_ids
    assert second.skipped == first.skipped == (Skipped(f"{path}:2", first.skipped[0].reason),)
    assert torch.equal(second[0].input_ids, first[0].input_ids)
    assert torch.equal(second[0].loss_mask, first[0].loss_mask)

    moved = path.rename(tmp_path / "b.jsonl")
    JsonlPrompts(JsonlConfig(paths=(moved,), cache_dir=tmp_path / "cache")).load(make_tokenizer())


def test_whatever_decides_the_ids_decides_the_key(tmp_path: Path) -> None:
    a = jsonl(tmp_path / "a.jsonl", {"messages": chat("a", "hello")})
    b = jsonl(tmp_path / "b.jsonl", {"messages": chat("a", "there")})
    cache = tmp_path / "cache"

    def files(paths: tuple[Path, ...] = (a,), template: str = PLAIN, **options: Any) -> int:
        JsonlPrompts(JsonlConfig(paths=paths, cache_dir=cache, **options)).load(
            make_tokenizer(template)
        )
        return len(list(cache.iterdir()))

    assert files() == 1
    assert files() == 1
    assert files(max_length=30) == 2
    assert files(train_only_last_turn=True) == 3
    assert files(template=MARKED) == 4
    assert files(template_options={"x": 1}) == 5
    assert files(paths=(b,)) == 6
    assert files(paths=(a, b)) == 7
    assert files(paths=(b, a)) == 8
    assert tokenizer_hash(make_tokenizer()) == tokenizer_hash(make_tokenizer())


def test_cache_round_trip_of_any_set(tmp_path: Path) -> None:
    for prompts in (build_set([]), build_set([([1, 2], [1, 0])], skipped=[Skipped("é:1", "ü")])):
        save(prompts, tmp_path / "deep" / "x.safetensors")
        back = load(tmp_path / "deep" / "x.safetensors")
        assert (back.sample_ids, back.skipped) == (prompts.sample_ids, prompts.skipped)
        assert torch.equal(back.offsets, prompts.offsets)
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["x.safetensors"]


def test_damaged_cache_is_refused(tmp_path: Path) -> None:
    key = content_key([], "x")
    path = tmp_path / f"prompts-{key}.safetensors"
    for content in (b"", b"\x00" * 100):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"wanted a cache of prompts, found a damaged file"):
            cached(tmp_path, key, lambda: build_set([]))
    save(build_set([([1, 2], [1, 0])]), path)
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ValueError, match=r"damaged file .* remove it"):
        cached(tmp_path, key, lambda: build_set([]))


def test_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(tensors: object, path: Path, metadata: object) -> None:
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("specforge_ext.prompts.cache.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        save(build_set([]), tmp_path / "x.safetensors")
    assert list(tmp_path.iterdir()) == []


# Python's own library


@functools.cache
def some_files(split: Split) -> list[Path]:
    """A part of the library: reading all of it takes the time of all other tests."""
    return stdlib_files(split)[:30]


@pytest.fixture
def few_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("specforge_ext.prompts.sources.stdlib_files", some_files)


def stdlib(**config: Any) -> Any:
    kind = PROMPTS.get("python_stdlib")
    return kind(parse(kind.Config, {"num_prompts": 20, "prefix_tokens": 8, **config}))


@pytest.mark.usefixtures("few_files")
def test_prefixes_are_distinct_beginnings_of_lines() -> None:
    tokenizer = make_tokenizer()
    prefixes = stdlib().prefixes(tokenizer)
    assert len(prefixes) == len({tuple(p.tolist()) for p in prefixes}) == 20
    assert all(p.shape == (8,) and p.dtype == torch.int32 for p in prefixes)
    sources = ["\n" + read_source(path) for path in some_files("train")]
    for prefix in prefixes[:5]:
        text = "\n" + tokenizer.decode(prefix.tolist()).rstrip("\ufffd")
        assert any(text in source for source in sources)


@pytest.mark.usefixtures("few_files")
def test_prefixes_repeat_and_differ_by_seed_and_split() -> None:
    tokenizer = make_tokenizer()

    def texts(**config: Any) -> list[list[int]]:
        return [p.tolist() for p in stdlib(**config).prefixes(tokenizer)]

    assert texts() == texts()
    assert texts() != texts(seed=1)
    assert texts() != texts(split="heldout")
    assert texts(num_prompts=5) == texts()[:5]


@pytest.mark.usefixtures("few_files")
def test_target_continues_the_prefixes() -> None:
    def generate(prefixes: Sequence[Tensor]) -> list[Tensor]:
        return [torch.arange(1, 1 + i % 4, dtype=torch.int32) for i in range(len(prefixes))]

    source = stdlib()
    tokenizer = make_tokenizer()
    prompts = source.load(tokenizer, generate)
    assert len(prompts) == 10 and len(prompts.skipped) == 10
    assert prompts.skipped[1] == Skipped("prefix 1", "the target wrote 1 tokens")
    assert prompts[0].input_ids.tolist() == [*source.prefixes(tokenizer)[2].tolist(), 1, 2]
    assert prompts[0].loss_mask.tolist() == [0] * 8 + [1, 0]
    assert prompts[1].loss_mask.tolist() == [0] * 8 + [1, 1, 0]
    with pytest.raises(ValueError, match="python_stdlib: wanted a target to continue"):
        source.load(tokenizer)


def test_more_prefixes_than_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("specforge_ext.prompts.sources.stdlib_files", lambda split: ["x"])
    monkeypatch.setattr(
        "specforge_ext.prompts.sources.read_source", lambda p: "hello there\n\n  what is it?\n" * 9
    )
    assert len(stdlib(num_prompts=2, prefix_tokens=3).prefixes(make_tokenizer())) == 2
    with pytest.raises(ValueError, match=r"wanted 9 distinct prefixes of 3 tokens .*, found 2"):
        stdlib(num_prompts=9, prefix_tokens=3).prefixes(make_tokenizer())


def test_training_prompts_need_as_many_continuations() -> None:
    with pytest.raises(ValueError, match="shorter"):
        build_training_prompts([torch.zeros(2, dtype=torch.int32)], [])


# Answers of the target


class Echo:
    """A target that says how many tokens it was given, and ends its turn."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.calls: list[list[str]] = []

    def __call__(self, prefixes: Sequence[Tensor]) -> list[Tensor]:
        assert all(p.dtype == torch.int32 for p in prefixes)
        self.calls.append([self.tokenizer.decode(p.tolist()) for p in prefixes])
        said = [f"n{len(p)}<|im_end|>" for p in prefixes]
        return [torch.tensor(self.tokenizer(s)["input_ids"], dtype=torch.int32) for s in said]


def regenerated(turns: Any, *chats: Any, max_prefix: int = 1000) -> tuple[Any, Any, Echo]:
    template = ChatTemplate(make_tokenizer(ALTERNATING))
    echo = Echo(template.tokenizer)
    given = [Conversation(f"f:{i}", messages) for i, messages in enumerate(chats)]
    new, skipped = regenerate(given, template, echo, turns=turns, max_prefix=max_prefix)
    return [[m["content"] for m in c.messages] for c in new], skipped, echo


def test_last_answer_is_written_anew() -> None:
    texts, skipped, echo = regenerated("last", chat("a", "b", "c", "d"), chat("e"))
    assert [t[:-1] for t in texts] == [["a", "b", "c"], ["e"]]
    assert all(t[-1].startswith("n") and "<|im_end|>" not in t[-1] for t in texts)
    assert skipped == []
    assert echo.calls == [
        [
            "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
            "<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n",
            "<|im_start|>user\ne<|im_end|>\n<|im_start|>assistant\n",
        ]
    ]


def test_all_answers_are_written_on_top_of_new_ones() -> None:
    texts, _, echo = regenerated("all", chat("a", "b", "c", "d"), chat("e", "f"))
    assert [t[::2] for t in texts] == [["a", "c"], ["e"]]
    assert len(echo.calls) == 2 and len(echo.calls[1]) == 1
    assert f"assistant\n{texts[0][1]}<|im_end|>" in echo.calls[1][0]
    assert "b<" not in echo.calls[1][0]


def test_conversations_that_cannot_be_asked_are_skipped() -> None:
    long = chat("hello " * 30)
    texts, skipped, _ = regenerated(
        "last", long, chat("x", "y", "z", first="assistant"), chat("a", "b"), max_prefix=20
    )
    assert [t[0] for t in texts] == ["a"]
    assert [s.where for s in skipped] == ["f:0", "f:1"]
    assert "tokens before an answer, at most 20 wanted" in skipped[0].reason
    assert skipped[1].reason == "the chat template refuses it: roles must alternate"


def test_jsonl_source_with_new_answers(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", {"text": "hello there"}, {"messages": chat("a", "b")})
    tokenizer = make_tokenizer()
    source = JsonlPrompts(JsonlConfig(paths=(path,), regenerate="last"))
    prompts = source.load(tokenizer, Echo(tokenizer))
    runs = scored(tokenizer, prompts[0].input_ids.tolist(), prompts[0].loss_mask.tolist())
    assert len(runs) == 1 and runs[0].startswith("n") and runs[0].endswith("<|im_end|>")
    assert tokenizer.decode(prompts[1].input_ids.tolist()) == "hello there"
    with pytest.raises(ValueError, match="regenerate: wanted a target to write for 'last'"):
        source.load(tokenizer)


# Opening


def test_tokenizer_of_a_directory(tmp_path: Path) -> None:
    make_tokenizer().save_pretrained(tmp_path)
    tokenizer = open_tokenizer(str(tmp_path))
    assert tokenizer("hello")["input_ids"] == make_tokenizer()("hello")["input_ids"]
    assert tokenizer_hash(tokenizer) == tokenizer_hash(open_tokenizer(str(tmp_path)))


def test_tokenizers_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="model: wanted a directory with a tokenizer, got '/no"):
        open_tokenizer("/no/such/place")
    with pytest.raises(ValueError, match=r"model: found no tokenizer in"):
        open_tokenizer(str(tmp_path))
    shutil.copy(demo_target_path() / "config.json", tmp_path)
    with pytest.raises(ValueError, match=r"found no tokenizer in .*: its vocabulary is empty"):
        open_tokenizer(str(tmp_path))


def test_kinds_of_prompts() -> None:
    assert sorted(PROMPTS) == ["jsonl", "python_stdlib"]
    assert PROMPTS.get("python_stdlib") is PythonStdlibPrompts
    with pytest.raises(ValueError, match="did you mean 'max_length'"):
        parse(JsonlConfig, {"paths": ["a"], "max_lenght": 3})
