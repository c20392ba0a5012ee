"""Features of the engine `hf` written where the caller says: the same bits, copied once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from specforge_ext.copies import counting
from specforge_ext.engines import feature_batches
from specforge_ext.engines.capture import assemble, fill
from specforge_ext.engines.hf import HfConfig, HfEngine
from specforge_ext.engines.hf_model import wrap_model
from specforge_ext.records import DTYPES, FeatureLayout, Prompt
from test_engine_hf import HIDDEN, layout, llama, prompts, randomised

LENGTHS = [7, 1, 30, 8, 19, 64, 2, 3]
"""64: longer than a batch; 1: one row; the others share batches with padding."""
GUARD = 3
"""Rows on either side of where a sample's features go."""


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def engine(request: pytest.FixtureRequest) -> HfEngine:
    model = randomised(llama).to(DTYPES[request.param])
    config = HfConfig(model="tiny", dtype=request.param, max_batch_tokens=40, device="cpu")
    return HfEngine(wrap_model(model, name="tiny"), config)


class Memory:
    """Rooms with guards: what an engine writes outside of its views is seen."""

    def __init__(self, wanted: FeatureLayout) -> None:
        self._layout = wanted
        self.asked: list[str] = []
        self._rooms: list[Tensor] = []

    def __call__(self, prompt: Prompt) -> Mapping[str, Tensor]:
        self.asked.append(prompt.sample_id)
        return {
            spec.name: self._room(len(prompt), spec.width, DTYPES[spec.dtype])
            for spec in self._layout.features
        }

    def _room(self, rows: int, width: int, dtype: torch.dtype) -> Tensor:
        self._rooms.append(torch.full((rows + 2 * GUARD, width), 77.0, dtype=dtype))
        return self._rooms[-1][GUARD : GUARD + rows]

    def guards_are_whole(self) -> bool:
        return all(bool((r[:GUARD] == 77).all() and (r[-GUARD:] == 77).all()) for r in self._rooms)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_same_bits_in_the_memory_that_was_given(engine: HfEngine, dtype: str) -> None:
    """Conversion on the way rounds as it does beside it."""
    given, wanted = prompts(LENGTHS), layout(dtype=dtype)
    own = list(engine.features(given, wanted))
    memory = Memory(wanted)
    views: dict[str, Mapping[str, Tensor]] = {}

    def into(prompt: Prompt) -> Mapping[str, Tensor]:
        views[prompt.sample_id] = memory(prompt)
        return views[prompt.sample_id]

    for mine, sample in zip(own, engine.features(given, wanted, into=into), strict=True):
        assert sample.prompt is mine.prompt
        assert sample.features is views[sample.prompt.sample_id]
        for name, feature in mine.features.items():
            assert torch.equal(feature, sample.features[name])
    assert sorted(memory.asked) == sorted(p.sample_id for p in given)
    assert memory.guards_are_whole()


def test_fill_is_assemble() -> None:
    """The definition: torch.cat of the converted layers; rows of any leading shape."""
    streams = {i: torch.randn(2, 5, HIDDEN) for i in range(6)}
    last = torch.randn(2, 5, HIDDEN)
    wanted = layout(dtype="bfloat16")
    out = {
        spec.name: torch.empty(2, 5, spec.width, dtype=torch.bfloat16) for spec in wanted.features
    }
    fill(wanted, streams, last, out)
    for name, feature in assemble(wanted, streams, last).items():
        assert torch.equal(out[name], feature)


