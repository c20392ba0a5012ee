"""Domino (arXiv 2605.29707)."""

from specforge_ext.methods.domino.config import DominoConfig
from specforge_ext.methods.domino.method import DominoMethod

__all__ = ["DominoConfig", "DominoMethod"]
