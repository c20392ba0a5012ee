"""EAGLE-3 (arXiv 2503.01840)."""

from specforge_ext.methods._fused.shape import default_aux_layer_ids
from specforge_ext.methods._fused.vocab import build_draft_vocab, count_scored_tokens
from specforge_ext.methods.eagle3.config import Eagle3Config
from specforge_ext.methods.eagle3.method import Eagle3Method

__all__ = [
    "Eagle3Config",
    "Eagle3Method",
    "build_draft_vocab",
    "count_scored_tokens",
    "default_aux_layer_ids",
]
