"""The main job: data, training, export and evaluation of one recipe on the ranks of one host.

Rank 0 starts the producer (see `runs.producer`); every rank trains; rank 0 exports and evaluates.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from specforge_ext import _C, __version__
from specforge_ext.config import defaults
from specforge_ext.engines import ENGINES
from specforge_ext.loader import (
    GlobalStep,
    OrderConfig,
    Skipped,
    StepData,
    Stream,
    global_steps,
    view,
)
from specforge_ext.methods import Method
from specforge_ext.records import DraftVocab, TargetWeights
from specforge_ext.runs import failure
from specforge_ext.runs.data import Dataset, read_dataset
from specforge_ext.runs.drafts import feature_union, method_of
from specforge_ext.runs.finish import Finished, finish
from specforge_ext.runs.link import ProducerLink, ProducerProcess
from specforge_ext.runs.ready import ready
from specforge_ext.runs.recipe import Recipe, load, shipped, split_arguments
from specforge_ext.runs.room import check_room
from specforge_ext.runs.say import Say
from specforge_ext.store import STORES
from specforge_ext.store.base import ProducerLost
from specforge_ext.trainer import (
    JointTrainer,
    Lane,
    StepSource,
    Trainer,
    TrainResult,
    World,
    open_world,
)

USAGE = f"""usage: torchrun [--nproc-per-node N] -m specforge_ext.train [RECIPE] [key.sub=value ...]

