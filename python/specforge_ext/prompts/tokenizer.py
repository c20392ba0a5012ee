"""The target's tokenizer."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from specforge_ext.prompts.base import Tokenizer

DEMO = "demo"


def open_tokenizer(model: str) -> Tokenizer:
    """The fast tokenizer of a directory, of a hub name, or of "demo", the target in the package.

    ValueError if there is none: character offsets, which loss masks need, come from fast ones only.
    """
    # transformers takes seconds to import, and most of the package does without it.
    from transformers import AutoTokenizer

    path = model
    if model == DEMO:
        from specforge_ext.assets import demo_target_path

        path = str(demo_target_path())
    if path.startswith(("/", "./", "../", "~")) and not Path(path).expanduser().is_dir():
        raise ValueError(f"model: wanted a directory with a tokenizer, got {path!r}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=model == DEMO)
    except (OSError, ValueError) as error:
        raise ValueError(f"model: found no tokenizer in {path!r}: {error}") from error
    if not tokenizer.is_fast:
        raise ValueError(
            f"model: wanted a fast tokenizer (tokenizer.json) in {path!r}, "
            f"got {type(tokenizer).__name__}"
        )
    if len(tokenizer.backend_tokenizer.get_vocab(with_added_tokens=False)) < 2:
        # transformers makes an empty one where the files are missing.
        raise ValueError(f"model: found no tokenizer in {path!r}: its vocabulary is empty")
    return tokenizer


def tokenizer_hash(tokenizer: Tokenizer) -> str:
    """Hexadecimal SHA-256 of all that decides how a conversation becomes ids."""
    parts = [
        tokenizer.backend_tokenizer.to_str(),
        json.dumps(tokenizer.chat_template, sort_keys=True),
        json.dumps(tokenizer.special_tokens_map, sort_keys=True, default=str),
    ]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()
