"""One DFlash training step, forward and backward, against SpecForge's own model and loss.

    python benchmarks/step_dflash.py [--quick] [--json FILE]        (after `make peers`)

Both get the same float32 weights, the same batch (conversations of 512 tokens in four turns, 40 %
of the tokens scored; the second case has four of them of different lengths, which SpecForge pads)
and the same anchors. Losses and gradients are compared before anything is timed. One thread.

SpecForge runs as on a CPU: SDPA with a dense mask; `specforge/eager` with its eager attention. Its
frozen embedding and head are the target's, as in ours.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import importlib.util
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from common import BenchScript, Report, time_interleaved
from specforge_ext.methods._block.plan import Anchors, draw
from specforge_ext.methods.dflash import DFlashConfig, DFlashMethod
from specforge_ext.records import (
    DraftVocab,
    PackedBatch,
    StepContext,
    TargetSpec,
    TargetWeights,
    lengths_to_cu_seqlens,
)

HIDDEN, FFN, HEADS, KV_HEADS, HEAD_DIM, VOCAB = 512, 1536, 8, 4, 64, 32000
TARGET_LAYERS, LAYERS, BLOCK, GAMMA = 36, 5, 16, 7.0
TURNS, SCORED_SHARE = 4, 0.4
CASES: dict[str, tuple[tuple[int, ...], int]] = {
    "512 tokens, 64 anchors": ((512,), 64),
    "4 ragged, 32 anchors each": ((512, 384, 256, 128), 32),
}
"""Lengths of the samples, anchors of each."""
QUICK_CASE = "512 tokens, 64 anchors"
BASELINE = "specforge"

Step = Callable[[], tuple[Tensor, dict[str, Tensor]]]
"""One forward and backward; gives the loss and the gradients by public names."""


@dataclass(frozen=True)
class Problem:
    """What both implementations get. parameters: the draft's, under the names that engines load."""

    weights: TargetWeights
    batch: PackedBatch
    anchors: Anchors
    num_anchors: int
    parameters: dict[str, Tensor]


def make_problem(case: str) -> Problem:
    lengths, num_anchors = CASES[case]
    generator = torch.Generator().manual_seed(0)

    def rand(*shape: int, std: float = 0.02) -> Tensor:
        return torch.empty(shape).normal_(std=std, generator=generator)

    weights = TargetWeights(
        spec=target_spec(),
        embed_tokens=rand(VOCAB, HIDDEN, std=0.5),
        lm_head=rand(VOCAB, HIDDEN),
        final_norm=torch.ones(HIDDEN),
    )
    tokens = sum(lengths)
    batch = PackedBatch(
        sample_ids=tuple(f"conversation{k}" for k in range(len(lengths))),
        lengths=lengths,
        input_ids=torch.randint(VOCAB - 1, (tokens,), generator=generator),
        loss_mask=torch.cat([scored_mask(n) for n in lengths]),
        positions=torch.cat([torch.arange(n) for n in lengths]),
        features={"hidden": rand(tokens, LAYERS * HIDDEN, std=1.0)},
        cu_seqlens=lengths_to_cu_seqlens(lengths),
    )
    draft = our_method(num_anchors).build(weights, DraftVocab.full(VOCAB), seed=0)
    parameters = {
        name: p.detach() + (rand(*p.shape) if p.dim() == 1 else 0)
        for name, p in draft.named_parameters()
    }
    at = draw(batch, StepContext(step=0, total_steps=1, seed=0), num_anchors=num_anchors)
    return Problem(weights, batch, at, num_anchors, parameters)


def target_spec() -> TargetSpec:
    return TargetSpec(
        name="random",
        model_type="qwen3",
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=FFN,
        num_layers=TARGET_LAYERS,
        num_heads=HEADS,
        num_kv_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        rms_norm_eps=1e-6,
        rope_theta=10000.0,
        rope_scaling=None,
        max_position_embeddings=2048,
        dtype="float32",
    )


def scored_mask(length: int) -> Tensor:
    """[length] uint8: in each turn the answer, its last 40 %, but never the last token of all."""
    turn = length // TURNS
    mask = (torch.arange(length) % turn >= round(turn * (1 - SCORED_SHARE))).to(torch.uint8)
    mask[-1] = 0
    return mask


def our_method(num_anchors: int) -> DFlashMethod:
    return DFlashMethod(
        DFlashConfig(
            block_size=BLOCK,
            num_anchors=num_anchors,
            num_layers=LAYERS,
            gamma=GAMMA,
            mask_token_id=VOCAB - 1,
        )
    )


def our_step(problem: Problem) -> Step:
    method = our_method(problem.num_anchors)
    draft = method.build(problem.weights, DraftVocab.full(VOCAB), seed=0)
    draft.load_state_dict(problem.parameters)
    at = StepContext(step=0, total_steps=1, seed=0)

    def step() -> tuple[Tensor, dict[str, Tensor]]:
        draft.zero_grad(set_to_none=True)
        result = method.step(draft, problem.batch, at)
        loss = result.loss_sum / result.weight_sum
        loss.backward()
        return loss.detach(), gradients(draft)

    return step


