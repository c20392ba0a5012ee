"""Attention of EAGLE-3 over all steps of training-time test, forward and backward.

    python benchmarks/attention.py [--json FILE] [--quick]        (after `make peers`)

From rotated queries, keys and values of seven steps (16 heads, 8 of keys, 64 wide) to the outputs
and the gradients of all of them; 2048 tokens of one conversation, 256 with --quick. Everything is
compared with float64 before anything is timed. One thread.

specforge            SpecForge's own attention module, its [S, S] mask included, without projections
                     and rotation
torch-sdpa-concat    torch's attention over the keys of all steps laid end to end, under a mask
specforge_ext        ours; where not all rows are scored, on the active rows
specforge_ext/torch-merge   the same with the own keys merged by torch's operators
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import importlib.util
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common import BenchScript, Report, time_interleaved
from specforge_ext.methods._ttt_plan import TttPlan, build_plan
from specforge_ext.nn import attention
from specforge_ext.nn.attention import OwnKeys, split_attention

HEADS, KV_HEADS, HEAD_DIM, STEPS = 16, 8, 64, 7
SCALE = HEAD_DIM**-0.5
BASELINE = "specforge"

# tokens, dtype, share of rows that are scored
CASES = {
    "float32/1024": (1024, torch.float32, 1.0),
    "float32/2048": (2048, torch.float32, 1.0),
    "float32/2048/40% scored": (2048, torch.float32, 0.4),
    "bfloat16/1024": (1024, torch.bfloat16, 1.0),
}
QUICK_CASES = {"float32/256": (256, torch.float32, 1.0)}
TURN = 256
"""Tokens of a turn: the scored ones are its last."""

ROWS_IMPLS = ("specforge_ext", "specforge_ext/torch-merge")


@dataclass(frozen=True)
class Problem:
    """Per step i: query [S, HEADS, HEAD_DIM], key and value [S, KV_HEADS, HEAD_DIM], rows that are
    active, gradient of the output, which is 0 on the others.
    """

    query: list[Tensor]
    key: list[Tensor]
    value: list[Tensor]
    grad: list[Tensor]
    plan: TttPlan


@dataclass(frozen=True)
class Result:
    """Outputs per step, then gradients of all queries, keys, values, in full height."""

    out: list[Tensor]
    grads: list[Tensor]


def make_problem(case: str) -> Problem:
    tokens, dtype, share = (CASES | QUICK_CASES)[case]
    generator = torch.Generator().manual_seed(0)

    def randn(heads: int) -> Tensor:
        return torch.randn(tokens, heads, HEAD_DIM, generator=generator).to(dtype)

    mask = (torch.arange(tokens) % TURN >= round(TURN * (1 - share))).to(torch.uint8)
    mask[-1] = 0
    plan = build_plan(
        mask, (tokens,), ttt_length=STEPS, compaction=share < 1, device=torch.device("cpu")
    )
    grads = []
    for step in plan.steps:
        grad = torch.zeros(tokens, HEADS, HEAD_DIM, dtype=dtype)
        grad[step.rows] = randn(HEADS)[step.rows]
        grads.append(grad)
    return Problem(
        query=[randn(HEADS) for _ in range(STEPS)],
        key=[randn(KV_HEADS) for _ in range(STEPS)],
        value=[randn(KV_HEADS) for _ in range(STEPS)],
        grad=grads,
        plan=plan,
    )


def leaves_of(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [x.detach().requires_grad_() for x in tensors]


Call = Callable[[], Result]


def full_rows(
    problem: Problem, attend: Callable[[list[Tensor], list[Tensor], list[Tensor]], list[Tensor]]
) -> Call:
    """All rows at every step. attend: queries, keys, values -> outputs [S, HEADS, HEAD_DIM]."""
    leaves = leaves_of((*problem.query, *problem.key, *problem.value))

    def call() -> Result:
        out = attend(leaves[:STEPS], leaves[STEPS : 2 * STEPS], leaves[2 * STEPS :])
        return Result(
            [x.detach() for x in out], list(torch.autograd.grad(out, leaves, problem.grad))
        )

    return call


def our_call(problem: Problem) -> Call:
    """On the active rows, which a model computes alone; the results come as they are."""
    plan = problem.plan
    rows = [step.rows for step in plan.steps]
    own_rows = [plan.context, *rows[1:]]
    leaves = leaves_of(
        [x[r] for x, r in zip(problem.query, rows, strict=True)]
        + [x[r] for x, r in zip(problem.key, own_rows, strict=True)]
        + [x[r] for x, r in zip(problem.value, own_rows, strict=True)]
    )
    grad = [x[r] for x, r in zip(problem.grad, rows, strict=True)]

    def call() -> Result:
        query, key, value = leaves[:STEPS], leaves[STEPS : 2 * STEPS], leaves[2 * STEPS :]
        out = []
        for i, step in enumerate(plan.steps):
            own = [OwnKeys(key[j + 1], value[j + 1], step.ancestors[j]) for j in range(i)]
            out.append(split_attention(query[i], (key[0], value[0]), step.queries, own))
        return Result([x.detach() for x in out], list(torch.autograd.grad(out, leaves, grad)))

    return call


def in_full_height(problem: Problem, result: Result) -> Result:
    """Of `our_call`: zeros for the rows that are not there."""
    tokens = problem.query[0].shape[0]
    rows = [step.rows for step in problem.plan.steps]
    own_rows = [problem.plan.context, *rows[1:]]

    def spread(x: Tensor, places: Tensor) -> Tensor:
        return x.new_zeros(tokens, *x.shape[1:]).index_copy_(0, places, x)

    places = (*rows, *own_rows, *own_rows)
    return Result(
        [spread(x, r) for x, r in zip(result.out, rows, strict=True)],
        [spread(x, r) for x, r in zip(result.grads, places, strict=True)],
    )


@contextmanager
def torch_merge() -> Iterator[None]:
    """The own keys merged by the definition, for every dtype."""
    native = attention._NATIVE
    attention._NATIVE = ()  # type: ignore[assignment]
    try:
        yield
    finally:
        attention._NATIVE = native


def torch_merge_call(problem: Problem) -> Call:
    call = our_call(problem)

    def run() -> Result:
        with torch_merge():
            return call()

    return run


def sdpa_concat_call(problem: Problem) -> Call:
    """Step i sees (i + 1) S keys: causally those of step 0, and of the others its own row's."""
    tokens = problem.query[0].shape[0]

    def attend(query: list[Tensor], key: list[Tensor], value: list[Tensor]) -> list[Tensor]:
        causal = torch.ones(tokens, tokens, dtype=torch.bool).tril()
        own = torch.eye(tokens, dtype=torch.bool)
        out = []
        for i in range(STEPS):
            keys, values = (torch.cat(x[: i + 1]).transpose(0, 1)[None] for x in (key, value))
            mask = torch.cat([causal, *[own] * i], dim=1)
            attended = F.scaled_dot_product_attention(
                query[i].transpose(0, 1)[None], keys, values, attn_mask=mask, enable_gqa=True
            )
            out.append(attended[0].transpose(0, 1))
        return out

    return full_rows(problem, attend)


