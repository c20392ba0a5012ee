"""The emulator that runs the .cu files on the CPU: it catches what it is there to catch."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import emulated

REASON = emulated.unavailable_reason()
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))


@pytest.fixture(autouse=True)
def forward_order() -> Iterator[None]:
    emulated.set_order("forward")
    yield
    emulated.set_order("forward")


@pytest.mark.parametrize("order", emulated.ORDERS)
def test_barriers_and_collectives_work_in_every_order(order: str) -> None:
    emulated.set_order(order)
    lanes = torch.arange(64)
    assert torch.equal(emulated.planted("with_barrier"), ((lanes + 40) % 64).float())
    assert torch.equal(emulated.planted("warp_sync"), (31 - lanes % 32).float())
    assert emulated.planted("atomic").view(torch.int32)[0] == 64


def test_missing_barrier_shows_as_dependence_on_the_order() -> None:
    results = []
    for order in emulated.ORDERS:
        emulated.set_order(order)
        results.append(emulated.planted("missing_barrier"))
    forward, reverse, random = results
    assert not torch.equal(forward, reverse.nan_to_num(-1))
    assert forward.isnan().any() and reverse.isnan().any() and random.isnan().any()


@pytest.mark.parametrize("order", emulated.ORDERS)
def test_blocks_of_a_cluster_see_each_other(order: str) -> None:
    emulated.set_order(order)
    wanted = ((torch.arange(64) + 40) % 64).float()
    assert torch.equal(emulated.planted("cluster"), wanted)


def test_missing_cluster_barrier_shows_as_dependence_on_the_order() -> None:
    results = []
    for order in emulated.ORDERS:
        emulated.set_order(order)
        results.append(emulated.planted("cluster_missing_barrier"))
    forward, reverse, random = results
    assert not torch.equal(forward.nan_to_num(-1), reverse.nan_to_num(-1))
    assert forward.isnan().any() and reverse.isnan().any() and random.isnan().any()


def test_block_that_left_before_its_peer_read_it_is_nan() -> None:
    assert emulated.planted("cluster_leaves").isnan().sum() >= 32


def test_random_order_depends_on_the_seed_alone() -> None:
    def nan_places(seed: int) -> list[int]:
        emulated.set_order("random", seed)
        return emulated.planted("missing_barrier").isnan().nonzero().flatten().tolist()

    assert nan_places(3) == nan_places(3)
    assert nan_places(3) != nan_places(4)


def test_unwritten_shared_memory_is_nan() -> None:
    assert emulated.planted("uninitialised").isnan().all()


@pytest.mark.parametrize(
    ("bug", "message"),
    [
        ("divergent", r"divergent barrier: thread 0 .*planted_bugs\.cu:\d+, thread 63 .*:\d+"),
        ("early_return", r"divergent barrier: thread 0 .*thread 5 of block 0 has returned"),
        ("split_warp", r"divergent barrier: thread 0 .*__shfl_xor_sync.*thread 1 .*__ballot_sync"),
        ("partial_mask", r"__shfl_sync at .*: only the full mask is supported"),
        ("too_much_shared", r"uses 512 bytes of shared memory, the launch gave 256"),
        (
            "cluster_not_started",
            r"thread 0 of block 0 maps the shared memory of block 1, which may not have started",
        ),
        (
            "cluster_returns_arrived",
            r"thread \d+ of block \d returned without having waited .*cluster\.cuh:\d+",
        ),
        (
            "cluster_lone_block",
            r"divergent barrier: thread 0 of block 0 waits in __cluster_barrier_wait .*"
            r"thread 0 of block 1 has returned",
        ),
        ("ragged_cluster", r"a cluster must have 1 to 8 blocks and divide the grid's 3, got 2"),
        ("ragged_block", r"32 to 1024 threads in whole warps, got 33"),
        (
            "huge_block",
            r"cudaLaunchKernelEx.*: invalid configuration argument \(.*launch\.cuh:\d+\)",
        ),
        ("no_such_kernel", r"run_planted: no kernel is called no_such_kernel"),
    ],
)
def test_mistake_is_named(bug: str, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        emulated.planted(bug)
    assert emulated.planted("with_barrier")[0] == 40, "the emulator works on after an error"


def test_launch_error_carries_file_line_and_driver_text() -> None:
    logits = torch.zeros(2, 8)
    with pytest.raises(
        RuntimeError, match=r"cudaSetDevice.*: invalid device ordinal \(.*cuh:\d+\)"
    ):
        emulated.row_stats(logits, device=3)


@pytest.mark.parametrize("sanitizer", ["asan", "tsan"])
def test_kernels_are_clean_and_independent_of_the_order(sanitizer: str) -> None:
    done = emulated.run_program(sanitizer)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "random order equal" in done.stdout
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("sanitizer", "bug", "report", "kernel"),
    [
        ("asan", "shared_overrun", "heap-buffer-overflow", "shared_overrun_kernel"),
        ("asan", "global_overrun", "heap-buffer-overflow", "global_overrun_kernel"),
        ("tsan", "missing_barrier", "data race", "neighbour_kernel<false>"),
        ("tsan", "cluster_missing_barrier", "data race", "peer_kernel<"),
        ("tsan", "cluster_leaves", "data race", "peer_kernel<"),
        ("asan", "cluster_leaves", "use-after-poison", "peer_kernel<"),
    ],
)
def test_sanitizer_names_the_planted_bug(
    sanitizer: str, bug: str, report: str, kernel: str
) -> None:
    done = emulated.run_program(sanitizer, bug)
    assert done.returncode != 0
    assert report in done.stderr and kernel in done.stderr and "planted_bugs.cu:" in done.stderr


@pytest.mark.parametrize("name", ["with_barrier", "warp_sync", "atomic", "cluster"])
def test_thread_sanitizer_accepts_what_is_right(name: str) -> None:
    done = emulated.run_program("tsan", name)
    assert done.returncode == 0, done.stderr