def specforge_step(problem: Problem, *, attention: str) -> Step:
    """SpecForge's own classes, from the installed package, with our anchors."""
    import_specforge()
    from specforge.algorithms.common.dflash_family_model import OnlineDFlashModel
    from specforge.modeling.draft.dflash import DFlashDraftModel
    from transformers import Qwen3Config

    method = our_method(problem.num_anchors)
    draft = method.build(problem.weights, DraftVocab.full(VOCAB), seed=0)
    checkpoint = method.export(draft, problem.weights.spec, dtype=torch.float32)
    config = Qwen3Config.from_dict(
        {k: v for k, v in checkpoint.config.items() if k not in ("specforge_ext", "torch_dtype")}
    )
    config._attn_implementation = attention
    theirs = DFlashDraftModel(config).float()
    theirs.load_state_dict(problem.parameters)
    head, embedding = (
        module.requires_grad_(False)
        for module in (nn.Linear(HIDDEN, VOCAB, bias=False), nn.Embedding(VOCAB, HIDDEN))
    )
    head.weight.data, embedding.weight.data = problem.weights.lm_head, problem.weights.embed_tokens
    model = OnlineDFlashModel(
        theirs,
        head,
        embedding,
        mask_token_id=VOCAB - 1,
        block_size=BLOCK,
        attention_backend=attention,
        num_anchors=problem.num_anchors,
        loss_decay_gamma=GAMMA,
    )
    padded = {name: pad(x, problem.batch.lengths) for name, x in tensors(problem.batch).items()}
    anchors = padded_anchors(problem.batch, problem.anchors)
    model._sample_anchor_positions = lambda *_: anchors

    def step() -> tuple[Tensor, dict[str, Tensor]]:
        theirs.zero_grad(set_to_none=True)
        loss = model(**padded)[0]
        loss.backward()
        return loss.detach(), gradients(theirs)

    return step


def tensors(batch: PackedBatch) -> dict[str, Tensor]:
    return {
        "input_ids": batch.input_ids,
        "loss_mask": batch.loss_mask.float(),
        "hidden_states": batch.features["hidden"],
    }


def pad(x: Tensor, lengths: Sequence[int]) -> Tensor:
    return pad_sequence(x.split(list(lengths)), batch_first=True)


def padded_anchors(batch: PackedBatch, anchors: Anchors) -> tuple[Tensor, Tensor]:
    """[B, A] places in their samples, 0 where there is none, and [B, A] bool: where there is."""
    starts = batch.cu_seqlens[:-1].tolist()
    own = anchors.places.long().split(anchors.bounds.diff().tolist())
    places = [x - start for x, start in zip(own, starts, strict=True)]
    keep = pad_sequence([torch.ones(len(x)) for x in own], batch_first=True).bool()
    return pad_sequence(places, batch_first=True), keep


def import_specforge() -> None:
    if importlib.util.find_spec("specforge") is None:
        raise SystemExit("SpecForge is not installed: run `make peers` (benchmarks/peers.txt)")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import specforge.algorithms.common.dflash_family_model  # noqa: F401


def gradients(draft: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in draft.named_parameters() if p.grad is not None}


IMPLS: dict[str, Callable[[Problem], Step]] = {
    "specforge": lambda problem: specforge_step(problem, attention="sdpa"),
    "specforge/eager": lambda problem: specforge_step(problem, attention="eager"),
    "specforge_ext": our_step,
}


def check(results: dict[str, tuple[Tensor, dict[str, Tensor]]]) -> None:
    """Losses to 1e-5, gradients to 1e-4 of each tensor's largest value; RuntimeError otherwise."""
    loss, expected = results[BASELINE]
    for impl, (got_loss, got) in results.items():
        loss_error = float((got_loss - loss).abs() / loss.abs())
        errors = {
            name: float((got[name] - g).abs().max() / g.abs().max()) for name, g in expected.items()
        }
        worst = max(errors, key=errors.__getitem__)
        if loss_error > 1e-5 or errors[worst] > 1e-4:
            raise RuntimeError(
                f"{impl} differs from {BASELINE}: loss {loss_error:.1e}, {worst} "
                f"{errors[worst]:.1e}"
            )


def child(script: BenchScript, case: str, impl: str) -> None:
    if impl.startswith("specforge/") or impl == "specforge":
        import_specforge()  # imports are no part of the peak

    def call() -> None:
        step: Any = IMPLS[impl](make_problem(case))
        for _ in range(1 if script.quick else 2):  # from the second on, as in a training loop
            step()

    script.answer_peak(call, torch.device("cpu"))


def main() -> None:
    torch.set_num_threads(1)
    script = BenchScript("One DFlash training step against SpecForge's.")
    if script.peak:
        child(script, *script.peak)
        return
    report = Report("step_dflash", baseline=BASELINE)
    impls = [name for name in IMPLS if not script.quick or name != "specforge/eager"]
    for case in [QUICK_CASE] if script.quick else CASES:
        # First, so that never two implementations' memory has to fit at a time.
        peaks = {name: script.peak_bytes(case, name) for name in impls}
        problem = make_problem(case)
        steps = {name: IMPLS[name](problem) for name in impls}
        results = {name: step() for name, step in steps.items()}
        check(results)
        losses = {name: loss.item() for name, (loss, _) in results.items()}
        del results
        timings = time_interleaved(steps, rounds=2 if script.quick else 7, warmup=0)
        for name in impls:
            blocks = problem.anchors.places.numel()
            report.add(case, name, timings[name], peaks[name], loss=losses[name], blocks=blocks)
    if script.json:
        report.write(script.json)


if __name__ == "__main__":
    main()