class Given(nn.Module):
    """Stands for a projection: its output exists already."""

    tensor: Tensor

    def forward(self, _: Tensor) -> Tensor:
        return self.tensor


def import_specforge() -> ModuleType:
    """SpecForge's attention, with its rotation, which is not measured here, taken out."""
    if importlib.util.find_spec("specforge") is None:
        raise SystemExit("SpecForge is not installed: run `make peers` (benchmarks/peers.txt)")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import specforge.modeling.draft.llama3_eagle as module
    module.apply_rotary_pos_emb = lambda q, k, *_: (q, k)
    peer: ModuleType = module
    return peer


def specforge_call(problem: Problem) -> Call:
    from transformers import LlamaConfig

    peer = import_specforge()
    tokens = problem.query[0].shape[0]
    config = LlamaConfig(
        hidden_size=HEADS * HEAD_DIM,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        max_position_embeddings=tokens,
    )
    module: Any = peer.LlamaAttention(config)
    projections = [Given(), Given(), Given()]
    module.q_proj, module.k_proj, module.v_proj = projections
    module.o_proj = nn.Identity()
    dtype = problem.query[0].dtype
    hidden = torch.empty(1, tokens, 0, dtype=dtype)  # only its shape is read
    positions = torch.arange(tokens)[None]

    def attend(query: list[Tensor], key: list[Tensor], value: list[Tensor]) -> list[Tensor]:
        mask = peer.prepare_decoder_attention_mask(torch.ones(1, tokens), (1, tokens), hidden, 0)
        cache: list[list[Tensor]] = [[], []]
        out = []
        for i in range(STEPS):
            for projection, x in zip(projections, (query[i], key[i], value[i]), strict=True):
                projection.tensor = x.flatten(1)[None]
            attended = module(
                hidden, cache_hidden=cache, attention_mask=mask, position_ids=positions
            )
            out.append(attended[0].unflatten(-1, (HEADS, HEAD_DIM)))
        return out

    return full_rows(problem, attend)


IMPLS: dict[str, Callable[[Problem], Call]] = {
    "specforge_ext": our_call,
    "specforge_ext/torch-merge": torch_merge_call,
    BASELINE: specforge_call,
    "torch-sdpa-concat": sdpa_concat_call,
}


