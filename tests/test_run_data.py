"""The data set of a run: what changes its fingerprint, what is used again, what is refused."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import toy_engine
from specforge_ext.config import override
from specforge_ext.loader import GlobalStep
from specforge_ext.prompts import sources
from specforge_ext.prompts.python_stdlib import Split, stdlib_files
from specforge_ext.prompts.tokenizer import open_tokenizer, tokenizer_hash
from specforge_ext.records import FeatureLayout, FeatureSpec
from specforge_ext.runs.data import Dataset, fingerprint, prepare, prompt_source, read_dataset
from specforge_ext.runs.local import check_room
from specforge_ext.runs.recipe import Recipe, build, load
from toy_engine import ToyConfig, ToyEngine

SMALL = (
    "data.train.num_prompts=6",
    "data.train.prefix_tokens=8",
    "data.heldout.num_prompts=3",
    "data.heldout.prefix_tokens=8",
    "data.generate.max_new_tokens=5",
)


@cache
def few_files(split: Split) -> list[Path]:
    """Of the standard library's every twentieth, since all are read again for every key."""
    return stdlib_files(split)[::20]


@pytest.fixture(autouse=True)
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    toy_engine.register(monkeypatch)
    monkeypatch.setattr(sources, "stdlib_files", few_files)


def recipe_with(*assignments: str) -> Recipe:
    source = override(load(None, []).source, [*SMALL, *assignments])
    return build({**source, "engine": {"kind": "toy"}})


def written(recipe: Recipe, engine: ToyEngine, directory: Path, **more: Any) -> Dataset:
    progress = more.pop("progress", lambda *_: None)
    seed = recipe.run.seed
    return read_dataset(
        prepare(recipe.data, engine, directory=directory, seed=seed, progress=progress)
    )


def test_target_writes_once(tmp_path: Path) -> None:
    """Again with the same recipe: nothing is generated, and the texts are the same."""
    recipe, engine = recipe_with(), ToyEngine(ToyConfig())
    first = written(recipe, engine, tmp_path)
    assert engine.calls == [(6, 5, 0.8), (3, 5, 0.8)]
    again = written(recipe, engine, tmp_path)
    assert len(engine.calls) == 2
    assert again.fingerprint == first.fingerprint
    assert torch.equal(again.train.input_ids, first.train.input_ids)
    assert [p.tolist() for p in again.heldout] == [p.tolist() for p in first.heldout]


def test_what_is_trained_on_and_what_is_held_out(tmp_path: Path) -> None:
    data = written(recipe_with(), ToyEngine(ToyConfig()), tmp_path)
    for prompt in data.train:
        assert prompt.input_ids[8:].tolist() == [prompt.input_ids[0]] * 5  # as the toy writes
        assert prompt.loss_mask.tolist() == [0] * 8 + [1] * 4 + [0]
    assert [len(prefix) for prefix in data.heldout] == [8] * 3
    assert "6 samples, 78 tokens, 24 scored; 3 held-out prompts" in data.describe()


def test_chunks_change_nothing_but_the_signs_of_progress(tmp_path: Path) -> None:
    seen: list[tuple[int, int, str]] = []
    recipe, engine = recipe_with("data.generate.chunk=4"), ToyEngine(ToyConfig())
    data = written(recipe, engine, tmp_path / "a", progress=lambda *sign: seen.append(sign))
    assert [call[0] for call in engine.calls] == [4, 2, 3]
    assert [sign[:2] for sign in seen] == [(4, 6), (6, 6), (3, 3)]
    assert "train" in seen[0][2] and "heldout" in seen[2][2]
    whole = written(recipe_with(), engine, tmp_path / "b")
    assert whole.fingerprint == data.fingerprint
    assert torch.equal(whole.train.input_ids, data.train.input_ids)


def key_of(recipe: Recipe, engine: ToyEngine) -> str:
    source = prompt_source(recipe.data.train, where="data.train")
    tokenizer = tokenizer_hash(open_tokenizer("demo"))
    return fingerprint(recipe.data, source, engine, tokenizer, recipe.run.seed)


def test_fingerprint_follows_all_that_shapes_the_texts() -> None:
    recipes = [
        recipe_with(),
        recipe_with("data.generate.temperature=0.7"),
        recipe_with("data.generate.max_new_tokens=6"),
        recipe_with("data.generate.stop_at_eos=true"),
        recipe_with("data.train.num_prompts=7"),
        recipe_with("data.train.prefix_tokens=9"),
        recipe_with("data.train.seed=1"),
        recipe_with("data.train.split=heldout"),
        recipe_with("run.seed=1"),
        recipe_with("data.generate="),
    ]
    engine = ToyEngine(ToyConfig())
    keys = [key_of(recipe, engine) for recipe in recipes]
    keys.append(key_of(recipes[0], ToyEngine(ToyConfig(final_norm=2.0))))
    assert len(set(keys)) == len(keys)


def test_fingerprint_ignores_what_does_not_matter() -> None:
    engine = ToyEngine(ToyConfig())
    others = ("data.generate.chunk=1", "trainer.lr=1", "order.epochs=3", "data.heldout.seed=3")
    assert {key_of(recipe_with(other), engine) for other in others} == {
        key_of(recipe_with(), engine)
    }


def test_fingerprint_follows_the_files(tmp_path: Path) -> None:
    texts = toy_engine.write_ids(tmp_path / "t.jsonl", [5, 6])
    recipe = build(toy_engine.recipe_of(tmp_path, texts))
    engine = ToyEngine(ToyConfig())
    before = key_of(recipe, engine)
    toy_engine.write_ids(texts, [5, 7])
    assert key_of(recipe, engine) != before
    toy_engine.write_ids(texts, [5, 6])
    assert key_of(recipe, engine) == before


def test_a_target_that_must_write_and_has_not_been_told_how(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^data\.train: python_stdlib: wanted a target"):
        written(recipe_with("data.generate="), ToyEngine(ToyConfig()), tmp_path)


def test_damaged_file_is_refused_by_name(tmp_path: Path) -> None:
    recipe, engine = recipe_with(), ToyEngine(ToyConfig())
    files = prepare(recipe.data, engine, directory=tmp_path, seed=0, progress=lambda *_: None)
    path = Path(files["train"])
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(ValueError, match=rf"{path.name}: wanted a cache of prompts, found a dam"):
        written(recipe, engine, tmp_path)


def test_a_store_too_small_for_the_steps_in_flight_is_refused() -> None:
    layout = FeatureLayout((FeatureSpec("aux", (1,), 8, "float32"),))
    steps = [GlobalStep(0, 0, (0, 1)), GlobalStep(1, 0, (2,))]
    needed = 3 * (110 * (8 * 4 + 5) + 2 * 8192)
    each = layout.stored_bytes_per_token("none")
    check_room(steps, [100, 10, 50], each, in_flight=3, capacity_bytes=needed)
    with pytest.raises(ValueError, match=rf"store\.capacity_bytes: wanted at least {needed} for 3"):
        check_room(steps, [100, 10, 50], each, in_flight=3, capacity_bytes=needed - 1)
    each = layout.stored_bytes_per_token("fp8_e4m3_row")
    needed = 3 * (110 * (8 + 4 + 5) + 2 * 8192)
    check_room(steps, [100, 10, 50], each, in_flight=3, capacity_bytes=needed)
    with pytest.raises(ValueError, match=rf"store\.capacity_bytes: wanted at least {needed} for 3"):
        check_room(steps, [100, 10, 50], each, in_flight=3, capacity_bytes=needed - 1)
