"""Trained drafts for the rigs, and what our own evaluator says of them.

A draft of a short run lies in the rigs' cache under a hash of the package and of the run's
settings. A finished run of the demo can stand in for EAGLE-3's: its output_dir in
SPECFORGE_EXT_DEMO_OUTPUT.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

import specforge_ext
from rigs.build import BuildFailed, locked, root, run
from rigs.cases import Case
from specforge_ext.assets import demo_target_path
from specforge_ext.engines import ENGINES, Engine
from specforge_ext.evaluate import (
    Acceptance,
    EvalResult,
    PlainResult,
    evaluate,
    plain_decode,
    summarise,
)
from specforge_ext.export import read_strict
from specforge_ext.methods import METHODS, Method
from specforge_ext.runs.data import prepare, read_dataset
from specforge_ext.runs.recipe import Recipe, load

TRAIN_S = 540.0
PROMPTS = 32
MAX_NEW_TOKENS = 64
DEMO_OUTPUT = "SPECFORGE_EXT_DEMO_OUTPUT"


@dataclass(frozen=True)
class Trained:
    """export: engine's name -> the directory for it. prompts: held out, token ids.

    plain: the target's own greedy text. result, acceptance: of our evaluator with the exported
    draft, on the same prompts.
    """

    export: Mapping[str, Path]
    target: Path
    prompts: tuple[tuple[int, ...], ...]
    plain: PlainResult
    result: EvalResult
    acceptance: Acceptance


@functools.cache
def trained(case: Case) -> Trained:
    """Trains it unless that has been done."""
    recipe = load(case.recipe, [*case.assignments, f"output_dir={output_dir(case)}"])
    engine: Engine = ENGINES.get(recipe.engine[0]).open(recipe.engine[1])
    return measure(
        engine,
        METHODS.get(recipe.method[0])(recipe.method[1]),
        {
            name: _export(recipe.output_dir / "export", name)
            for name, served in (("vllm", case.vllm), ("sglang", case.sglang))
            if served
        },
        _heldout(recipe, engine),
        target=demo_target_path(),
        depth=case.depth,
        max_new_tokens=MAX_NEW_TOKENS,
    )


def measure(
    engine: Engine,
    method: Method,
    export: Mapping[str, Path],
    prompts: Sequence[torch.Tensor],
    *,
    target: Path,
    depth: int,
    max_new_tokens: int,
) -> Trained:
    """Greedy, in the engine's dtype; end tokens end nothing, as in what servers are asked.

    export: a directory for each engine that serves the draft; the tensors are the same in all.
    """
    weights = engine.weights(device=torch.device("cpu"))
    draft = method.restore(read_strict(next(iter(export.values())), method), weights)
    result = evaluate(
        engine.decoder(),
        method.drafter(draft),
        prompts,
        method.layout(engine.spec),
        depth=depth,
        max_new_tokens=max_new_tokens,
        temperature=0.0,
        seed=0,
    )
    return Trained(
        export=export,
        target=target,
        prompts=tuple(tuple(prompt.tolist()) for prompt in prompts),
        plain=plain_decode(
            engine.decoder(), prompts, max_new_tokens=max_new_tokens, temperature=0.0, seed=0
        ),
        result=result,
        acceptance=summarise(result, draft=method.name),
    )


def output_dir(case: Case) -> Path:
    """Of a finished run, which is made now if there is none."""
    demo = os.environ.get(DEMO_OUTPUT)
    if demo and case.name == "eagle3":
        summary = Path(demo) / "summary.json"
        if not summary.is_file():
            raise ValueError(f"{DEMO_OUTPUT}: wanted the output_dir of a finished run, got {demo}")
        return Path(demo).resolve()
    folder = root() / "drafts" / f"{case.name}-{_key(case)}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(folder.with_name(f"{folder.name}.lock"), deadline_s=TRAIN_S):
        if not (folder / "summary.json").is_file():
            _train(case, folder)
    return folder


def _train(case: Case, folder: Path) -> None:
    """What a run that was cut off left is gone on with."""
    log = folder.with_name(f"{folder.name}.log")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
    settings = [*case.assignments, "evaluate.num_prompts=0", f"output_dir={folder}"]
    command = [sys.executable, *launcher, "-m", "specforge_ext.train", case.recipe, *settings]
    with log.open("wb") as out:
        code = run(command, out.fileno(), seconds=TRAIN_S)
    if code != 0:
        why = f"took over {TRAIN_S:g} s" if code is None else f"ended with {code}"
        raise BuildFailed(f"{case.name}: training {why}; {log}:\n{log.read_text()[-3000:]}")


def _key(case: Case) -> str:
    package = Path(specforge_ext.__file__).parent
    digest = hashlib.sha256(json.dumps([case.recipe, case.assignments]).encode())
    for path in sorted(p for p in package.rglob("*") if p.suffix in (".py", ".yaml", ".so")):
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:12]


def _export(folder: Path, engine: str) -> Path:
    """The engine's own directory where there is one, else the one that serves both."""
    own = folder / engine
    return own if own.is_dir() else folder


def _heldout(recipe: Recipe, engine: Engine) -> list[torch.Tensor]:
    files = prepare(
        recipe.data,
        engine,
        directory=recipe.output_dir / "data",
        seed=recipe.run.seed,
        progress=lambda done, total, what: None,
    )
    return list(read_dataset(files).heldout[:PROMPTS])
