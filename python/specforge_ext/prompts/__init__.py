"""Prompts: texts -> token ids + loss mask. A new kind is a class and a line here."""

from specforge_ext.prompts.base import (
    Generate,
    PromptSet,
    PromptSource,
    Skipped,
    build_training_prompts,
)
from specforge_ext.registry import Registry

PROMPTS = Registry("prompt kind")
PROMPTS.add("jsonl", "specforge_ext.prompts.sources:JsonlPrompts")
PROMPTS.add("python_stdlib", "specforge_ext.prompts.sources:PythonStdlibPrompts")

__all__ = [
    "PROMPTS",
    "Generate",
    "PromptSet",
    "PromptSource",
    "Skipped",
    "build_training_prompts",
]
