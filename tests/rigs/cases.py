"""Which methods the rigs serve: a line in CASES each, and a recipe that trains a draft of it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Case:
    """How a method's draft is trained and served.

    recipe, assignments: of `specforge_ext.train`. depth: tokens drafted a step.
    vllm: method of --speculative-config; sglang: value of --speculative-algorithm; None where the
    server has no such method. block: drafts a block in one pass. parallel: so does a chain, which
    vLLM wants to be told. more: further --speculative-* arguments of SGLang.
    """

    name: str
    depth: int
    recipe: str = "demo"
    assignments: tuple[str, ...] = ()
    vllm: str | None = None
    sglang: str | None = None
    block: bool = False
    parallel: bool = False
    more: tuple[tuple[str, str], ...] = ()

    def vllm_config(self, draft: str) -> dict[str, object]:
        parallel = {"parallel_drafting": True} if self.parallel else {}
        return {
            "method": self.vllm,
            "model": draft,
            "num_speculative_tokens": self.depth,
            **parallel,
        }

    def sglang_arguments(self, draft: str) -> list[str]:
        """SGLang counts the known token among those of a verify step."""
        arguments = {
            "algorithm": self.sglang,
            "draft-model-path": draft,
            "num-draft-tokens": self.depth + 1,
            **dict(self.more),
        }
        if not self.block:
            arguments |= {"num-steps": self.depth, "eagle-topk": 1}
        return [w for key, value in arguments.items() for w in (f"--speculative-{key}", str(value))]


WHOLE_VOCABULARY = (("domino-candidate-pool-size", "0"),)
"""Domino's correction is then of all words, not of the 2048 that the base logits like best."""
LEARNT_BY_HEART = (
    "data.train.split=heldout",
    "data.train.num_prompts=64",
    "data.generate.temperature=0",
    "order.epochs=32",
)
"""Trains on the very texts that servers are then asked for: no measure of a draft, but one that is
right at every depth, so that a position that is off by one anywhere shows.
"""
CASES = (
    Case("eagle3", depth=4, assignments=("order.epochs=2",), vllm="eagle3", sglang="EAGLE3"),
    Case(  # layers that are not the servers' defaults, so that an index that is off by one shows
        "eagle3_layers",
        depth=4,
        assignments=("order.epochs=1", "method.aux_layer_ids=[1,3,6]"),
        vllm="eagle3",
        sglang="EAGLE3",
    ),
    Case(
        "peagle",
        depth=4,
        recipe="demo-peagle",
        assignments=("order.epochs=1",),
        vllm="eagle3",
        parallel=True,
    ),
    Case(
        "dflash",
        depth=5,
        recipe="demo-dflash",
        assignments=LEARNT_BY_HEART,
        vllm="dflash",
        sglang="DFLASH",
        block=True,
    ),
    Case(
        "domino",
        depth=5,
        recipe="demo-domino",
        assignments=("order.epochs=2",),
        sglang="DFLASH",
        block=True,
        more=WHOLE_VOCABULARY,
    ),
    # SGLang drafts as many tokens as a block has.
    Case(
        "dspark",
        depth=5,
        recipe="demo-dspark",
        assignments=("order.epochs=1",),
        sglang="DSPARK",
        block=True,
    ),
)
VLLM = [case for case in CASES if case.vllm]
SGLANG = [case for case in CASES if case.sglang]
