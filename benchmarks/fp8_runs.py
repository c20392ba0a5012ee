"""Does fp8_e4m3_row cost acceptance? The demo trained in pairs, equal but for the encoding.

    python benchmarks/fp8_runs.py [--pairs 8] [--json FILE] [--folder FOLDER]

A pair has one seed (the draft's initial weights, the order of the data) and one data set, trained
with `store.encoding` none and fp8_e4m3_row. Features go through the shm store, the loader and the
trainer as in a run; the target computes them once for all pairs, and puts them into the store from
memory. What is measured is the greedy acceptance length of speculative decoding, and whether its
ratio is within 2 % by two one-sided paired t-tests.

Cut from the demo, so that a pair takes about a CPU minute: see CUTS, no export (the draft
that is decoded with is float32), no baselines and no sampling. Writes FILE after every pair, and
goes on there when started again.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import json
import sys
import tempfile
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common import commit, machine
from specforge_ext.engines import ENGINES, Engine
from specforge_ext.evaluate import EvalResult, evaluate, summarise
from specforge_ext.evaluate.paired import Equivalence, equivalence
from specforge_ext.loader import Delivery, Stream, global_steps
from specforge_ext.methods import METHODS, Method
from specforge_ext.records import FeatureLayout, Sample, TargetWeights
from specforge_ext.runs.data import Dataset, prepare, read_dataset
from specforge_ext.runs.recipe import Recipe, load
from specforge_ext.store.shm import ShmConfig, ShmStore, ShmWriter
from specforge_ext.trainer import Trainer, World, open_world

ENCODINGS = ("none", "fp8_e4m3_row")
MARGIN = 0.02
CUTS = (
    "data.train.num_prompts=128",
    "order.epochs=4",
    "evaluate.num_prompts=64",
    "evaluate.max_new_tokens=48",
    "evaluate.temperatures=[0.0]",
    "trainer.tensorboard=false",
    "trainer.log_every_steps=1000",
    "trainer.checkpoint.every_steps=100000",
)
TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Shared:
    """What all runs have in common."""

    method: Method
    engine: Engine
    weights: TargetWeights
    layout: FeatureLayout
    dataset: Dataset
    samples: dict[str, Sample]


class CachedLink:
    """A producer whose features are in memory: implements the loader's FeatureLink."""

    def __init__(self, writer: ShmWriter, shared: Shared) -> None:
        self._writer = writer
        self._shared = shared
        self._asked: deque[tuple[int, list[str]]] = deque()
        self.bytes_put = 0

    def request(self, step: int, sample_ids: Sequence[str]) -> None:
        self._asked.append((step, list(sample_ids)))

    def receive(self, *, timeout_s: float) -> Delivery:
        step, sample_ids = self._asked.popleft()
        layout = self._shared.layout
        refs = tuple(
            self._writer.put(
                self._shared.samples[i],
                layout_hash=layout.hash,
                timeout_s=timeout_s,
                layers=layout.layers,
            )
            for i in sample_ids
        )
        self.bytes_put += sum(ref.nbytes for ref in refs)
        return Delivery(step, refs, ())

    def close(self) -> None:
        """Nothing is held."""


def share(recipe: Recipe, folder: Path) -> Shared:
    engine = ENGINES.get(recipe.engine[0]).open(recipe.engine[1])
    method = METHODS.get(recipe.method[0])(recipe.method[1])
    files = prepare(
        recipe.data, engine, directory=folder, seed=recipe.run.seed, progress=lambda *_: None
    )
    dataset = read_dataset(files)
    layout = method.layout(engine.spec)
    samples = {s.prompt.sample_id: s for s in engine.features(list(dataset.train), layout)}
    weights = engine.weights(device=torch.device("cpu"), last_layer=True)
    return Shared(method, engine, weights, layout, dataset, samples)


