"""One EAGLE-3 training step, forward and backward, against SpecForge's own model and loss.

    python benchmarks/step.py [--quick] [--json FILE]        (after `make peers`)

Both get the same float32 weights and the same batch: one conversation of 512 tokens in four turns,
40 % of the tokens scored, seven steps, the teacher computed from hidden states. Losses and
gradients are compared before anything is timed. One thread.

SpecForge's loss is a Triton kernel, which a CPU cannot run; its place is taken by the reference
function that SpecForge keeps beside it. `specforge` runs without torch.compile,
`specforge/compiled` with the small functions compiled as SpecForge marks them (not with --quick:
compiling takes half a minute), and `specforge/compact-teacher` with its option that never holds the
teacher's full logits.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from common import BenchScript, Report, time_interleaved
from specforge_ext.methods.eagle3 import Eagle3Config, Eagle3Method
from specforge_ext.records import (
    DraftVocab,
    PackedBatch,
    StepContext,
    TargetSpec,
    TargetWeights,
    lengths_to_cu_seqlens,
)

HIDDEN, FFN, HEADS, KV_HEADS, HEAD_DIM = 512, 1536, 8, 4, 64
VOCAB, DRAFT_VOCAB = 32000, 16000
TOKENS, TURNS, TTT_LENGTH, STEP_DECAY = 512, 4, 7, 0.8
SCORED_SHARE = 0.4
CASE = f"{TOKENS} tokens, TTT {TTT_LENGTH}, {SCORED_SHARE:.0%} scored"

Step = Callable[[], tuple[Tensor, dict[str, Tensor]]]
"""One forward and backward; gives the loss and the gradients by public names."""


@dataclass(frozen=True)
class Problem:
    """What both implementations get. parameters: the draft's, under the names that engines load."""

    weights: TargetWeights
    vocab: DraftVocab
    batch: PackedBatch
    parameters: dict[str, Tensor]


def make_problem() -> Problem:
    generator = torch.Generator().manual_seed(0)

    def rand(*shape: int, std: float = 0.02) -> Tensor:
        return torch.empty(shape).normal_(std=std, generator=generator)

    t2d = torch.zeros(VOCAB, dtype=torch.bool)
    t2d[torch.randperm(VOCAB, generator=generator)[:DRAFT_VOCAB]] = True
    vocab = DraftVocab(t2d=t2d, d2t=t2d.nonzero()[:, 0] - torch.arange(DRAFT_VOCAB))
    weights = TargetWeights(
        spec=target_spec(),
        embed_tokens=rand(VOCAB, HIDDEN),
        lm_head=rand(VOCAB, HIDDEN),
        final_norm=torch.ones(HIDDEN),
    )
    said = vocab.target_ids[torch.randint(DRAFT_VOCAB, (TOKENS,), generator=generator)]
    other = torch.rand(TOKENS, generator=generator) < 0.02
    said[other] = torch.randint(VOCAB, (int(other.sum()),), generator=generator)
    q, kv = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    shapes = {
        "fc.weight": (HIDDEN, 3 * HIDDEN),
        "midlayer.self_attn.q_proj.weight": (q, 2 * HIDDEN),
        "midlayer.self_attn.k_proj.weight": (kv, 2 * HIDDEN),
        "midlayer.self_attn.v_proj.weight": (kv, 2 * HIDDEN),
        "midlayer.self_attn.o_proj.weight": (HIDDEN, q),
        "midlayer.mlp.gate_proj.weight": (FFN, HIDDEN),
        "midlayer.mlp.up_proj.weight": (FFN, HIDDEN),
        "midlayer.mlp.down_proj.weight": (HIDDEN, FFN),
        "lm_head.weight": (DRAFT_VOCAB, HIDDEN),
    }
    norms = ("input_layernorm", "hidden_norm", "post_attention_layernorm")
    parameters = {name: rand(*shape) for name, shape in shapes.items()}
    parameters |= {f"midlayer.{name}.weight": 1 + rand(HIDDEN) for name in norms}
    parameters["norm.weight"] = 1 + rand(HIDDEN)
    batch = PackedBatch(
        sample_ids=("conversation",),
        lengths=(TOKENS,),
        input_ids=said.roll(1),
        loss_mask=scored_mask(),
        positions=torch.arange(TOKENS),
        features={
            "aux": rand(TOKENS, 3 * HIDDEN, std=1.0),
            "last": 20 * weights.lm_head[said] + rand(TOKENS, HIDDEN, std=0.5),
        },
        cu_seqlens=lengths_to_cu_seqlens([TOKENS]),
    )
    return Problem(weights=weights, vocab=vocab, batch=batch, parameters=parameters)


