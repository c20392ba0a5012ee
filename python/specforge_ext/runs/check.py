"""`specforge-ext check RECIPE`: what a recipe asks for and costs, before a model is loaded.

Of the target it reads the shape alone (`read_weights` on the meta device); the draft is built
there too. So whatever fails for its sizes fails here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch
from torch import nn

from specforge_ext.engines import ENGINES
from specforge_ext.loader import unite
from specforge_ext.methods import Method
from specforge_ext.records import FeatureLayout, TargetSpec, TargetWeights
from specforge_ext.runs.data import prompt_source
from specforge_ext.runs.drafts import method_of
from specforge_ext.runs.estimate import Batch, Memory, memory, num_parameters, step_work, together
from specforge_ext.runs.ready import missing_data
from specforge_ext.runs.recipe import Recipe
from specforge_ext.runs.room import IDS_AND_MASK_BYTES, room_needed
from specforge_ext.store import STORES

META = torch.device("meta")


@dataclass(frozen=True)
class _Built:
    """A draft on the meta device. recipe: its own."""

    name: str
    recipe: Recipe
    method: Method
    draft: nn.Module


@dataclass(frozen=True)
class Checked:
    """facts: (name, text) to print. problems: with their keys; none, and the recipe may run.

    notes: what may stand in the way on some machines or with some data. memory: of a rank, by
    draft ("" for a single one), as far as problems let it be known.
    """

    facts: tuple[tuple[str, str], ...]
    problems: tuple[str, ...]
    notes: tuple[str, ...]
    memory: dict[str, Memory]

    def render(self) -> str:
        """Lines for a person; the last one is OK, or how many problems there are."""
        width = max(len(name) for name, _ in self.facts)
        lines = [f"{name:<{width}}  {text}" for name, text in self.facts]
        lines += [f"note: {text}" for text in self.notes]
        lines += [f"problem: {text}" for text in self.problems]
        return "\n".join([*lines, f"{len(self.problems)} problem(s)" if self.problems else "OK"])


def check(recipe: Recipe, *, ranks: int = 1) -> Checked:
    """Of a recipe that `recipe.build` accepted. ranks: over which FSDP2 spreads the draft."""
    return _Check(recipe, ranks).run()


class _Check:
    def __init__(self, recipe: Recipe, ranks: int) -> None:
        self._recipe = recipe
        self._ranks = ranks
        self._facts: list[tuple[str, str]] = []
        self._problems: list[str] = []
        self._notes: list[str] = []
        self._memory: dict[str, Memory] = {}

    def run(self) -> Checked:
        kind, config = self._recipe.engine
        factory = ENGINES.get(kind)
        self._say("recipe", f"{self._recipe.name}, {self._ranks} rank(s)")
        try:
            weights: TargetWeights = factory.read_weights(config, device=META, last_layer=True)
        except ValueError as error:
            self._problems.append(f"engine.{error}")
            return self._end()
        self._say("target", describe_target(weights.spec))
        if (reason := factory.why_not_open(config)) is not None:
            self._notes.append(f"engine: {reason}")
        self._data(weights.spec)
        self._drafts(weights)
        return self._end()

    def _end(self) -> Checked:
        return Checked(tuple(self._facts), tuple(self._problems), tuple(self._notes), self._memory)

    def _say(self, name: str, text: str) -> None:
        self._facts.append((name, text))

    @property
    def _longest(self) -> int:
        """Tokens of the longest training prompt that the recipe allows."""
        data = self._recipe.data
        new = data.generate.max_new_tokens if data.generate else 0
        return prompt_source(data.train, where="data.train").longest(max_new_tokens=new)

    def _data(self, target: TargetSpec) -> None:
        order, longest = self._recipe.order, self._longest
        self._notes += missing_data(self._recipe)
        room = target.max_position_embeddings
        self._say("prompts", f"up to {longest} tokens")
        if longest > room:
            self._problems.append(
                f"data.train: wanted prompts of at most {room} tokens, what the target takes "
                f"(max_position_embeddings), got up to {longest}"
            )
        for key, budget in (
            ("batch_tokens", order.batch_tokens),
            ("micro_batch_tokens", order.micro_batch_tokens),
        ):
            if budget is not None and longest > budget:
                self._notes.append(
                    f"order.{key}: is {budget}; a prompt of up to {longest} tokens does not fit"
                )

    def _drafts(self, weights: TargetWeights) -> None:
        """All of them, and the one stream that they read."""
        layouts: dict[str, FeatureLayout] = {}
        built: list[_Built] = []
        for name, part in self._recipe.parts.items():
            where = f"drafts.{name}." if name else ""
            method = method_of(part)
            try:
                layouts[name] = method.layout(weights.spec)
                vocab = method.vocab([], weights.spec)
                with META:
                    draft = method.build(weights, vocab, seed=part.run.seed)
            except ValueError as error:
                self._problems.append(f"{where}method.{error}")
                continue
            if part.trainer.activation_checkpointing and not method.recompute_units(draft):
                self._problems.append(
                    f"{where}trainer.activation_checkpointing: wanted a method with recompute "
                    f"units, got {method.name}, which has none"
                )
            built.append(_Built(name, part, method, draft))
        if not layouts:
            return
        layout = unite(layouts).layout
        self._features(layout)
        self._micro_batch()
        for one in built:
            self._draft(one, weights, layouts[one.name], layout)
        if len(built) > 1:
            self._together(weights)

    def _features(self, layout: FeatureLayout) -> None:
        for spec in layout.features:
            norm = ", final norm" if spec.final_norm else ""
            layers = ", ".join(map(str, spec.layer_ids))
            self._say(
                f"feature {spec.name}",
                f"layers {layers} of hidden_states{norm}: {spec.width} {spec.dtype}",
            )
        kind, store = self._recipe.store
        wire = layout.stored_bytes_per_token(store.encoding)
        self._say(
            "wire",
            f"{wire + IDS_AND_MASK_BYTES:,} bytes a token ({wire:,} of features, encoding "
            f"{store.encoding}; {layout.bytes_per_token:,} decoded)",
        )
        if (reason := STORES.get(kind).unavailable()) is not None:
            self._notes.append(f"store.kind: {kind} is not available here: {reason}")
        for text, is_problem in self._room(wire):
            (self._problems if is_problem else self._notes).append(text)

    def _room(self, bytes_per_token: int) -> Iterator[tuple[str, bool]]:
        """The store against the largest step that is asked for; (text, whether it must fail)."""
        recipe = self._recipe
        capacity = recipe.store[1].model_dump().get("capacity_bytes")
        if capacity is None:
            return
        tokens, in_flight = recipe.order.batch_tokens, recipe.stream.in_flight_steps + 1
        needed, most = (
            room_needed(
                n, num_samples=-(-n // self._longest), bytes_per_token=bytes_per_token,
                in_flight=in_flight,
            )
            for n in (tokens, tokens * 3 // 2)
        )  # fmt: skip
        self._say("store", f"{recipe.store[0]}, {size(capacity)}; requests {size(needed)}")
        text = (
            f"store.capacity_bytes: wanted at least {{}} for {in_flight} steps of {{}} tokens "
            f"(stream.in_flight_steps + 1), got {capacity}"
        )
        if needed > capacity:
            yield text.format(needed, tokens), True
        elif most > capacity:
            last = "; the last step of an epoch may be that large"
            yield text.format(most, tokens * 3 // 2) + last, False

    def _micro_batch(self) -> None:
        self._say("micro-batch", f"{self._batch_tokens:,} tokens")

    @property
    def _batch_tokens(self) -> int:
        order = self._recipe.order
        share = max(-(-order.batch_tokens // self._ranks), self._longest)
        return min(share, order.micro_batch_tokens or share)

    def _draft(
        self, one: _Built, weights: TargetWeights, own: FeatureLayout, stream: FeatureLayout
    ) -> None:
        trainer, on_cuda = one.recipe.trainer, one.recipe.trainer.precision == "bfloat16"
        prefix = f"{one.name} " if one.name else ""
        batch = Batch(
            tokens=self._batch_tokens,
            longest=self._longest,
            held=2 if on_cuda else 2 + self._recipe.stream.prefetch_steps,
            feature_bytes=(own if on_cuda else stream).bytes_per_token,
        )
        work = step_work(one.method, weights, trainer, batch)
        rows = f", up to {work.rows:,} rows of a micro-batch" if work else ""
        count = num_parameters(one.draft)
        self._say(f"{prefix}draft", f"{one.method.name}, {count:,} trained parameters{rows}")
        found = memory(
            one.method,
            one.draft,
            weights,
            trainer,
            batch,
            ranks=self._ranks,
            device=torch.device("cuda" if on_cuda else "cpu"),
        )
        for part in fields(found):
            self._say(f"{prefix}memory {part.name}", size(getattr(found, part.name)))
        unknown = "" if work else f" without activations and loss, which {one.method.name} lacks"
        self._say(f"{prefix}memory total", f"{size(found.total)} a rank at most{unknown}")
        self._memory[one.name] = found

    def _together(self, weights: TargetWeights) -> None:
        """Drafts train one after the other: what a step needs is there for one at a time."""
        total = together(list(self._memory.values()), weights)
        self._say("memory of all", f"{size(total)} a rank at most")


def describe_target(spec: TargetSpec) -> str:
    return (
        f"{spec.name} ({spec.model_type}): hidden {spec.hidden_size}, {spec.num_layers} layers, "
        f"{spec.num_heads} heads ({spec.num_kv_heads} of keys), vocabulary {spec.vocab_size}, "
        f"{spec.dtype}"
    )


def size(nbytes: int) -> str:
    """In the largest binary unit that leaves at least 1."""
    value, unit = float(nbytes), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.2f} {unit}"
