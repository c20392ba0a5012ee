"""What loss_rows refuses: each message names the argument, what was wanted and what came."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from specforge_ext import _C

RESULTS = ("loss", "accepted", "top_prob", "entropy")


def refused(of: str, match: str, **changes: Any) -> None:
    """Asserts that a call of 4 rows, 2 teachers and 9 words is refused once this is changed."""
    arguments: dict[str, Any] = {
        "logits": torch.ones(4, 9),
        "teacher": None if of == "hard_ce" else torch.ones(2, 9),
        "row_to_teacher": torch.zeros(4, dtype=torch.int32),
        "weight": torch.ones(4),
        "correct": torch.empty(4, dtype=torch.uint8),
        **{name: torch.empty(4) for name in RESULTS},
        "kind": of,
        "temperature": 1.0,
        "beta": 0.5,
        "hard_weight": 0.0,
        "writes_gradient": True,
    }
    if of == "hard_ce":
        arguments["label"] = torch.zeros(2, dtype=torch.int32)
    if of == "lk_lambda":
        arguments["kl_weight"] = torch.ones(4)
    _C.loss_rows(**{name: value for name, value in arguments.items()})  # fits
    with pytest.raises(ValueError, match=match):
        _C.loss_rows(**{**arguments, **changes})


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize(
    ("kind", "changes", "match"),
    [
        (
            "soft_ce",
            {"weight": torch.ones(5)},
            r"loss_rows: weight must be \[rows=4\] f32, got \[5\] f32",
        ),
        (
            "soft_ce",
            {"weight": torch.ones(4).double()},
            r"loss_rows: weight must be f32, got \[4\] f64",
        ),
        (
            "soft_ce",
            {"teacher": torch.ones(2, 8)},
            "loss_rows: teacher must have at least as many columns as logits, got 8",
        ),
        (
            "soft_ce",
            {"teacher": torch.ones(9, 2).T},
            r"teacher must be contiguous, got \[2, 9\] f32 with strides \[1, 2\]",
        ),
        (
            "soft_ce",
            {"row_to_teacher": ints(0, 0, 1, 2)},
            r"row_to_teacher must be in \[0, 2\), got 2 at row 3",
        ),
        (
            "hard_ce",
            {"row_to_teacher": ints(0, -1, 1, 1)},
            r"row_to_teacher must be in \[0, 2\), got -1 at row 1",
        ),
        ("hard_ce", {"label": ints(9, 0)}, r"label must be in \[0, 9\), got 9 at row 0"),
        ("hard_ce", {"label": None}, "label must be given with a hard cross entropy, got none"),
        (
            "hard_ce",
            {"teacher": torch.ones(2, 9)},
            r"teacher must not be given with the hard cross entropy, got \[2, 9\] f32",
        ),
        (
            "hard_ce",
            {"hard_weight": 0.5},
            "hard_weight must be 0 with the hard cross entropy, got 0.5",
        ),
        (
            "hard_ce",
            {"teacher_lse": torch.ones(2)},
            r"teacher_lse must not be given without a teacher, got \[2\] f32",
        ),
        ("soft_ce", {"teacher": None}, "teacher must be given with this loss, got none"),
        (
            "soft_ce",
            {"label": ints(0, 0)},
            r"label must not be given without a hard cross entropy, got \[2\] i32",
        ),
        (
            "soft_ce",
            {"hard_weight": 0.5},
            "label must be given with a hard cross entropy, got none",
        ),
        (
            "soft_ce",
            {"hard_weight": 0.5, "label": ints(0, -1), "row_to_teacher": ints(0, 0, 1, 1)},
            r"label must be in \[0, 9\), got -1 at row 2",
        ),
        (
            "soft_ce",
            {"teacher_argmax": ints(0, 0)},
            r"teacher_argmax must not be given without teacher_lse, got \[2\] i32",
        ),
        (
            "soft_ce",
            {"teacher_lse": torch.ones(3)},
            r"teacher_lse must be \[teacher_rows=2\] f32, got \[3\] f32",
        ),
        (
            "soft_ce",
            {"teacher_lse": torch.tensor(1.0)},
            r"loss_rows: teacher_lse must have a dimension, got \[\] f32",
        ),
        (
            "soft_ce",
            {"kl_weight": torch.ones(4)},
            r"kl_weight must not be given but with LK-lambda, got \[4\] f32",
        ),
        ("lk_lambda", {"kl_weight": None}, "kl_weight must be given with LK-lambda, got none"),
        ("jsd", {"temperature": 0.0}, "temperature must be finite and above 0, got 0.0"),
        ("jsd", {"temperature": float("inf")}, "temperature must be finite and above 0, got inf"),
        ("jsd", {"beta": 1.0}, "beta must be between 0 and 1, got 1.0"),
        ("l1", {"hard_weight": -0.5}, "hard_weight must be finite and at least 0, got -0.5"),
        (
            "l1",
            {"kind": "tv"},
            "kind must be one of hard_ce, soft_ce, reverse_kl, jsd, l1, lk_alpha, lk_lambda, "
            "got tv",
        ),
        (
            "l1",
            {"logits": torch.ones(4, 0)},
            r"the vocabulary must be in \[1, 2\^31\), got 0",
        ),
        ("l1", {"entropy": torch.ones(3)}, r"entropy must be \[rows=4\] f32, got \[3\] f32"),
        ("l1", {"logits": torch.ones(4, 9, dtype=torch.complex64)}, "complex64 is not supported"),
        ("l1", {"logits": torch.ones(4, 9, device="meta")}, "must be on cpu or cuda, got meta"),
    ],
)
def test_messages_name_what_does_not_fit(kind: str, changes: dict[str, Any], match: str) -> None:
    refused(kind, match, **changes)
