"""Prompts: the cache, sources, answers of the target, tokenizers."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from prompt_cases import (
    ALTERNATING,
    MARKED,
    PLAIN,
    chat,
    make_tokenizer,
    scored,
)
from specforge_ext.assets import demo_target_path
from specforge_ext.config import parse
from specforge_ext.prompts import PROMPTS, Skipped, build_training_prompts
from specforge_ext.prompts.base import build_set
from specforge_ext.prompts.cache import cached, content_key, load, save
from specforge_ext.prompts.python_stdlib import Split, read_source, stdlib_files
from specforge_ext.prompts.read import Conversation
from specforge_ext.prompts.regenerate import regenerate
from specforge_ext.prompts.sources import JsonlConfig, JsonlPrompts, PythonStdlibPrompts
from specforge_ext.prompts.template import ChatTemplate
from specforge_ext.prompts.tokenizer import open_tokenizer, tokenizer_hash

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
