"""Data that ships inside the package."""

from __future__ import annotations

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
