"""One DSpark training step, forward and backward, against SpecForge's own model and loss.

    python benchmarks/step_dspark.py [--quick] [--json FILE]       (after `make peers`)

As benchmarks/step_dflash.py, whose problem this is, with a vanilla Markov head of rank 256 and a
confidence head over it, and the target's last states beside the features.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

import step_dflash as dflash
from common import BenchScript, Report, time_interleaved
from specforge_ext.methods.dspark import DSparkConfig, DSparkMethod
from specforge_ext.records import DraftVocab

RANK = 256


def make_problem(case: str) -> dflash.Problem:
    problem = dflash.make_problem(case)
    generator = torch.Generator().manual_seed(1)
    last = torch.randn(problem.batch.num_tokens, dflash.HIDDEN, generator=generator)
    draft = our_method(problem).build(problem.weights, DraftVocab.full(dflash.VOCAB), seed=0)
    own = {name: p.detach() for name, p in draft.named_parameters() if "_head." in name}
    return replace(
        problem,
        batch=replace(problem.batch, features={**problem.batch.features, "last": last}),
        parameters={**problem.parameters, **own},
    )


def our_method(problem: dflash.Problem) -> DSparkMethod:
    return DSparkMethod(
        DSparkConfig(
            block_size=dflash.BLOCK,
            num_anchors=problem.num_anchors,
            num_layers=dflash.LAYERS,
            gamma=dflash.GAMMA,
            mask_token_id=dflash.VOCAB - 1,
            markov_rank=RANK,
        )
    )


def our_step(problem: dflash.Problem) -> dflash.Step:
    method = our_method(problem)
    draft = method.build(problem.weights, DraftVocab.full(dflash.VOCAB), seed=0)
    draft.load_state_dict(problem.parameters)

    def step() -> tuple[Tensor, dict[str, Tensor]]:
        draft.zero_grad(set_to_none=True)
        result = method.step_at(draft, problem.batch, problem.anchors)
        loss = result.loss_sum / result.weight_sum
        loss.backward()
        return loss.detach(), dflash.gradients(draft)

    return step


def specforge_step(problem: dflash.Problem) -> dflash.Step:
    """SpecForge's own classes, from the installed package, with our anchors."""
    dflash.import_specforge()
    from specforge.algorithms.common.dflash_family_model import OnlineDSparkModel
    from specforge.modeling.draft.dspark import DSparkDraftModel
    from transformers import Qwen3Config

    method = our_method(problem)
    draft = method.build(problem.weights, DraftVocab.full(dflash.VOCAB), seed=0)
    stored = dict(method.export(draft, problem.weights.spec, dtype=torch.float32).config)
    section = {
        "projector_type": "dspark",
        "markov_rank": RANK,
        "markov_head_type": "vanilla",
        "enable_confidence_head": True,
        "confidence_head_with_markov": True,
    }
    stored["dflash_config"] = {**stored["dflash_config"], **section}  # type: ignore[dict-item]
    config = Qwen3Config.from_dict(
        {k: v for k, v in stored.items() if k not in ("specforge_ext", "torch_dtype")}
    )
    config._attn_implementation = "sdpa"
    theirs = DSparkDraftModel(config).float()
    theirs.load_state_dict(problem.parameters)
    shape = (dflash.VOCAB, dflash.HIDDEN)
    head, embedding = nn.Linear(*shape[::-1], bias=False), nn.Embedding(*shape)
    head.weight.data, embedding.weight.data = problem.weights.lm_head, problem.weights.embed_tokens
    model = OnlineDSparkModel(
        theirs,
        head.requires_grad_(False),
        embedding.requires_grad_(False),
        mask_token_id=dflash.VOCAB - 1,
        block_size=dflash.BLOCK,
        attention_backend="sdpa",
        num_anchors=problem.num_anchors,
        loss_decay_gamma=dflash.GAMMA,
    )
    lengths = problem.batch.lengths
    padded = {name: dflash.pad(x, lengths) for name, x in dflash.tensors(problem.batch).items()}
    padded["target_last_hidden_states"] = dflash.pad(problem.batch.features["last"], lengths)
    places, keep = dflash.padded_anchors(problem.batch, problem.anchors)
    model._sample_anchor_positions = lambda *_, **__: (places, keep)

    def step() -> tuple[Tensor, dict[str, Tensor]]:
        theirs.zero_grad(set_to_none=True)
        loss, *_ = model(**padded)
        loss.backward()
        return loss.detach(), dflash.gradients(theirs)

    return step


IMPLS: dict[str, Callable[[dflash.Problem], dflash.Step]] = {
    "specforge": specforge_step,
    "specforge_ext": our_step,
}


def child(script: BenchScript, case: str, impl: str) -> None:
    if impl == "specforge":
        dflash.import_specforge()  # imports are no part of the peak

    def call() -> None:
        step = IMPLS[impl](make_problem(case))
        for _ in range(1 if script.quick else 2):  # from the second on, as in a training loop
            step()

    script.answer_peak(call, torch.device("cpu"))


def main() -> None:
    torch.set_num_threads(1)
    script = BenchScript("One DSpark training step against SpecForge's.")
    if script.peak:
        child(script, *script.peak)
        return
    report = Report("step_dspark", baseline="specforge")
    for case in [dflash.QUICK_CASE] if script.quick else dflash.CASES:
        # First, so that never two implementations' memory has to fit at a time.
        peaks = {name: script.peak_bytes(case, name) for name in IMPLS}
        problem = make_problem(case)
        steps = {name: make(problem) for name, make in IMPLS.items()}
        results = {name: step() for name, step in steps.items()}
        dflash.check(results)
        losses = {name: loss.item() for name, (loss, _) in results.items()}
        del results
        timings = time_interleaved(steps, rounds=2 if script.quick else 7, warmup=0)
        for name in IMPLS:
            blocks = problem.anchors.places.numel()
            report.add(case, name, timings[name], peaks[name], loss=losses[name], blocks=blocks)
    if script.json:
        report.write(script.json)


if __name__ == "__main__":
    main()
