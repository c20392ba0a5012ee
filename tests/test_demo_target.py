"""The embedded demo target: it loads, is small, and is as good as its record says."""

from __future__ import annotations

import json
import platform
import re
from pathlib import PurePosixPath
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from specforge_ext.assets import demo_target_path
from specforge_ext.prompts.python_stdlib import (
    MIN_BYTES,
    in_corpus,
    read_source,
    split_of,
    stdlib_files,
)

WINDOW = 256
LOSS_FILES = ("doctest.py", "modulefinder.py", "compileall.py")
SAME_FILES_TOLERANCE = 0.01
OTHER_VERSION_TOLERANCE = 0.15
CHAT = [
    {"role": "system", "content": "You write Python."},
    {"role": "user", "content": "Write this function.\ndef add(a, b):"},
    {"role": "assistant", "content": "def add(a, b):\n    return a + b"},
    {"role": "user", "content": "Write this function.\ndef one():"},
    {"role": "assistant", "content": "def one():\n    return 1"},
]


def load_target() -> Any:
    """Return the target in float32, so that the losses do not depend on the CPU's bfloat16."""
    target: Any = AutoModelForCausalLM.from_pretrained(demo_target_path(), dtype=torch.float32)
    return target.eval()


@pytest.fixture(scope="module")
def model() -> Any:
    return load_target()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(demo_target_path())


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    text = (demo_target_path() / "TRAINING.json").read_text(encoding="utf-8")
    loaded: dict[str, Any] = json.loads(text)
    return loaded


@torch.no_grad()
def loss_of(model: Any, tokens: torch.Tensor) -> float:
    """Return the mean loss in nats per token over whole windows of ``tokens``, ``[tokens]``."""
    rows = tokens[: (len(tokens) - 1) // WINDOW * WINDOW + 1].unfold(0, WINDOW + 1, WINDOW)
    logits = model(input_ids=rows[:, :-1]).logits
    return float(F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()))


def heldout_tokens(tokenizer: Any, name: str) -> torch.Tensor:
    """Return the ids of a held-out file of the library's root; skip where it is not installed."""
    by_name = {path.name: path for path in stdlib_files("heldout")}
    if name not in by_name:
        pytest.skip(f"this Python has no held-out {name}")
    ids = tokenizer(read_source(by_name[name]), add_special_tokens=False)["input_ids"]
    return torch.tensor(ids)


def test_is_a_small_qwen3(model: Any) -> None:
    assert model.config.architectures == ["Qwen3ForCausalLM"]
    assert model.config.tie_word_embeddings
    assert model.num_parameters() < 2_000_000
    size = sum(path.stat().st_size for path in demo_target_path().iterdir())
    assert size <= 8_000_000


def test_weights_ship_in_bfloat16() -> None:
    stored = AutoModelForCausalLM.from_pretrained(demo_target_path(), dtype="auto")
    assert {parameter.dtype for parameter in stored.parameters()} == {torch.bfloat16}