def target_spec() -> TargetSpec:
    return TargetSpec(
        name="random",
        model_type="llama",
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=FFN,
        num_layers=32,
        num_heads=HEADS,
        num_kv_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        rms_norm_eps=1e-6,
        rope_theta=10000.0,
        rope_scaling=None,
        max_position_embeddings=2048,
        dtype="float32",
    )


def scored_mask() -> Tensor:
    """[TOKENS] uint8: in each turn the answer, its last 40 %, but never the last token of all."""
    turn = TOKENS // TURNS
    mask = (torch.arange(TOKENS) % turn >= round(turn * (1 - SCORED_SHARE))).to(torch.uint8)
    mask[-1] = 0
    return mask


def in_vocab_share(problem: Problem) -> float:
    """Share of rows whose teacher's most likely token the draft can say; few would flatter us."""
    logits = problem.batch.features["last"] @ problem.weights.lm_head.T
    return float(problem.vocab.t2d[logits.argmax(-1)].float().mean())


def our_step(problem: Problem, *, compaction: bool) -> Step:
    method = Eagle3Method(
        Eagle3Config(
            ttt_length=TTT_LENGTH,
            step_decay=STEP_DECAY,
            draft_vocab_size=DRAFT_VOCAB,
            denominator="all_positions_mean",
            compaction=compaction,
        )
    )
    draft = method.build(problem.weights, problem.vocab, seed=0)
    draft.load_state_dict(problem.parameters)

    def step() -> tuple[Tensor, dict[str, Tensor]]:
        draft.zero_grad(set_to_none=True)
        result = method.step(draft, problem.batch, StepContext(step=0, total_steps=1, seed=0))
        loss = result.loss_sum / result.weight_sum
        loss.backward()
        return loss.detach(), gradients(draft)

    return step


def specforge_step(problem: Problem, *, compact_teacher: bool) -> Step:
    """SpecForge's own classes, from the installed package."""
    from transformers import LlamaConfig

    eagle3 = import_specforge()
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=FFN,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        num_hidden_layers=1,
        rms_norm_eps=1e-6,
        max_position_embeddings=2048,
        draft_vocab_size=DRAFT_VOCAB,
        pad_token_id=0,
    )
    from specforge.modeling.draft.llama3_eagle import LlamaForCausalLMEagle3

    draft = LlamaForCausalLMEagle3(config, attention_backend="sdpa")
    embedding = {"embed_tokens.weight": problem.weights.embed_tokens}
    vocabulary = {"t2d": problem.vocab.t2d, "d2t": problem.vocab.d2t}
    draft.load_state_dict({**problem.parameters, **embedding, **vocabulary})
    draft.embed_tokens.weight.requires_grad_(False)
    model = eagle3.OnlineEagle3Model(draft, length=TTT_LENGTH, attention_backend="sdpa")
    batch, head = problem.batch, problem.weights.lm_head
    # SpecForge pairs position t with the token and the teacher at t + 1 before its model is called.
    input_ids = F.pad(batch.input_ids[1:], (0, 1))[None]
    last = F.pad(batch.features["last"][1:], (0, 0, 0, 1))[None]
    loss_mask = batch.loss_mask.long()[None, :, None]

    def step() -> tuple[Tensor, dict[str, Tensor]]:
        draft.zero_grad(set_to_none=True)
        teacher: dict[str, Any] = {"target": None if compact_teacher else F.linear(last, head)}
        if compact_teacher:
            teacher |= {"target_hidden_for_compact": last, "target_head_weight": head}
        losses = model(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            loss_mask=loss_mask,
            hidden_states=batch.features["aux"][None],
            **teacher,
        )[0]
        loss = torch.stack([STEP_DECAY**i * value for i, value in enumerate(losses)]).sum()
        loss.backward()
        return loss.detach(), gradients(draft)

    return step


