"""Random states of a process, as plain values that torch.load(weights_only=True) reads."""

from __future__ import annotations

import hashlib
import random
from typing import Any

import numpy
import torch


def seed_everything(seed: int, rank: int) -> None:
    """Seed torch, numpy and random; every rank gets a stream of its own."""
    digest = hashlib.sha256(f"{seed}/{rank}".encode()).digest()
    value = int.from_bytes(digest[:4], "little")
    torch.manual_seed(value)
    numpy.random.seed(value)
    random.seed(value)


def capture() -> dict[str, Any]:
    """The states of torch (CPU and this rank's CUDA device), numpy and random."""
    kind, keys, position, has_gauss, gauss = numpy.random.get_state(legacy=True)
    version, words, gauss_next = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "numpy": [kind, [int(key) for key in keys], int(position), int(has_gauss), float(gauss)],
        "random": [version, list(words), gauss_next],
    }


def restore(state: dict[str, Any]) -> None:
    """Undo everything drawn since `capture`."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    kind, keys, position, has_gauss, gauss = state["numpy"]
    numpy.random.set_state((kind, numpy.array(keys, numpy.uint32), position, has_gauss, gauss))
    version, words, gauss_next = state["random"]
    random.setstate((version, tuple(words), gauss_next))