class Recorder(TorchDispatchMode):
    """Shapes of what operators return."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[str, tuple[int, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.shapes.append((str(func), tuple(out.shape)))
        return out


def test_nothing_as_wide_as_a_feature_is_made(engine: HfEngine) -> None:
    """Three layers side by side: only views of the memory that was given are so wide."""
    [prompt], wanted = prompts([9]), layout(dtype="float16")
    memory = Memory(wanted)
    rooms = {prompt.sample_id: memory(prompt)}
    with Recorder() as recorder:
        list(engine.features([prompt], wanted, into=lambda p: rooms[p.sample_id]))
    wide = [name for name, shape in recorder.shapes if shape[-1:] == (3 * HIDDEN,)]
    assert wide == []
    copies = [shape for name, shape in recorder.shapes if name.startswith("aten.copy_")]
    assert copies.count((9, HIDDEN)) == 5  # 3 of aux, raw, last


def test_each_byte_is_copied_once(engine: HfEngine) -> None:
    given, wanted = prompts(LENGTHS), layout(dtype="bfloat16")
    for into in (None, Memory(wanted)):
        with counting() as copies:
            list(engine.features(given, wanted, into=into))
        assert copies == {"engine": sum(LENGTHS) * wanted.bytes_per_token}


def test_layers_are_joined_where_they_are_before_they_leave_a_device() -> None:
    """From the device `meta`, as from a GPU: whole tensors of the right dtype go as they are."""
    streams = {i: torch.empty(5, HIDDEN, device="meta") for i in range(6)}
    last = torch.empty(5, HIDDEN, device="meta")
    counted = []
    for dtype in ("float32", "bfloat16"):
        wanted = layout(dtype=dtype)
        there = {s.name: torch.empty(5, s.width, dtype=DTYPES[dtype]) for s in wanted.features}
        with counting() as copies, pytest.raises(NotImplementedError, match="meta tensor"):
            fill(replace(wanted, features=wanted.features[:1]), streams, last, there)
        counted.append(copies["gather"])
        with counting() as copies, pytest.raises(NotImplementedError, match="meta tensor"):
            fill(replace(wanted, features=wanted.features[1:]), streams, last, there)
        counted.append(copies["gather"])
    assert counted == [5 * 3 * HIDDEN * 4, 0, 5 * 3 * HIDDEN * 2, 5 * HIDDEN * 2]


def test_memory_that_is_not_to_be_had(engine: HfEngine) -> None:
    """An error of `into` comes out as it is, at its batch."""

    def into(prompt: Prompt) -> Mapping[str, Tensor]:
        raise KeyError(prompt.sample_id)

    with pytest.raises(KeyError, match="0-0"):
        next(engine.features(prompts([3]), layout(), into=into))


def test_the_device_that_was_given_is_waited_for_too(
    engine: HfEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A target on the CPU may write to a GPU, whose stream then has the copies."""
    waited: list[set[str]] = []
    monkeypatch.setattr(
        feature_batches, "_finish_copies", lambda devices: waited.append({d.type for d in devices})
    )

    def into(prompt: Prompt) -> Mapping[str, Tensor]:
        return {
            s.name: torch.empty(len(prompt), s.width, dtype=DTYPES[s.dtype], device="meta")
            for s in layout().features
        }

    next(engine.features(prompts([3]), layout(), into=into))
    assert waited == [{"cpu", "meta"}]


@pytest.mark.gpu
@pytest.mark.parametrize("pin", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_from_the_gpu_into_host_memory(dtype: str, pin: bool) -> None:
    """Whole when the sample comes, whether or not the memory is page-locked."""
    if not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")
    model = randomised(llama).to("cuda")
    config = HfConfig(model="tiny", dtype="float32", max_batch_tokens=40, device="cuda")
    on_gpu = HfEngine(wrap_model(model, name="tiny"), config)
    given, wanted = prompts(LENGTHS), layout(dtype=dtype)

    def into(prompt: Prompt) -> Mapping[str, Tensor]:
        return {
            s.name: torch.full((len(prompt), s.width), 77.0, dtype=DTYPES[dtype], pin_memory=pin)
            for s in wanted.features
        }

    own = list(on_gpu.features(given, wanted))
    for mine, sample in zip(own, on_gpu.features(given, wanted, into=into), strict=True):
        for name, feature in mine.features.items():
            assert torch.equal(feature.cpu(), sample.features[name])
