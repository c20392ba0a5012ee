"""The counter of bytes copied, and the figure that metrics show."""

from __future__ import annotations

import threading
from collections import Counter

import pytest
import torch

from specforge_ext.copies import STAGES, copied, copies_from, counting
from specforge_ext.loader.stream import pack
from specforge_ext.records import FeatureLayout, FeatureSpec, Sample
from specforge_ext.trainer.metrics import transfer_of
from store_cases import make_prompt


def test_contexts_count_what_happens_in_them() -> None:
    copied("put", 1000)  # nobody counts
    with counting() as outer:
        copied("put", 1)
        with counting() as inner:
            copied("put", 10)
            copied("device", 5)
        copied("collate", 100)
    copied("put", 1000)
    assert outer == {"put": 11, "device": 5, "collate": 100}
    assert inner == {"put": 10, "device": 5}


def test_a_context_ends_with_an_error() -> None:
    with pytest.raises(RuntimeError), counting() as copies:
        raise RuntimeError
    copied("put", 1)
    assert not copies


def test_threads_do_not_see_each_other() -> None:
    with counting() as copies:
        thread = threading.Thread(target=copied, args=("put", 7))
        thread.start()
        thread.join(10)
    assert not copies


def test_counter_of_another_process() -> None:
    assert copies_from({"put": 3, "engine": 0}) == Counter({"put": 3, "engine": 0})
    for numbers in ({"pet": 3}, {"put": -1}, {"put": "3"}, {"put": 1.5}):
        with pytest.raises(ValueError, match=r"copied: wanted bytes by stage \(gather, .*got 'p"):
            copies_from(numbers)


def test_collate_counts_features_alone() -> None:
    layout = FeatureLayout(
        (FeatureSpec("aux", (1, 2), 6, "bfloat16"), FeatureSpec("last", (3,), 3, "float32"))
    )
    samples = [
        Sample(make_prompt(n, n), {"aux": torch.randn(n, 6).bfloat16(), "last": torch.randn(n, 3)})
        for n in (5, 1, 3)
    ]
    with counting() as copies:
        pack(samples, layout)
    assert copies == {"collate": 9 * (6 * 2 + 3 * 4)}


def test_figures_of_a_lap() -> None:
    assert transfer_of(200, {"engine": 200, "collate": 300}) == {
        "transfer/bytes_delivered": 200,
        "transfer/bytes_copied_per_byte": 2.5,
        "transfer/copied_per_byte/engine": 1.0,
        "transfer/copied_per_byte/collate": 1.5,
    }
    assert transfer_of(0, {"engine": 9})["transfer/bytes_copied_per_byte"] is None
    assert len(STAGES) == len(set(STAGES))
