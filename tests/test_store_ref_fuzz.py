"""Mutants against both parsers of refs: an equal ref or a ValueError that names what is wrong.

SPECFORGE_EXT_FUZZ_INPUTS=1000000 for a long run, SPECFORGE_EXT_FUZZ_SEED for other mutants.
"""

from __future__ import annotations

import gc
import os
import random
import resource
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from ref_mutants import mutant_bytes, mutant_json, random_ref, sealed_bytes
from specforge_ext.store.base import StoreError, UnknownEncoding
from specforge_ext.store.ref import (
    ref_from_bytes,
    ref_from_json,
    ref_to_bytes,
    ref_to_json,
)
from specforge_ext.store.shm import ShmConfig, ShmStore
from store_cases import LAYOUT_HASH, TIMEOUT_S, make_sample, same_sample

NUM_INPUTS = int(os.environ.get("SPECFORGE_EXT_FUZZ_INPUTS", "20000"))
"""Half of them JSON, half of them bytes."""
SEED = int(os.environ.get("SPECFORGE_EXT_FUZZ_SEED", "20261121"))
MAX_NEW_BYTES = 64 << 20
MAX_CPU_S = 1.0

Forms = dict[str, tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]]
FORMS: Forms = {
    "json": (mutant_json, ref_from_json, ref_to_json),
    "bytes": (mutant_bytes, ref_from_bytes, ref_to_bytes),
}


def parse(form: str, mutant: Any) -> str:
    """What became of it: "equal", or the error's text up to what was wanted."""
    _, read, write = FORMS[form]
    try:
        ref = read(mutant)
    except ValueError as error:
        assert type(error) in (ValueError, UnknownEncoding), repr(error)
        text = str(error)
        assert text.startswith("ref"), text
        assert text.isascii(), text
        assert len(text) < 700, text
        return text.split(" wanted ")[0]
    assert write(ref) == mutant, "another spelling was taken for a ref"
    assert ref_from_json(ref_to_json(ref)) == ref_from_bytes(ref_to_bytes(ref)) == ref
    return "equal"


@contextmanager
def no_memory_beyond(nbytes: int) -> Iterator[None]:
    """Address space included: a huge allocation that nobody touches is a MemoryError, too, but for
    what malloc has left of earlier tests.
    """
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    limit = pages * resource.getpagesize() + nbytes
    resource.setrlimit(resource.RLIMIT_AS, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@contextmanager
def earlier_objects_left_alone() -> Iterator[None]:
    """By the garbage collector: those of thousands of tests took it 1 s, in the midst of a ref."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def test_the_memory_limit_bites() -> None:
    """In a process of its own: this one may have that much left over, free."""
    code = (
        "from test_store_ref_fuzz import MAX_NEW_BYTES, no_memory_beyond\n"
        "with no_memory_beyond(MAX_NEW_BYTES):\n"
        "    bytes(4 * MAX_NEW_BYTES)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.endswith("MemoryError\n")


@pytest.mark.timeout(60 + NUM_INPUTS // 200)
@pytest.mark.parametrize("form", FORMS)
def test_only_typed_errors_within_bounds(form: str) -> None:
    mutate, _, write = FORMS[form]
    rng = random.Random(SEED)
    seeds = [write(random_ref(rng)) for _ in range(16)]
    results: Counter[str] = Counter()
    most_cpu_s = 0.0
    start = time.monotonic()
    with no_memory_beyond(MAX_NEW_BYTES), earlier_objects_left_alone():
        for number in range(NUM_INPUTS // 2):
            rng.seed(SEED + number)
            mutant = mutate(rng, seeds)
            cpu_s = time.thread_time()
            try:
                results[parse(form, mutant)] += 1
            except BaseException:
                print(f"{form}, input {number} of seed {SEED}: {mutant!r}")
                raise
            cpu_s = time.thread_time() - cpu_s
            assert cpu_s <= MAX_CPU_S, (number, cpu_s)
            most_cpu_s = max(most_cpu_s, cpu_s)
    print(
        f"{form}: {NUM_INPUTS // 2} inputs of seed {SEED} in {time.monotonic() - start:.1f} s, "
        f"{results['equal']} equal, {len(results)} kinds of result, "
        f"at most {most_cpu_s * 1e3:.1f} ms of CPU each"
    )
    assert results["equal"] > NUM_INPUTS // 1000  # the mutants are not all far from a ref
    assert len(results) > 30  # and reach the checks of every field


@pytest.mark.parametrize("form", FORMS)
def test_round_trip_of_random_refs(form: str) -> None:
    rng = random.Random(SEED)
    _, read, write = FORMS[form]
    for _ in range(1000):
        ref = random_ref(rng)
        assert read(write(ref)) == ref


def test_an_open_store_stands_any_ref() -> None:
    """Refused with a type, or the sample unharmed."""
    rng = random.Random(SEED)
    sample = make_sample(1)
    writer = ShmStore.writer(ShmConfig(capacity_bytes=1 << 16, max_slots=4))
    reader = ShmStore.reader(writer.address())
    good = writer.put(sample, layout_hash=LAYOUT_HASH, timeout_s=TIMEOUT_S)
    texts, blobs = [ref_to_json(good)], [ref_to_bytes(good)]
    num_opened = num_parsed = 0
    for _ in range(5000):
        try:
            if rng.random() < 0.5:
                ref = ref_from_json(mutant_json(rng, texts))
            else:
                ref = ref_from_bytes(mutant_bytes(rng, blobs))
            num_parsed += 1
            with reader.open(ref, layout_hash=LAYOUT_HASH, verify=True) as lease:
                lease.sample.prompt.input_ids.sum()
            num_opened += 1
        except (ValueError, StoreError):
            continue
    assert num_parsed > num_opened > 100
    assert writer.health().slots_ready == 1
    with reader.open(good, layout_hash=LAYOUT_HASH, verify=True) as lease:
        assert same_sample(lease.sample, sample)


def test_no_bytes_at_all_and_all_of_one() -> None:
    for data in (b"", b"\x00" * 64, b"\xff" * 64, sealed_bytes(b"SFxR\x01\x00" + b"\xff" * 26)):
        with pytest.raises(ValueError, match=r"^ref"):
            ref_from_bytes(data)