def truth(problem: Problem) -> Result:
    """The formula in float64, one head of keys at a time."""
    leaves = [x.double() for x in (*problem.query, *problem.key, *problem.value)]
    outs, grads = (
        [torch.zeros_like(x) for x in leaves[:STEPS]],
        [torch.zeros_like(x) for x in leaves],
    )
    group = HEADS // KV_HEADS
    later = torch.ones(len(leaves[0]), len(leaves[0]), dtype=torch.bool).triu(1)
    for i in range(STEPS):
        for h in range(KV_HEADS):
            heads = slice(h * group, (h + 1) * group)
            own = [*range(STEPS, STEPS + i + 1), *range(2 * STEPS, 2 * STEPS + i + 1)]
            parts = leaves_of([leaves[i][:, heads], *(leaves[x][:, h] for x in own)])
            out = _dense(parts[0], parts[1 : i + 2], parts[i + 2 :], later)
            outs[i][:, heads] = out.detach()
            of_parts = torch.autograd.grad(out, parts, problem.grad[i][:, heads].double())
            grads[i][:, heads] = of_parts[0]
            for x, grad in zip(own, of_parts[1:], strict=True):
                grads[x][:, h] += grad
    return Result(outs, grads)


def _dense(query: Tensor, key: list[Tensor], value: list[Tensor], later: Tensor) -> Tensor:
    """query [S, G, D], key and value [S, D] per step -> [S, G, D]."""
    context = torch.einsum("sgd,td->sgt", query, key[0]).masked_fill(later[:, None], -torch.inf)
    own = [(query * k[:, None]).sum(-1, keepdim=True) for k in key[1:]]
    weights = torch.softmax(torch.cat((context, *own), dim=-1) * SCALE, dim=-1)
    out = torch.einsum("sgt,td->sgd", weights[..., : len(later)], value[0])
    for j, v in enumerate(value[1:]):
        out = out + weights[..., len(later) + j, None] * v[:, None]
    return out


def check(case: str, problem: Problem, calls: dict[str, Call]) -> dict[str, dict[str, float]]:
    """Errors of all implementations, relative to each tensor's largest value, worst tensor.

    RuntimeError if one computes something else.
    """
    want = truth(problem)
    # Outputs of rows that are not active are nobody's business.
    active = [x.any(dim=-1).any(dim=-1) for x in problem.grad]

    def error(got: Tensor, true: Tensor) -> float:
        return float((got.double() - true).abs().max() / true.abs().max())

    errors = {}
    for impl, call in calls.items():
        got = in_full_height(problem, call()) if impl in ROWS_IMPLS else call()
        outs = zip(got.out, want.out, active, strict=True)
        errors[impl] = {
            "out_error": max(error(a[rows], b[rows]) for a, b, rows in outs),
            "grad_error": max(error(a, b) for a, b in zip(got.grads, want.grads, strict=True)),
        }
        limit = 1e-5 if problem.query[0].dtype == torch.float32 else 3e-2
        if max(errors[impl].values()) > limit:
            raise RuntimeError(f"{case}: {impl} is off by {errors[impl]}, wanted at most {limit}")
    return errors


def impls_of(case: str) -> list[str]:
    """Of those that compute all rows whatever is scored, the baseline stands for all."""
    share = (CASES | QUICK_CASES)[case][2]
    return [impl for impl in IMPLS if share == 1 or impl != "torch-sdpa-concat"]


def bench_case(script: BenchScript, report: Report, case: str) -> None:
    peaks = {impl: script.peak_bytes(case, impl) for impl in impls_of(case)}
    problem = make_problem(case)
    calls = {impl: IMPLS[impl](problem) for impl in impls_of(case)}
    errors = check(case, problem, calls)
    # The comparison was the warm-up. Two rounds: a call of the peers takes half a minute.
    timings = time_interleaved(calls, rounds=2, warmup=0)
    for impl in (BASELINE, *(name for name in calls if name != BASELINE)):
        report.add(case, impl, timings[impl], peaks[impl], **errors[impl])


def child(script: BenchScript, case: str, impl: str) -> None:
    if impl == BASELINE:
        import_specforge()  # imports are no part of the peak
    script.answer_peak(lambda: IMPLS[impl](make_problem(case))(), torch.device("cpu"))


def main() -> None:
    torch.set_num_threads(1)
    script = BenchScript("Attention of EAGLE-3 over all steps of training-time test.")
    if script.peak:
        child(script, *script.peak)
        return
    report = Report("attention", BASELINE)
    for case in QUICK_CASES if script.quick else CASES:
        bench_case(script, report, case)
    if script.json:
        report.write(script.json)


if __name__ == "__main__":
    main()
