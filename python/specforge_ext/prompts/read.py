"""JSONL files of conversations, texts or token ids."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}
"""Spellings of roles in {"from", "value"} data; others are kept."""

MAX_TOKEN_ID = 2**31 - 1


@dataclass(frozen=True)
class Conversation:
    """messages: at least one; each has "role" and "content" (strings), other keys are kept."""

    where: str
    messages: tuple[Mapping[str, Any], ...]


@dataclass(frozen=True)
class Text:
    where: str
    text: str


@dataclass(frozen=True)
class Tokens:
    """A text that is tokenised already. loss_mask: 0 or 1, one per id."""

    where: str
    input_ids: tuple[int, ...]
    loss_mask: tuple[int, ...]


Record = Conversation | Text | Tokens


def read_jsonl(path: Path) -> Iterator[Record]:
    """Records of a UTF-8 file, one JSON object a line; empty lines are passed over.

    Known objects: {"conversations": [...]}, {"messages": [...]}, {"text": ...} and {"input_ids":
    [...], "loss_mask": [...]}; a message is {"role", "content"} or {"from", "value"}. Other keys of
    the object are ignored. ValueError names the file, the line, the key, what was wanted and what
    came.
    """
    check_file(path)
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield parse_record(line, where=f"{path}:{number}")


def check_file(path: Path) -> None:
    """ValueError if there is no such file."""
    if not path.is_file():
        raise ValueError(f"paths: wanted a JSONL file, found none at {str(path)!r}")


def parse_record(line: bytes, *, where: str) -> Record:
    """One line of such a file."""
    try:
        data = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: wanted one JSON object in UTF-8, got {error}") from None
    if not isinstance(data, dict):
        raise ValueError(f"{where}: wanted a JSON object, got {_brief(data)}")
    for key in ("conversations", "messages"):
        if key in data:
            return Conversation(where, _messages(data[key], key, where))
    if "text" in data:
        return Text(where, _string(data["text"], "text", where))
    if "input_ids" in data:
        return _tokens(data, where)
    raise ValueError(
        f"{where}: wanted one of the keys conversations, messages, text, input_ids; "
        f"got {', '.join(map(repr, data)) or 'none'}"
    )


def _messages(value: object, key: str, where: str) -> tuple[Mapping[str, Any], ...]:
    if not isinstance(value, list) or not value:
        raise ValueError(f"{where}: {key}: wanted a list of messages, got {_brief(value)}")
    return tuple(_message(item, f"{key}[{i}]", where) for i, item in enumerate(value))


def _message(value: object, key: str, where: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{where}: {key}: wanted an object, got {_brief(value)}")
    sharegpt = "from" in value
    role_key, content_key = ("from", "value") if sharegpt else ("role", "content")
    role = _string(value.get(role_key), f"{key}.{role_key}", where)
    content = _string(value.get(content_key), f"{key}.{content_key}", where)
    rest = {k: v for k, v in value.items() if k not in (role_key, content_key)}
    return {
        "role": SHAREGPT_ROLES.get(role, role) if sharegpt else role,
        "content": content,
        **rest,
    }


def _tokens(data: Mapping[str, object], where: str) -> Tokens:
    ids = _integers(data["input_ids"], "input_ids", where, high=MAX_TOKEN_ID)
    mask = _integers(data.get("loss_mask"), "loss_mask", where, high=1)
    if len(ids) != len(mask):
        raise ValueError(
            f"{where}: loss_mask: wanted {len(ids)} values, as many as input_ids, got {len(mask)}"
        )
    return Tokens(where, ids, mask)


def _integers(value: object, key: str, where: str, *, high: int) -> tuple[int, ...]:
    if not isinstance(value, list):
        raise ValueError(f"{where}: {key}: wanted a list of integers, got {_brief(value)}")
    for index, item in enumerate(value):
        # bool is an int to Python, but not to a reader of token ids.
        if type(item) is not int or not 0 <= item <= high:
            raise ValueError(
                f"{where}: {key}[{index}]: wanted an integer in 0..{high}, got {_brief(item)}"
            )
    return tuple(value)


def _string(value: object, key: str, where: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{where}: {key}: wanted a string, got {_brief(value)}")
    return value


def _brief(value: object) -> str:
    text = json.dumps(value)
    return "nothing" if value is None else text if len(text) <= 60 else f"{text[:57]}..."
