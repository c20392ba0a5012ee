"""The native parser of refs under the sanitizers, and views that do not lie within their memory."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
from torch.utils.dlpack import from_dlpack

from native_program import build, run
from specforge_ext import _C
from specforge_ext.store.ref import ref_to_bytes
from test_store_ref import good_ref
from test_store_ref_bytes import encoded_ref

NUM_INPUTS = os.environ.get("SPECFORGE_EXT_FUZZ_INPUTS", "20000")


def test_mutants_under_sanitizers(tmp_path: Path) -> None:
    seed = tmp_path / "ref"
    seed.write_bytes(ref_to_bytes(encoded_ref()))
    run(build("ref_fuzz", "address,undefined"), NUM_INPUTS, "1", str(seed))


def test_views_must_lie_within_the_buffer() -> None:
    ref = good_ref()
    with pytest.raises(ValueError, match="tensor h: must lie within 767 bytes, got 640 at 128"):
        _C.stored_sample(bytearray(767), ref, from_dlpack)
    far = (replace(ref.tensors[2], offset=(1 << 63) - 64),)
    with pytest.raises(ValueError, match="tensor h: must lie within 768 bytes"):
        _C.tensor_views(bytearray(768), far, from_dlpack)


def test_views_of_no_valid_ref() -> None:
    ref = good_ref()
    negative = (replace(ref.tensors[2], offset=-64),)
    with pytest.raises(ValueError, match="tensors: must be those of a valid ref, got TensorRef"):
        _C.tensor_views(bytearray(768), negative, from_dlpack)
    with pytest.raises(ValueError, match="unique names, with input_ids and loss_mask"):
        _C.stored_sample(bytearray(768), replace(ref, tensors=ref.tensors[1:]), from_dlpack)
