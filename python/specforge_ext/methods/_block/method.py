"""What the methods with block drafts share of `methods.base.Method`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Generic, TypeVar

from torch import nn

from specforge_ext.methods._block.model import BlockBackbone
from specforge_ext.methods._common import as_draft
from specforge_ext.records import DraftVocab, Prompt, TargetSpec

Draft = TypeVar("Draft", bound=BlockBackbone)


class BlockMethod(Generic[Draft]):
    """name, draft_type: the method's own, of the class."""

    name: str
    draft_type: type[Draft]

    def vocab(self, prompts: Iterable[Prompt], target: TargetSpec) -> DraftVocab:
        """The whole one: the head is the target's."""
        return DraftVocab.full(target.vocab_size)

    def shard_units(self, draft: nn.Module) -> Sequence[nn.Module]:
        """The layers, each called once a micro-batch."""
        return tuple(self._mine(draft).layers)

    def recompute_units(self, draft: nn.Module) -> Sequence[nn.Module]:
        """The layers."""
        return tuple(self._mine(draft).layers)

    def _mine(self, draft: nn.Module) -> Draft:
        """TypeError if it is another method's."""
        return as_draft(draft, self.draft_type, method=self.name)
