"""draft_loss inside a module that FSDP2 shards: two ranks over gloo against one process."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import torch

from ops_helpers import loss_case
from specforge_ext import ops

TIMEOUT_S = 120.0

WORKER = """
import dataclasses, datetime, os, sys
sys.path.insert(0, "tests")
import torch
from torch import distributed, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.device_mesh import init_device_mesh
from ops_helpers import loss_case
from specforge_ext import ops

rank, folder = int(sys.argv[1]), sys.argv[2]
distributed.init_process_group(
    "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2,
    timeout=datetime.timedelta(seconds=60),
)

class Head(nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.lm_head = nn.Parameter(weight.detach().clone())
        self.scale = nn.Parameter(torch.ones(weight.shape[1]))

    def forward(self, case):
        hidden = case.hidden.detach() * self.scale
        return ops.draft_loss(
            hidden.to(self.lm_head.dtype), self.lm_head, *case.inputs[2:], **case.keywords
        ).loss_sum

def gradients(policy):
    model = Head(loss_case(1, 1, 65).head)
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)), mp_policy=policy)
    for micro in range(2):
        (model(loss_case(19, 7, 65, seed=2 * rank + micro)) / 4).backward()
    return {name: p.grad.full_tensor() * 2 for name, p in model.named_parameters()}

half = MixedPrecisionPolicy(param_dtype=torch.bfloat16, cast_forward_inputs=False)
grads = {"float32": gradients(MixedPrecisionPolicy()), "bfloat16": gradients(half)}
if rank == 0:
    torch.save(grads, f"{folder}/grads.pt")
distributed.barrier()
distributed.destroy_process_group()
# Once in some dozens of runs gloo's threads outlived the interpreter, which then aborted; the
# gradients are judged, not torch's way out.
os._exit(0)
"""


def test_two_ranks_are_one_process(tmp_path: Path) -> None:
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(rank), str(tmp_path)],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for rank in range(2)
    ]
    try:
        errors = [rank.communicate(timeout=TIMEOUT_S)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], errors
    grads = torch.load(tmp_path / "grads.pt", weights_only=True)
    head = loss_case(1, 1, 65).head.detach().requires_grad_()
    scale = torch.ones(head.shape[1], requires_grad=True)
    for seed in range(4):
        case = loss_case(19, 7, 65, seed=seed)
        case = dataclasses.replace(case, hidden=case.hidden.detach() * scale, head=head)
        (ops.draft_loss(*case.inputs, **case.keywords).loss_sum / 4).backward()
    for dtype, tolerance in (("float32", 1e-5), ("bfloat16", 3e-2)):
        for name, want in (("lm_head", head.grad), ("scale", scale.grad)):
            assert want is not None
            error = float((grads[dtype][name] - want).abs().max() / want.abs().max())
            assert error <= tolerance, (dtype, name, error)
