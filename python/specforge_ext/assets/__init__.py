"""Data that ships inside the package."""

from __future__ import annotations

import json
from pathlib import Path


def demo_target_path() -> Path:
    """Return the folder of the embedded demo target.

    It is a Hugging Face model folder (a Qwen3 causal LM of 1.8 million parameters, bfloat16, and
    its tokenizer) trained on the standard library's sources; ``TRAINING.json`` says how.

    Raises:
        FileNotFoundError: the package was installed without its data.
    """
    folder = Path(__file__).resolve().parent / "demo_target"
    if not (folder / "model.safetensors").is_file():
        raise FileNotFoundError(f"the demo target's weights are missing from {folder}")
    return folder


def target_config(name: str) -> dict[str, object] | None:
    """What the public config.json of a hub model says of its shape, or None if it is not here.

    `source` says where the numbers are from. Weights are never here.
    """
    path = Path(__file__).resolve().parent / "targets.json"
    configs: dict[str, dict[str, object]] = json.loads(path.read_text(encoding="utf-8"))
    return configs.get(name)