def import_specforge() -> ModuleType:
    """SpecForge's EAGLE-3 model, with its torch reference in the place of its Triton loss."""
    if importlib.util.find_spec("specforge") is None:
        raise SystemExit("SpecForge is not installed: run `make peers` (benchmarks/peers.txt)")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import specforge.algorithms.eagle3.model as eagle3
        from specforge.core.loss import _compute_loss

    class ReferenceLoss:
        apply = staticmethod(_compute_loss)

    eagle3.LogSoftmaxLoss = ReferenceLoss
    module: ModuleType = eagle3
    return module


def gradients(draft: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in draft.named_parameters() if p.grad is not None}


IMPLS: dict[str, Callable[[Problem], Step]] = {
    "specforge": lambda problem: specforge_step(problem, compact_teacher=False),
    "specforge/compact-teacher": lambda problem: specforge_step(problem, compact_teacher=True),
    "specforge/compiled": lambda problem: specforge_step(problem, compact_teacher=False),
    "specforge_ext": lambda problem: our_step(problem, compaction=True),
    "specforge_ext/all-rows": lambda problem: our_step(problem, compaction=False),
}
EAGER = {name for name in IMPLS if name != "specforge/compiled"}
QUICK = {"specforge", "specforge_ext"}


def run(step: Step, impl: str) -> tuple[Tensor, dict[str, Tensor]]:
    with torch.compiler.set_stance("force_eager" if impl in EAGER else "default"):
        return step()


def check(results: dict[str, tuple[Tensor, dict[str, Tensor]]]) -> None:
    """Losses to 1e-5, gradients to 1e-4 of each tensor's largest value; RuntimeError otherwise."""
    loss, expected = results["specforge"]
    for impl, (got_loss, got) in results.items():
        loss_error = float((got_loss - loss).abs() / loss.abs())
        errors = {
            name: float((got[name] - g).abs().max() / g.abs().max()) for name, g in expected.items()
        }
        worst = max(errors, key=errors.__getitem__)
        if loss_error > 1e-5 or errors[worst] > 1e-4:
            raise RuntimeError(
                f"{impl} differs from specforge: loss {loss_error:.1e}, {worst} {errors[worst]:.1e}"
            )


def child(script: BenchScript, impl: str) -> None:
    if impl.startswith("specforge/") or impl == "specforge":
        import_specforge()  # imports are no part of the peak

    def call() -> None:
        step = IMPLS[impl](make_problem())
        for _ in range(1 if script.quick else 2):  # from the second on, as in a training loop
            run(step, impl)

    script.answer_peak(call, torch.device("cpu"))


def main() -> None:
    torch.set_num_threads(1)
    script = BenchScript("One EAGLE-3 training step against SpecForge's.")
    if script.peak:
        child(script, script.peak[1])
        return
    impls = [name for name in IMPLS if not script.quick or name in QUICK]
    # First, so that never two implementations' memory has to fit at a time.
    peaks = {name: script.peak_bytes(CASE, name) for name in impls if name in EAGER}
    problem = make_problem()
    share = in_vocab_share(problem)
    if share < 0.95:
        raise RuntimeError(f"teacher's argmax in the draft vocabulary on {share:.1%} of rows only")
    steps = {name: IMPLS[name](problem) for name in impls}
    results = {name: run(step, name) for name, step in steps.items()}
    check(results)
    losses = {name: loss.item() for name, (loss, _) in results.items()}
    del results
    report = Report("step", baseline="specforge")
    timings = time_interleaved(
        {name: lambda name=name, step=step: run(step, name) for name, step in steps.items()},  # type: ignore[misc]
        rounds=2 if script.quick else 9,
        warmup=0,  # the comparison was one
    )
    for name in impls:
        report.add(
            CASE, name, timings[name], peaks.get(name), loss=losses[name], in_vocab_share=share
        )
    if script.json:
        report.write(script.json)


if __name__ == "__main__":
    main()
