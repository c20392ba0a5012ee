"""The gates of tools/cuda_gates.py, on our kernels (one architecture: CI runs it on all) and
on a kernel that must fail them."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent


def load_gates() -> ModuleType:
    spec = importlib.util.spec_from_file_location("cuda_gates", ROOT / "tools" / "cuda_gates.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


gates = load_gates()


def missing_tool() -> str | None:
    try:
        gates.find_tools()
    except gates.ToolMissingError as error:
        return str(error)
    return None


MISSING = missing_tool()
needs_nvcc = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))


@needs_nvcc
def test_kernels_pass_the_gates() -> None:
    kernels, warnings = gates.compile_all(["90a"])
    assert warnings == []
    assert [line for kernel in kernels for line in kernel.failures()] == []
    assert gates.absent(kernels, ["90a"]) == []
    names = {kernel.name.split("<")[0].split("(")[0] for kernel in kernels}
    assert names >= {
        "row_stats_kernel",
        "loss_rows_kernel",
        "loss_rows_cluster_kernel",
        "step_sums_kernel",
        "ttt_counts_kernel",
        "ttt_fill_kernel",
        "own_keys_merge_kernel",
        "own_keys_grads_kernel",
    }


@needs_nvcc
def test_local_memory_and_missing_vectors_are_named(tmp_path: Path) -> None:
    source = tmp_path / "bad.cu"
    source.write_text(
        "template <class T> __global__ void row_stats_kernel(T* x, int n) {\n"
        "  T local[64];\n"
        "  for (int i = 0; i < 64; ++i) local[i] = x[i];\n"
        "  for (int i = 0; i < n; ++i) local[i * 7 % 64] += local[i * 5 % 64];\n"
        "  x[threadIdx.x] = local[n % 64];\n"
        "}\n"
        "template __global__ void row_stats_kernel<float>(float*, int);\n"
    )
    kernels, _ = gates.compile_file(source, ["90a"], gates.find_tools(), tmp_path)
    failures = "\n".join(kernels[0].failures())
    assert "row_stats_kernel<float>" in failures
    assert "bytes of stack" in failures
    assert "local memory" in failures
    assert "no LDG.E.128" in failures


def test_ptxas_output_is_read() -> None:
    log = (
        "ptxas info    : Compiling entry function '_Z1fv' for 'sm_90a'\n"
        "ptxas info    : Function properties for _Z1fv\n"
        "    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads\n"
        "ptxas info    : Used 255 registers, used 1 barriers\n"
    )
    assert gates.parse_ptxas(log) == {("_Z1fv", "90a"): (255, 8, 16)}
    with pytest.raises(RuntimeError, match="ptxas output was not understood"):
        gates.parse_ptxas(log.replace("stack frame", "frame"))


def test_warnings_are_found() -> None:
    serialised = "ptxas info : (C7510) Potential Performance Loss: wgmma ... serialized"
    spilled = "ptxas warning : Registers are spilled to local memory in function 'f'"
    log = f"ptxas info : Used 4 registers\n{serialised}\n{spilled}\n"
    assert gates.warnings(log) == [serialised, spilled]


def kernel(name: str, arch: str, sass: str) -> object:
    return gates.Kernel(name, arch, registers=1, stack_bytes=0, spill_bytes=0, sass=sass)


def test_cluster_kernel_without_its_instructions_is_named() -> None:
    name = "loss_rows_cluster_kernel<(Group)1, bf16>"
    whole = "LDG.E.128 STG.E.128 UCGABAR_ARV UCGABAR_WAIT ST.E"
    assert kernel(name, "90a", whole).failures() == []
    assert kernel(name, "80", "EXIT").failures() == []
    assert kernel(name, "100", "LDG.E.128 STG.E.128").failures() == [
        f"{name} on sm_100: no {sass}" for sass in ("UCGABAR_ARV", "UCGABAR_WAIT", " ST.E")
    ]
    assert "code where there are no clusters" in kernel(name, "80", whole).failures()[0]


def test_row_kernel_without_wide_stores_is_named() -> None:
    name = "loss_rows_kernel<(Group)2, (Access)0, bf16*, bf16 const*>"
    assert kernel(name, "80", "LDG.E.128").failures() == [f"{name} on sm_80: no STG.E.128"]
    assert kernel(name.replace("(Access)0", "(Access)2"), "80", "LDG.E").failures() == []


def test_absent_kernel_is_named() -> None:
    have = [kernel("loss_rows_kernel<x>", "90a", "")]
    assert gates.absent(have, ["90a"]) == ["no loss_rows_cluster_kernel< for sm_90a"]


def test_missing_tool_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    with pytest.raises(gates.ToolMissingError, match="nvcc is not installed"):
        gates.find_tools()
    assert gates.main([]) == 2