RECIPE is a YAML file, or the name of a recipe of the package: {", ".join(shipped())}.
Without one: demo. Any key of it can be given another value: trainer.lr=1e-3 output_dir=runs/a.
`specforge-ext check RECIPE` says what a recipe needs and costs. More: docs/recipes.md."""


@dataclass(frozen=True)
class Trained:
    """What training leaves of one draft. recipe: its own. parameters: whole, on the CPU."""

    recipe: Recipe
    method: Method
    result: TrainResult
    parameters: dict[str, Tensor]
    vocab: DraftVocab


@dataclass(frozen=True)
class TrainedAll:
    """What training leaves for the rest of the run; drafts by name."""

    drafts: dict[str, Trained]
    weights: TargetWeights
    dataset: Dataset
    skipped: int
    rank: int


def run(recipe: Recipe) -> dict[str, Any] | None:
    """Run a recipe to its end; rank 0 returns summary.json's contents, the others None.

    Resumes from the newest checkpoint of `output_dir` (trainer.checkpoint.resume). After SIGTERM
    the state is saved and nothing is exported: the same command goes on. Of several drafts each has
    its own summary.json, under `drafts` in the run's.
    """
    began = time.perf_counter()
    rank = int(os.environ.get("RANK", "0"))
    with ready(recipe, rank=rank):
        return _run(recipe, Say(began, quiet=rank != 0), began)


def _run(recipe: Recipe, say: Say, began: float) -> dict[str, Any] | None:
    with open_world(timeout_s=recipe.trainer.collective_timeout_s) as world, ExitStack() as stack:
        torch.set_num_threads(threads_each(recipe, world))
        producer = _start_producer(recipe, world, stack, say)
        try:
            trained = _train(recipe, world, producer, stack, say)
        except ProducerLost as error:
            if producer is None:
                raise
            raise ProducerLost(f"{error}; {producer.obituary()}") from error
    if trained.rank != 0:
        return None
    results = [draft.result for draft in trained.drafts.values()]
    if any(result.stopped_by_signal for result in results):
        step = min(result.steps for result in results if result.stopped_by_signal)
        say(f"stopped by a signal at step {step}, saved; the same command goes on")
        return None
    torch.set_num_threads(os.cpu_count() or 1)
    summaries = {
        name: _finish(trained, draft, name, say, began) for name, draft in trained.drafts.items()
    }
    if not recipe.drafts:
        return summaries[""]
    return _write_summary(recipe, {"recipe": recipe.name, "drafts": summaries})


def _finish(trained: TrainedAll, one: Trained, name: str, say: Say, began: float) -> dict[str, Any]:
    """Export and evaluate a draft, and write its summary."""
    if name:
        say(f"draft {name}")
    draft = one.method.build(trained.weights, one.vocab, seed=one.recipe.run.seed)
    draft.load_state_dict(one.parameters)
    finished = finish(
        one.recipe, one.method, draft, trained.weights, one.vocab, trained.dataset, say
    )
    return _summary(trained, one, finished, time.perf_counter() - began)


def main(arguments: list[str]) -> int:
    """`[RECIPE] [key.sub=value ...]`; no recipe is the demo.

    0 when the run finished, or was stopped by a signal after saving; 1 when it failed, or an export
    is not what was trained; 2 on a bad recipe; 130 on Ctrl-C where there was nothing to save.
    """
    if {"-h", "--help"} & set(arguments):
        print(USAGE)
        return 0
    logging.basicConfig(format="%(name)s: %(message)s")
    level = logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING
    logging.getLogger("specforge_ext").setLevel(level)
    try:
        recipe = load(*split_arguments(arguments))
    except (ValueError, OSError) as error:
        failure.report(error)
        return 2
    try:
        summary = run(recipe)
    except failure.EXPECTED as error:
        failure.report(error, recipe.output_dir)
        return 1
    except KeyboardInterrupt:
        print("specforge_ext: interrupted; the same command goes on", file=sys.stderr)
        return 130
    return 0 if summary is None or _exports_hold(summary) else 1


def _exports_hold(summary: dict[str, Any]) -> bool:
    """Whether every export was read back as what was trained; the log names what differs."""
    drafts = summary.get("drafts", {"": summary})
    return all(one["export_check"] for one in drafts.values())


def threads_each(recipe: Recipe, world: World) -> int:
    """CPU threads of a process: named in the recipe, or the cores over ranks and producer."""
    if recipe.run.num_threads is not None:
        return recipe.run.num_threads
    return max(1, (os.cpu_count() or 1) // (world.size + 1))


def _train(
    recipe: Recipe,
    world: World,
    producer: ProducerProcess | None,
    stack: ExitStack,
    say: Say,
) -> TrainedAll:
    # The producer loads the target at the same time.
    weights: TargetWeights = ENGINES.get(recipe.engine[0]).read_weights(
        recipe.engine[1], device=world.device, last_layer=True
    )
    union = feature_union(recipe, weights.spec)
    layout = union.layout
    link = _connect(recipe, world, producer, stack)
    hello = link.hello(layout_hash=layout.hash, timeout_s=recipe.run.start_timeout_s)
    files = link.prepare(timeout_s=recipe.run.prepare_timeout_s, progress=say.progress)
    dataset = read_dataset(files)
    say(f"data: {dataset.describe()}")
    steps = global_steps(dataset.train.lengths, recipe.order, seed=recipe.run.seed)
    check_room(
        steps,
        dataset.train.lengths,
        layout.stored_bytes_per_token(hello.encoding),
        in_flight=recipe.stream.in_flight_steps + 1,
        capacity_bytes=hello.capacity_bytes,
    )
    reader = STORES.get(recipe.store[0]).reader(hello.address)
    stack.callback(reader.close)
    say(f"store: {reader.capabilities().describe()}, encoding {hello.encoding}")
    stream = Stream(
        steps=steps,
        prompts=dataset.train,
        layout=layout,
        link=link,
        reader=reader,
        order=recipe.order,
        config=recipe.stream,
        rank=world.rank,
        world_size=world.size,
    )
    source = SkipLog(stream, recipe.output_dir / "skipped.jsonl", world)
    lanes: list[Lane] = []
    drafts: dict[str, tuple[Method, DraftVocab]] = {}
    for name, part in recipe.parts.items():
        method = method_of(part)
        vocab = method.vocab(dataset.train, weights.spec)
        draft = method.build(weights, vocab, seed=part.run.seed)
        label = f"draft {name}" if name else "draft"
        say(f"{label}: {_count(draft):,} trained parameters, {len(steps)} steps")
        drafts[name] = (method, vocab)
        trainer = Trainer(
            part.trainer,
            method,
            draft,
            source,
            output_dir=part.output_dir,
            world=world,
            identity={**_identity(part, dataset, steps), "encoding": hello.encoding},
            identity_defaults=_identity_defaults(part),
            label=name,
        )
        lanes.append(Lane(name, trainer, partial(view, names=union.names[name])))
    results = fit(lanes, source, joint=bool(recipe.drafts))
    world.barrier("the end of training")
    return TrainedAll(
        drafts={
            lane.name: Trained(
                recipe=recipe.parts[lane.name],
                method=drafts[lane.name][0],
                result=results[lane.name],
                parameters=lane.trainer.full_state_dict(),
                vocab=drafts[lane.name][1],
            )
            for lane in lanes
        },
        weights=weights,
        dataset=dataset,
        skipped=source.count(),
        rank=world.rank,
    )


def fit(lanes: list[Lane], source: StepSource, *, joint: bool) -> dict[str, TrainResult]:
    """By name. A single draft reads the stream as it is."""
    if joint:
        return JointTrainer(lanes, source).fit()
    (lane,) = lanes
    return {lane.name: lane.trainer.fit()}


def _start_producer(
    recipe: Recipe, world: World, stack: ExitStack, say: Say
) -> ProducerProcess | None:
    """Rank 0 starts it; it ends with the stack."""
    if world.rank != 0:
        return None
    say(f"target: {recipe.engine[0]}, log in {recipe.output_dir / 'producer.log'}")
    producer = ProducerProcess(
        recipe.source,
        num_threads=threads_each(recipe, world),
        log_path=recipe.output_dir / "producer.log",
    )
    stack.callback(producer.close)
    return producer


def _connect(
    recipe: Recipe, world: World, producer: ProducerProcess | None, stack: ExitStack
) -> ProducerLink:
    """Every rank has a connection of its own."""
    timeout_s = recipe.run.start_timeout_s
    link = producer.connect(timeout_s=timeout_s) if producer else None
    mine = producer.socket_path if producer else ""
    path = world.gather(mine, "the producer's address")[0]
    link = link or ProducerLink(path, timeout_s=timeout_s)
    stack.callback(link.close)
    return link


def _identity(recipe: Recipe, dataset: Dataset, steps: list[GlobalStep]) -> dict[str, Any]:
    """What a run that resumes must share with the one that saved."""
    return {
        "method": {"kind": recipe.method[0], **recipe.method[1].model_dump(mode="json")},
        "data": dataset.fingerprint,
        "order": recipe.order.model_dump(mode="json"),
        "seed": recipe.run.seed,
        "num_steps": len(steps),
    }


def _identity_defaults(recipe: Recipe) -> dict[str, Any]:
    """An option that did not exist when a checkpoint was written was at its default."""
    return {
        "method": defaults(type(recipe.method[1])),
        "order": defaults(OrderConfig),
        "encoding": "none",
    }


class SkipLog:
    """A StepSource that writes what its stream skips to skipped.jsonl, one line a sample.

    The ranks share the file.
    """

    def __init__(self, stream: StepSource, path: Path, world: World) -> None:
        self._stream = stream
        self._path = path
        self._world = world
        self.total_steps = stream.total_steps

    def iterate(self, start_step: int) -> Iterator[StepData]:
        if self._world.rank == 0:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._keep_before(start_step)
        # Else rank 0 could take another rank's first lines for those of an interrupted run.
        self._world.barrier("rank 0 to clear skipped.jsonl")
        for data in self._stream.iterate(start_step):
            for skipped in data.skipped:
                self._write(data, skipped)
            yield data

    def count(self) -> int:
        """Samples skipped on all ranks since the run began, once every rank is done."""
        return len(self._lines())

    def _keep_before(self, step: int) -> None:
        """Forget lines of steps that will be done again."""
        kept = [line for line in self._lines() if json.loads(line)["step"] < step]
        partial = self._path.with_name(f".{self._path.name}.partial")
        partial.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        partial.replace(self._path)

    def _lines(self) -> list[str]:
        """Whole lines: the last one may have been cut by a kill."""
        if not self._path.exists():
            return []
        text = self._path.read_text(encoding="utf-8")
        return text[: text.rfind("\n") + 1].splitlines()

    def _write(self, data: StepData, skipped: Skipped) -> None:
        line = {"step": data.step, "sample_id": skipped.sample_id, "reason": skipped.reason}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({**line, "rank": self._world.rank}) + "\n")


def _count(draft: nn.Module) -> int:
    return sum(p.numel() for p in draft.parameters() if p.requires_grad)


def _summary(
    trained: TrainedAll, one: Trained, finished: Finished, wall_s: float
) -> dict[str, Any]:
    result = one.result
    summary = {
        "recipe": one.recipe.name,
        "version": __version__,
        "commit": _C.__commit__,
        "steps": result.steps,
        "samples_trained": result.samples_trained,
        "samples_skipped": trained.skipped,
        "tokens_trained": result.tokens_trained,
        "wall_s": wall_s,
        "train_wall_s": result.wall_s,
        "data_wait_share": result.data_wait_s / result.wall_s if result.wall_s else 0.0,
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        **finished.to_dict(),
    }
    return _write_summary(one.recipe, summary)


def _write_summary(recipe: Recipe, summary: dict[str, Any]) -> dict[str, Any]:
    path = recipe.output_dir / "summary.json"
    path.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    return summary