def train(recipe: Recipe, shared: Shared, encoding: str, world: World) -> dict[str, Any]:
    """One run: what it measured."""
    began, cpu_began = time.perf_counter(), time.process_time()
    writer = ShmStore.writer(ShmConfig(encoding=encoding))
    link = CachedLink(writer, shared)
    prompts, seed = shared.dataset.train, recipe.run.seed
    vocab = shared.method.vocab(prompts, shared.weights.spec)
    stream = Stream(
        steps=global_steps(prompts.lengths, recipe.order, seed=seed),
        prompts=prompts,
        layout=shared.layout,
        link=link,
        reader=ShmStore.reader(writer.address()),
        order=recipe.order,
        config=recipe.stream,
        rank=world.rank,
        world_size=world.size,
    )
    draft = shared.method.build(shared.weights, vocab, seed=seed)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            recipe.trainer, shared.method, draft, stream, output_dir=Path(folder), world=world
        )
        result = trainer.fit()
    trained = shared.method.build(shared.weights, vocab, seed=seed)
    trained.load_state_dict(trainer.full_state_dict())
    row = summarise(decode(recipe, shared, trained), draft="trained")
    writer.close()
    return {
        "case": f"seed {seed}",
        "impl": encoding,
        "median_s": time.perf_counter() - began,
        "cpu_s": time.process_time() - cpu_began,
        "peak_bytes": None,
        "length": row.length,
        "rounds": row.rounds,
        "final_loss": result.final_loss,
        "steps": result.steps,
        "bytes_per_token": link.bytes_put / result.tokens_trained,
    }


def decode(recipe: Recipe, shared: Shared, draft: torch.nn.Module) -> EvalResult:
    prompts: list[Tensor] = list(shared.dataset.heldout)[: recipe.evaluate.num_prompts]
    return evaluate(
        shared.engine.decoder(),
        shared.method.drafter(draft),
        prompts,
        shared.layout,
        depth=recipe.evaluate.depth,
        max_new_tokens=recipe.evaluate.max_new_tokens,
        temperature=0.0,
        seed=recipe.evaluate.seed,
        eos_ids=shared.engine.spec.eos_token_ids,
    )


def compare(rows: list[dict[str, Any]]) -> dict[str, Equivalence]:
    """Of the acceptance length, and of the drafted tokens in it: all but the one that every step
    says anyway, which hides differences of a weak draft."""
    return {
        what: equivalence(
            *([r["length"] - less for r in rows if r["impl"] == name] for name in ENCODINGS),
            margin=MARGIN,
        )
        for what, less in (("length", 0.0), ("drafted", 1.0))
    }


def read(path: Path | None, cuts: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of whole pairs of an earlier start. ValueError if they were made otherwise."""
    if path is None or not path.exists():
        return []
    content = json.loads(path.read_text())
    if content["cuts"] != list(cuts):
        raise ValueError(f"{path}: wanted runs with {list(cuts)}, got {content['cuts']}")
    return list(content["rows"])


def write(path: Path, rows: list[dict[str, Any]], cuts: Sequence[str]) -> None:
    found = compare(rows) if len(rows) > 2 else {}  # one pair has no spread
    content = {
        "bench": "fp8_runs",
        "machine": machine(),
        "commit": commit(),
        "baseline": "none",
        "cuts": list(cuts),
        "equivalence": {what: asdict(of) for what, of in found.items()},
        "rows": rows,
    }
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    partial.replace(path)


def say(text: str) -> None:
    print(text, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--folder", type=Path, help="where the data set is kept (default: nowhere)")
    parser.add_argument("--set", nargs="*", default=[], help="more cuts: key.sub=value")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cuts = [*CUTS, *arguments.set]
    rows = read(arguments.json, cuts)
    say(f"# fp8_runs | {machine()} | commit {commit()}")
    with tempfile.TemporaryDirectory() as temporary, open_world(timeout_s=TIMEOUT_S) as world:
        folder = arguments.folder or Path(temporary)
        shared = share(load("demo", cuts), folder)
        say(f"{shared.dataset.describe()}; {len(rows) // 2} pairs done before")
        for seed in range(len(rows) // 2, arguments.pairs):
            recipe = load("demo", [*cuts, f"run.seed={seed}"])
            pair = [train(recipe, shared, encoding, world) for encoding in ENCODINGS]
            rows += pair
            for row in pair:
                say(
                    f"{row['case']:<10} {row['impl']:<14} length {row['length']:.4f}  "
                    f"loss {row['final_loss']:.4f}  {row['bytes_per_token']:.0f} bytes/token  "
                    f"{row['steps']} steps  cpu {row['cpu_s']:.0f} s  wall {row['median_s']:.0f} s"
                )
            if arguments.json:
                write(arguments.json, rows, cuts)
    if arguments.json:
        write(arguments.json, rows, cuts)
    for what, found in compare(rows).items():
        say(
            f"{what}, fp8_e4m3_row / none over {found.pairs} pairs: {found.ratio:.4f}, "
            f"95 % {found.ci95[0]:.4f}..{found.ci95[1]:.4f}; within {MARGIN:.0%}: "
            f"{'yes' if found.equivalent else 'not shown'} (p = {found.p_value:.2g})"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
