"""The row kernel of the draft losses, run by the emulator, against the float64 definition.

Every path (one block or a cluster, held or streamed or scalar) is asked for by name, so that each
meets small and odd shapes; the choice between them is tested apart.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import emulated
from emulated import LOSS_KINDS, RowResults
from loss_rows_cases import Case, check, make_case, without_gradient

REASON = emulated.unavailable_reason()
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

DTYPES = [torch.float32, torch.bfloat16]
F32, BF16 = DTYPES
VECTOR_PATHS = [("held", 1), ("streamed", 1), ("held", 2), ("held", 4), ("held", 8)]
PATHS = [*VECTOR_PATHS, ("scalar", 1)]


@pytest.fixture(autouse=True)
def forward_order() -> Iterator[None]:
    emulated.set_order("forward")
    yield
    emulated.set_order("forward")


def run(case: Case, path: tuple[str, int] | None = None) -> tuple[RowResults, Tensor]:
    """(results, what the logits became)."""
    logits = case.logits.clone()
    results = emulated.loss_rows_(
        logits,
        case.teacher,
        row_to_teacher=case.row_to_teacher,
        weight=case.weight,
        kind=case.kind,
        temperature=case.temperature,
        beta=case.beta,
        hard_weight=case.hard_weight,
        writes_gradient=case.writes_gradient,
        path=path,
        **case.options,
    )
    return results, logits


@pytest.mark.parametrize(
    ("vocab", "dtype", "teacher_dtype", "sm80", "sm90"),
    [
        (1, BF16, BF16, ("held", 1), ("held", 1)),
        (32768, BF16, BF16, ("held", 1), ("held", 1)),
        (32776, BF16, BF16, ("streamed", 1), ("held", 2)),
        (65544, BF16, BF16, ("streamed", 1), ("held", 4)),
        (151936, BF16, BF16, ("streamed", 1), ("held", 8)),
        (262144, BF16, BF16, ("streamed", 1), ("held", 8)),
        (262152, BF16, BF16, ("streamed", 1), ("streamed", 1)),
        (16384, F32, F32, ("held", 1), ("held", 1)),
        (16392, F32, F32, ("streamed", 1), ("held", 2)),
        (131080, F32, F32, ("streamed", 1), ("streamed", 1)),
        (32000, BF16, F32, ("streamed", 1), ("streamed", 1)),
    ],
)
def test_plan(
    vocab: int,
    dtype: torch.dtype,
    teacher_dtype: torch.dtype,
    sm80: tuple[str, int],
    sm90: tuple[str, int],
) -> None:
    assert emulated.loss_rows_plan(8, vocab, dtype, teacher_dtype) == sm80
    assert emulated.loss_rows_plan(9, vocab, dtype, teacher_dtype) == sm90
    assert emulated.loss_rows_plan(10, vocab, dtype, teacher_dtype) == sm90
    scalar = emulated.loss_rows_plan(9, vocab, dtype, teacher_dtype, aligned=False)
    assert scalar == ("scalar", 1)


# one element; below a chunk; ragged: the scalar path, chosen by the launcher
@pytest.mark.parametrize("vocab", [1, 7, 1031])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", LOSS_KINDS)
def test_ragged_rows(kind: str, dtype: torch.dtype, vocab: int) -> None:
    case = make_case(kind, 6, vocab, dtype=dtype, gives_lse=True, temperature=1.7)
    check(case, *run(case))


# one chunk (with a cluster: blocks without any); several warps, the last ragged
@pytest.mark.parametrize("vocab", [8, 1032, 4104])
@pytest.mark.parametrize("path", VECTOR_PATHS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", LOSS_KINDS)
def test_vector_rows(kind: str, dtype: torch.dtype, path: tuple[str, int], vocab: int) -> None:
    case = make_case(kind, 4, vocab, dtype=dtype, gives_lse=True, temperature=0.7)
    check(case, *run(case, path))


@pytest.mark.parametrize("vocab", [1031, 1032])
@pytest.mark.parametrize(("dtype", "teacher_dtype"), [(F32, BF16), (BF16, F32)])
@pytest.mark.parametrize("kind", [kind for kind in LOSS_KINDS if kind != "hard_ce"])
def test_mixed_dtypes(
    kind: str, dtype: torch.dtype, teacher_dtype: torch.dtype, vocab: int
) -> None:
    case = make_case(kind, 4, vocab, dtype=dtype, teacher_dtype=teacher_dtype)
    check(case, *run(case))


# The teacher's own columns past the draft's give the normaliser and the argmax.
@pytest.mark.parametrize("rest", [8, 2000])
@pytest.mark.parametrize("path", PATHS, ids=str)
@pytest.mark.parametrize("kind", ["soft_ce", "jsd", "lk_alpha", "lk_lambda"])
def test_whole_teacher_vocabulary(kind: str, path: tuple[str, int], rest: int) -> None:
    case = make_case(kind, 6, 520, dtype=BF16, rest=rest, temperature=1.3)
    results, gradient = run(case, path)
    check(case, results, gradient)
    if rest == 2000:
        assert results.correct.sum() < 6, "a teacher's first choice lies outside the draft"


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_columns_past_the_vocabulary_are_not_read_where_the_normaliser_is_given(
    path: tuple[str, int],
) -> None:
    case = make_case("lk_alpha", 4, 520, rest=16, gives_lse=True)
    assert case.teacher is not None
    case.teacher[:, 520:] = torch.nan
    check(case, *run(case, path))


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_given_argmax_decides_what_is_correct(path: tuple[str, int]) -> None:
    case = make_case("soft_ce", 6, 520, gives_lse=True, gives_argmax=True, teachers=2)
    case.logits[0, 0] = 50.0  # rows 0, 2 and 4: teacher 0, whose choice is 0
    results, gradient = run(case, path)
    check(case, results, gradient)
    assert results.correct.tolist()[0] == 1


@pytest.mark.parametrize("path", PATHS, ids=str)
@pytest.mark.parametrize("kind", [kind for kind in LOSS_KINDS if kind != "hard_ce"])
def test_hard_cross_entropy_on_top(kind: str, path: tuple[str, int]) -> None:
    """Labels: the last element, the first, the middle."""
    case = make_case(kind, 6, 1032, hard_weight=0.6, temperature=1.4, rest=8)
    check(case, *run(case, path))


@pytest.mark.parametrize("path", PATHS, ids=str)
@pytest.mark.parametrize("kind", LOSS_KINDS)
def test_metrics_only_leaves_the_logits(kind: str, path: tuple[str, int]) -> None:
    case = without_gradient(make_case(kind, 4, 520, hard_weight=0.5))
    check(case, *run(case, path))


# Real vocabularies, as the launcher runs them: the last that one block holds, the first that two
# do, the streamed ones of float32.
@pytest.mark.parametrize(
    ("vocab", "dtype"), [(32000, BF16), (32776, BF16), (65544, BF16), (16392, F32)]
)
@pytest.mark.parametrize("kind", ["soft_ce", "lk_lambda", "jsd"])
def test_long_rows(kind: str, vocab: int, dtype: torch.dtype) -> None:
    case = make_case(kind, 1, vocab, dtype=dtype, gives_lse=True)
    check(case, *run(case))


@pytest.mark.parametrize("path", PATHS, ids=str)
@pytest.mark.parametrize("kind", LOSS_KINDS)
def test_far_logits(kind: str, path: tuple[str, int]) -> None:
    """+-1e4: exponentials of anything but the maximum are 0, and none overflows."""
    case = make_case(kind, 4, 64, gives_lse=True, teachers=4)
    case.row_to_teacher.copy_(torch.arange(4))
    case.weight.fill_(1.0)
    for rows in (case.logits, case.teacher):
        if rows is not None:
            rows.fill_(-1e4)
            rows[0, 5] = rows[1, 5] = 1e4
            rows[3] = 1e4  # flat, and row 2 is flat far below
    if case.teacher is not None:
        case.teacher[1, 5], case.teacher[1, 6] = -1e4, 1e4
        exact = torch.logsumexp(case.teacher.double(), -1) + 0.5
        case.options["teacher_lse"] = exact.float()
    check(case, *run(case, path))


@pytest.mark.parametrize("path", PATHS, ids=str)
@pytest.mark.parametrize("kind", ["hard_ce", "soft_ce", "lk_alpha"])
def test_rows_of_weight_zero_are_not_read(kind: str, path: tuple[str, int]) -> None:
    """Nor is their teacher, their label or their share of KL."""
    case = make_case(kind, 3, 64, hard_weight=0.5, teachers=2)
    case.row_to_teacher.copy_(torch.tensor([0, 1, 0]))
    case.options["label"][1] = -100
    if case.teacher is not None:
        case.teacher[1] = torch.nan
    check(case, *run(case, path))


@pytest.mark.parametrize("path", PATHS, ids=str)
@pytest.mark.parametrize("bad", [-1, 2, 2**31 - 1])
def test_row_without_teacher_is_marked(bad: int, path: tuple[str, int]) -> None:
    case = make_case("jsd", 3, 40, teachers=2)
    case.weight.fill_(1.0)
    case.logits.fill_(0.5)
    case.row_to_teacher.copy_(torch.tensor([0, bad, 1]))
    results, gradient = run(case, path)
    assert results.loss.isnan().tolist() == [False, True, False]
    assert [float(x[1]) for x in results[1:]] == [0.0] * 4
    assert (gradient[1] == 0).all() and (gradient[[0, 2]] != 0).any()
    kept, logits = run(without_gradient(case), path)
    assert kept.loss.isnan()[1] and (logits == 0.5).all()


@pytest.mark.parametrize("path", PATHS, ids=str)
@pytest.mark.parametrize("bad", [-1, 40])
def test_row_without_label_is_marked(bad: int, path: tuple[str, int]) -> None:
    case = make_case("hard_ce", 3, 40, teachers=3)
    case.weight.fill_(1.0)
    case.logits.fill_(0.5)
    case.row_to_teacher.copy_(torch.arange(3))
    case.options["label"][1] = bad
    results, gradient = run(case, path)
    assert results.loss.isnan().tolist() == [False, True, False]
    assert (gradient[1] == 0).all()


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_correct_takes_the_lowest_index_on_ties(path: tuple[str, int]) -> None:
    case = make_case("soft_ce", 3, 4096)
    assert case.teacher is not None
    case.weight.fill_(1.0)
    case.row_to_teacher.copy_(torch.arange(3))
    case.logits.zero_()
    case.teacher.zero_()
    case.logits[0, [9, 4000]] = 1.0
    case.teacher[0, [9, 3000]] = 1.0  # lowest: 9 and 9
    case.logits[1, [10, 4000]] = 1.0
    case.teacher[1, 4000] = 1.0  # 10 and 4000
    results, _ = run(case, path)
    assert results.correct.tolist() == [1, 0, 1]


@pytest.mark.parametrize("path", PATHS, ids=str)
@pytest.mark.parametrize("kind", ["soft_ce", "l1"])
def test_nothing_outside_the_rows_is_written(kind: str, path: tuple[str, int]) -> None:
    case = make_case(kind, 2, 48, hard_weight=0.5)
    memory = torch.full((4, 48), 77.0)
    memory[1:3] = case.logits
    emulated.loss_rows_(
        memory[1:3],
        case.teacher,
        row_to_teacher=case.row_to_teacher,
        weight=case.weight,
        kind=kind,
        hard_weight=0.5,
        path=path,
        **case.options,
    )
    assert (memory[[0, 3]] == 77.0).all() and (memory[2] == 0).all() and (memory[1] != 77).all()


@pytest.mark.parametrize("order", ["reverse", "random"])
@pytest.mark.parametrize("path", PATHS, ids=str)
@pytest.mark.parametrize("kind", ["soft_ce", "jsd", "lk_lambda"])
def test_same_bits_in_every_order_of_threads(kind: str, path: tuple[str, int], order: str) -> None:
    case = make_case(kind, 4, 1032, dtype=BF16, hard_weight=0.5, rest=64)

    def bits() -> list[Tensor]:
        results, gradient = run(case, path)
        return [gradient, *results]

    forward = bits()
    emulated.set_order(order)
    assert all(torch.equal(a, b) for a, b in zip(forward, bits(), strict=True))


def test_equal_rows_of_student_and_teacher_have_no_loss_and_no_gradient() -> None:
    for kind in ("reverse_kl", "jsd", "l1"):
        case = make_case(kind, 1, 1032)
        assert case.teacher is not None
        case.logits.copy_(case.teacher[:1])
        results, gradient = run(case, ("held", 2))
        assert abs(float(results.loss[0])) < 1e-6 and float(results.accepted[0]) > 1 - 1e-6
        assert gradient.abs().max() < 1e-6
