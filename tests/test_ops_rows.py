"""row_stats and step_sums against their definition, on every instruction set this CPU has."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ops_helpers import assert_no_worse
from specforge_ext import _C, ops
from specforge_ext.ops import reference

DTYPES = [torch.float32, torch.bfloat16]
# 1; below, at and above a vector (8 or 16 lanes); around a block of 1024; a prime of many.
VOCABS = [1, 7, 8, 16, 17, 1023, 1024, 1025, 5003]


ISA_FLAGS = {
    "plain": (),
    "avx2": ("-mavx2", "-mfma", "-mf16c", "-mbmi2"),
    "avx512": ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mbmi2"),
}


@pytest.fixture(params=_C.available_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    _C.set_isa(request.param)
    yield request.param
    _C.set_isa("auto")


def randn(*shape: int, dtype: torch.dtype, scale: float = 3.0, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * scale).to(dtype)


def check_row_stats(logits: Tensor) -> None:
    lse, argmax = ops.row_stats(logits)
    want_lse, want_argmax = reference.row_stats(logits.double())
    assert torch.equal(argmax, want_argmax)
    assert lse.dtype == torch.float32
    assert_no_worse(lse, want_lse, reference.row_stats(logits.float())[0], slack=2e-7)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", VOCABS)
def test_row_stats_follow_the_definition(isa: str, vocab: int, dtype: torch.dtype) -> None:
    check_row_stats(randn(5, vocab, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_row_stats_of_a_real_vocabulary_and_of_no_rows(isa: str, dtype: torch.dtype) -> None:
    check_row_stats(randn(2, 151936, dtype=dtype))
    check_row_stats(torch.empty(0, 17, dtype=dtype))


def test_row_stats_of_huge_logits(isa: str) -> None:
    logits = randn(3, 1031, dtype=torch.float32, scale=1.0)
    logits[0], logits[1, 5], logits[2] = -1e4, 1e4, 1e4
    check_row_stats(logits)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("step", [0.1, 50.0, 400.0])
def test_row_stats_of_a_maximum_that_rises_from_block_to_block(
    isa: str, step: float, dtype: torch.dtype
) -> None:
    logits = randn(2, 5003, dtype=torch.float32) + step * (torch.arange(5003) // 700)
    logits[1] = logits[1].flip(0)
    check_row_stats(logits.to(dtype))


def test_argmax_is_the_lowest_index_among_equals(isa: str) -> None:
    logits = torch.zeros(4, 3000)
    logits[1, [2999, 2048, 1500]] = 2.0  # the tie spans blocks
    logits[2, [1023, 1024]] = 2.0  # at the border of two
    logits[3, [2998, 2999]] = 2.0  # in the tail
    assert ops.row_stats(logits)[1].tolist() == [0, 1500, 1023, 2998]


@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
def test_exponentials_and_logarithms_stay_within_an_ulp(isa: str, tmp_path: Path) -> None:
    program, root = tmp_path / "simd_ulp", Path(__file__).resolve().parent.parent
    command = ["g++", "-std=c++20", "-O2", *ISA_FLAGS[isa], "-I", str(root / "csrc")]
    command += [str(root / "tests" / "simd_ulp" / "main.cpp"), "-o", str(program)]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    done = subprocess.run([program], check=True, capture_output=True, text=True, timeout=60)
    errors = [float(line) for line in done.stdout.split()]
    assert len(errors) == 3  # exp, exp with a temperature, log
    assert all(0 < error < 1 for error in errors)


def test_step_sums_follow_the_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    loss, accepted, top_prob, entropy = torch.rand(4, 101, generator=generator).unbind()
    correct = torch.randint(0, 2, (101,), generator=generator, dtype=torch.uint8)
    weight = torch.randn(101, generator=generator)
    weight[::3] = 0
    loss[::3] = float("nan")
    step = torch.randint(0, 6, (101,), generator=generator, dtype=torch.int32)
    sums = torch.full((7, 7), float("nan"), dtype=torch.float64)  # overwritten, not added to
    rows = (loss, accepted, correct, top_prob, entropy, weight, step)
    _C.step_sums(*rows, sums)
    want = reference.step_sums(*rows, 7)
    torch.testing.assert_close(sums, want, rtol=1e-12, atol=1e-12)
    assert not sums[:, 6].any()


def test_row_stats_passes_torch_opcheck() -> None:
    torch.library.opcheck(torch.ops.specforge_ext.row_stats.default, (torch.rand(5, 33),))


def test_row_stats_bits_do_not_depend_on_the_number_of_threads(isa: str) -> None:
    results = []
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(ops.row_stats(randn(37, 3001, dtype=torch.float32)))
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_other_messages_name_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match=r"vocab must be in \[1, 2\^31\), got 0"):
        ops.row_stats(torch.ones(3, 0))
    with pytest.raises(ValueError, match=r"row_stats: logits must be f32 or bf16, got \[3, 4\]"):
        ops.row_stats(torch.ones(3, 4, dtype=torch.float16))
    with pytest.raises(ValueError, match="at most 4 dimensions, got 5"):
        ops.row_stats(torch.ones(1, 1, 1, 1, 1))
    ones = torch.ones(2)
    with pytest.raises(ValueError, match=r"step_sums: step must be in \[0, 3\), got 3 at row 1"):
        _C.step_sums(
            ones,
            ones,
            torch.ones(2, dtype=torch.uint8),
            ones,
            ones,
            ones,
            torch.tensor([0, 3], dtype=torch.int32),
            torch.empty(7, 3, dtype=torch.float64),
        )
    with pytest.raises(ValueError, match=r"set_isa: wanted one of auto, plain.*, got neon"):
        _C.set_isa("neon")
