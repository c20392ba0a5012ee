"""A training step of other trainers, as installed and with our loss patched in, on the CPU.

    python benchmarks/embed.py [--quick] [--json FILE]        (after `make peers`)

The steps are those of tests/peer_steps.py, larger: the peers' own models and losses, forward and
backward, float32, one thread, in one process, in turns. Values and gradients are compared before
anything is timed.

SpecForge's and speculators' kernels are Triton, which a CPU cannot run: `unpatched` is SpecForge's
torch reference and speculators' eager losses, which these packages keep beside their kernels, and
so is no statement on their speed on a GPU. `unpatched/compiled` is SpecForge's with the functions
compiled that it marks so (not with --quick: compiling takes half a minute).
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import importlib
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from common import ROOT, BenchScript, Report, time_interleaved
from specforge_ext.integrations import Patch, _specforge, patch, unpatch

sys.path.insert(0, str(ROOT / "tests"))

from peer_steps import Step, specforge_step, speculators_step, trl_step

WIDTH = 256
SCRATCH = tempfile.TemporaryDirectory(prefix="embed-")  # the trainer of trl wants a folder


@dataclass(frozen=True)
class Case:
    """make: the step, given whether SpecForge's own torch.compile is left on."""

    peer: str
    make: Callable[[bool], Step]
    is_quick: bool = False


def specforge(lk_loss_type: str | None) -> Callable[..., Step]:
    return lambda is_compiled: specforge_step(
        lk_loss_type=lk_loss_type,
        is_compiled=is_compiled,
        tokens=256,
        width=WIDTH,
        vocab=32000,
        draft_vocab=16000,
        length=7,
    )


def speculators(draft: str, loss: str) -> Callable[..., Step]:
    return lambda is_compiled: speculators_step(
        draft=draft, loss=loss, tokens=256, width=WIDTH, vocab=16000, max_anchors=64
    )


def trl(beta: float) -> Callable[..., Step]:
    folder = Path(SCRATCH.name)
    return lambda is_compiled: trl_step(folder, beta=beta, tokens=192, width=WIDTH, vocab=32000)


CASES = {
    "specforge eagle3, kl": Case("specforge", specforge(None), is_quick=True),
    "specforge eagle3, lk alpha": Case("specforge", specforge("alpha")),
    "speculators eagle3, kl_div": Case("speculators", speculators("eagle3", "kl_div")),
    "speculators dflash, kl_div": Case("speculators", speculators("dflash", "kl_div")),
    "trl gkd, beta 0.5": Case("trl", trl(0.5)),
}


def self_tested(peer: str) -> Patch:
    """Patches and restores: imports the peer, runs the self-test, says what would be replaced."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        done = patch(peer, device=torch.device("cpu"))
        unpatch(peer)
        if peer == "specforge":
            model: Any = importlib.import_module("specforge.algorithms.eagle3.model")
            model.LogSoftmaxLoss = _specforge.TorchReference
    return done


@contextmanager
def put_in(done: Patch) -> Iterator[None]:
    """What patch does, without the self-test, which is not to be timed."""
    for item in done.replaced:
        setattr(item.owner, item.name, item.ours)
    try:
        yield
    finally:
        for item in done.replaced:
            setattr(item.owner, item.name, item.original)


def call(step: Step, impl: str, done: Patch) -> Any:
    if impl != "specforge_ext":
        return step()
    with put_in(done):
        return step()


def check(case: str, wanted: Any, got: Any) -> None:
    """Values to 1e-5, gradients to 1e-4 of each tensor's largest; RuntimeError otherwise."""
    worst = max(
        float((got[1][name] - g).abs().max() / g.abs().max()) for name, g in wanted[1].items()
    )
    if not torch.allclose(got[0], wanted[0], rtol=1e-5, atol=1e-6) or worst > 1e-4:
        raise RuntimeError(f"{case}: ours differs: {got[0]} for {wanted[0]}, gradients {worst:.1e}")


def child(script: BenchScript, case: str, impl: str) -> None:
    done = self_tested(CASES[case].peer)  # imports are no part of the peak

    def run() -> None:
        step = CASES[case].make(False)
        for _ in range(1 if script.quick else 2):
            call(step, impl, done)

    script.answer_peak(run, torch.device("cpu"))


def main() -> None:
    torch.set_num_threads(1)
    script = BenchScript("Other trainers' steps with our loss patched in.")
    if script.peak:
        child(script, *script.peak)
        return
    cases = {name: case for name, case in CASES.items() if case.is_quick or not script.quick}
    patches = {peer: self_tested(peer) for peer in {case.peer for case in cases.values()}}
    report = Report("embed", baseline="unpatched")
    for name, case in cases.items():
        done = patches[case.peer]
        impls = ["unpatched", "specforge_ext"]
        peaks = {impl: script.peak_bytes(name, impl) for impl in impls}
        step = case.make(False)
        steps = {impl: step for impl in impls}
        if name == "specforge eagle3, kl" and not script.quick:
            steps["unpatched/compiled"] = case.make(True)
        calls = {impl: partial(call, steps[impl], impl, done) for impl in steps}
        wanted = step()
        for run in calls.values():
            check(name, wanted, run())
        # No warm-up: the comparison was one.
        timings = time_interleaved(calls, rounds=1 if script.quick else 9, warmup=0)
        for impl, timing in timings.items():
            report.add(name, impl, timing, peaks.get(impl), loss=float(wanted[0][0]))
    if script.json:
        report.write(script.json)


if __name__ == "__main__":
    main()