def test_default_auxiliary_layers_are_distinct(model: Any) -> None:
    layers = model.config.num_hidden_layers
    chosen = [2, layers // 2, layers - 3]
    assert len(set(chosen)) == 3
    assert all(0 <= layer < layers for layer in chosen)


@pytest.mark.parametrize("name", LOSS_FILES)
def test_heldout_loss_is_the_recorded_one(
    model: Any, tokenizer: Any, record: dict[str, Any], name: str
) -> None:
    measured = loss_of(model, heldout_tokens(tokenizer, name))
    same_files = platform.python_version() == record["python"]
    tolerance = SAME_FILES_TOLERANCE if same_files else OTHER_VERSION_TOLERANCE
    assert measured == pytest.approx(record["heldout_file_losses"][name], abs=tolerance)


def test_damaged_weights_are_noticed(tokenizer: Any, record: dict[str, Any]) -> None:
    """The first layer without its attention has a loss beyond the wider tolerance."""
    damaged = load_target()
    with torch.no_grad():
        damaged.model.layers[0].self_attn.o_proj.weight.zero_()
    name = "modulefinder.py"
    measured = loss_of(damaged, heldout_tokens(tokenizer, name))
    assert measured > record["heldout_file_losses"][name] + OTHER_VERSION_TOLERANCE


def test_predicts_unseen_text_from_its_context(model: Any, tokenizer: Any) -> None:
    """The held-out loss is 2 nats below that of the file's own best context-free guess."""
    tokens = heldout_tokens(tokenizer, "doctest.py")
    share = tokens.bincount().float() / len(tokens)
    entropy = float(torch.special.entr(share).sum())
    assert loss_of(model, tokens) < entropy - 2.0


def test_record_is_of_the_run_that_its_command_makes(record: dict[str, Any]) -> None:
    stopped = re.search(r"--stop-after (\d+)", record["command"])
    assert record["steps"] == (int(stopped[1]) if stopped else record["steps_of_schedule"])


def test_heldout_text_is_not_memorised(record: dict[str, Any]) -> None:
    gap = record["heldout_loss_nats_per_token"] - record["train_loss_nats_per_token"]
    assert 0.0 < gap < 0.6


def test_splits_are_disjoint_and_sized() -> None:
    train, heldout = stdlib_files("train"), stdlib_files("heldout")
    assert set(train).isdisjoint(heldout)
    assert 0.05 < len(heldout) / (len(train) + len(heldout)) < 0.15
    assert all(path.stat().st_size >= MIN_BYTES for path in train + heldout)
    with pytest.raises(ValueError, match="validation"):
        stdlib_files("validation")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("doctest.py", True),
        ("json/decoder.py", True),
        ("test/test_ast.py", False),
        ("unittest/test/test_case.py", False),
        ("idlelib/idle_test/test_run.py", False),
        ("site-packages/torch/__init__.py", False),
        ("encodings/cp037.py", False),
        ("_sysconfigdata__linux_x86_64-linux-gnu.py", False),
        ("LICENSE.txt", False),
    ],
)
def test_corpus_membership(path: str, expected: bool) -> None:
    assert in_corpus(PurePosixPath(path)) is expected


def test_split_depends_on_the_path_alone() -> None:
    assert split_of(PurePosixPath("doctest.py")) == "heldout"
    assert split_of(PurePosixPath("argparse.py")) == "train"


@pytest.mark.parametrize("text", ["def f(x):\n\treturn 'é' + \"日本\"\r\n", "    \n\n  a  b\n"])
def test_tokenizer_is_lossless(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_special_tokens_are_single_ids(model: Any, tokenizer: Any) -> None:
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    ids = [tokenizer(special)["input_ids"] for special in specials]
    assert all(len(row) == 1 for row in ids)
    assert len(tokenizer) == model.config.vocab_size
    assert set(model.generation_config.eos_token_id) == {ids[0][0], ids[2][0]}


def test_chat_template_marks_what_the_assistant_says(tokenizer: Any) -> None:
    encoded = tokenizer.apply_chat_template(
        CHAT, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    marked = [
        token
        for token, mark in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True)
        if mark
    ]
    spoken = [turn["content"] + "<|im_end|>" for turn in CHAT if turn["role"] == "assistant"]
    assert tokenizer.decode(marked) == "".join(spoken)


def test_generation_prompt_is_a_prefix_of_the_answered_chat(tokenizer: Any) -> None:
    asked = tokenizer.apply_chat_template(CHAT[:2], tokenize=False, add_generation_prompt=True)
    answered = tokenizer.apply_chat_template(CHAT[:3], tokenize=False)
    assert answered.startswith(asked + CHAT[2]["content"])


@torch.no_grad()
def test_a_chat_ends(model: Any, tokenizer: Any) -> None:
    """Chats were trained on: sampled answers to a short signature mostly end by themselves."""
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Write this function.\ndef __repr__(self):"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    torch.manual_seed(0)
    rows = model.generate(
        **ids, do_sample=True, temperature=0.8, max_new_tokens=120, num_return_sequences=8
    )
    ended = (rows[:, ids["input_ids"].shape[1] :] == tokenizer.eos_token_id).any(dim=1)
    assert int(ended.sum()) >= 4
