from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from specforge_ext.export import Observed, parameters_sha256, read_strict, verify_export, write
from specforge_ext.records import DraftCheckpoint, Proposal, TargetWeights

VOCAB, DRAFT_VOCAB, WIDTH = 11, 5, 4


class ToyDraft(nn.Module):
    """logits = head(tanh(fc(features) + embed[next token])), over the draft's vocabulary."""

    def __init__(self, embed: Tensor, t2d: Tensor) -> None:
        super().__init__()
        self.fc = nn.Linear(3, WIDTH, bias=False)
        self.lm_head = nn.Linear(WIDTH, DRAFT_VOCAB, bias=False)
        self.register_buffer("embed", embed, persistent=False)
        self.register_buffer("t2d", t2d)


class ToyDrafter:
    """Looks at the last valid row alone; every proposed token is drawn from the same row."""

    def __init__(self, draft: ToyDraft) -> None:
        self.draft = draft

    def start(self, num_sequences: int, capacity: int) -> None:
        self.hidden = torch.zeros(num_sequences, WIDTH)

    def observe(
        self,
        next_tokens: Tensor,
        features: Mapping[str, Tensor],
        positions: Tensor,
        valid: Tensor,
    ) -> None:
        hidden = torch.tanh(self.draft.fc(features["aux"]) + self.draft.embed[next_tokens])
        for column in range(valid.shape[1]):
            self.hidden = torch.where(valid[:, column, None], hidden[:, column], self.hidden)

    def select(self, rows: Tensor) -> None:
        self.hidden = self.hidden[rows]

    def propose(
        self, depth: int, *, temperature: float, generator: torch.Generator | None
    ) -> Proposal:
        logits = self.draft.lm_head(self.hidden)
        ids = self.draft.t2d.nonzero().squeeze(1)
        if temperature == 0:
            return Proposal(ids[logits.argmax(1)][:, None].repeat(1, depth), None)
        q = torch.zeros(len(logits), VOCAB)
        q[:, ids] = (logits / temperature).softmax(1)
        tokens = torch.multinomial(q, depth, replacement=True, generator=generator)
        return Proposal(tokens, q[:, None].repeat(1, depth, 1))


class ToyMethod:
    """As much of a Method as export uses."""

    name = "toy"

    def drafter(self, draft: nn.Module) -> ToyDrafter:
        return ToyDrafter(draft)

    def export(self, draft: ToyDraft, *, dtype: torch.dtype) -> DraftCheckpoint:
        ids = draft.t2d.nonzero().squeeze(1)
        tensors = {
            "fc.weight": draft.fc.weight.to(dtype),
            "lm_head.weight": draft.lm_head.weight.to(dtype),
            "t2d": draft.t2d,
            "d2t": ids - torch.arange(DRAFT_VOCAB),
        }
        return DraftCheckpoint(tensors, {"draft_vocab_size": DRAFT_VOCAB, "vocab_size": VOCAB})

    def schema(
        self, config: Mapping[str, object]
    ) -> Mapping[str, tuple[tuple[int, ...], torch.dtype | None]]:
        return {
            "fc.weight": ((WIDTH, 3), None),
            "lm_head.weight": ((int(config["draft_vocab_size"]), WIDTH), None),
            "t2d": ((int(config["vocab_size"]),), torch.bool),
            "d2t": ((int(config["draft_vocab_size"]),), torch.int64),
        }

    def restore(self, checkpoint: DraftCheckpoint, weights: TargetWeights) -> ToyDraft:
        draft = ToyDraft(weights.embed_tokens, checkpoint.tensors["t2d"])
        with torch.no_grad():
            draft.fc.weight.copy_(checkpoint.tensors["fc.weight"])
            draft.lm_head.weight.copy_(checkpoint.tensors["lm_head.weight"])
        return draft


METHOD = ToyMethod()
FILES = ["config.json", "model.safetensors"]
WEIGHTS = SimpleNamespace(embed_tokens=torch.arange(VOCAB * WIDTH).view(VOCAB, WIDTH).sin())


@pytest.fixture
def draft() -> ToyDraft:
    torch.manual_seed(0)
    t2d = torch.zeros(VOCAB, dtype=torch.bool)
    t2d[torch.tensor([0, 2, 3, 7, 10])] = True
    return ToyDraft(WEIGHTS.embed_tokens, t2d)


@pytest.fixture
def exported(draft: ToyDraft, tmp_path: Path) -> Path:
    write(METHOD.export(draft, dtype=torch.float32), tmp_path / "export")
    return tmp_path / "export"


@pytest.fixture
def observed() -> Observed:
    generator = torch.Generator().manual_seed(1)
    return Observed(
        next_tokens=torch.randint(VOCAB, (6, 4), generator=generator),
        features={"aux": torch.randn(6, 4, 3, generator=generator)},
        positions=torch.arange(4).expand(6, 4),
        valid=torch.arange(4) < torch.tensor([1, 2, 3, 4, 4, 2])[:, None],
    )


def edit(directory: Path, **changes: Tensor | None) -> None:
    """Rewrite some tensors; None removes one. Dots in names are written as double underscores."""
    tensors = load_file(directory / "model.safetensors")
    for key, value in changes.items():
        name = key.replace("__", ".")
        tensors.pop(name, None)
        if value is not None:
            tensors[name] = value
    save_file(tensors, directory / "model.safetensors")


# --- written ---------------------------------------------------------------------------------


def test_what_is_written_is_read_bit_for_bit(draft, tmp_path):
    for dtype in (torch.float32, torch.bfloat16):
        checkpoint = METHOD.export(draft, dtype=dtype)
        write(checkpoint, tmp_path / "deep" / "export")  # the second time over the first
        got = read_strict(tmp_path / "deep" / "export", METHOD)
        assert parameters_sha256(got.tensors) == parameters_sha256(checkpoint.tensors)
        assert got.config == checkpoint.config
    assert sorted(p.name for p in (tmp_path / "deep" / "export").iterdir()) == FILES
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["export"]


def test_others_may_read_what_the_umask_allows(draft, tmp_path):
    old = os.umask(0o027)
    try:
        write(METHOD.export(draft, dtype=torch.float32), tmp_path / "export")
    finally:
        os.umask(old)
    modes = [(tmp_path / "export" / name).stat().st_mode & 0o777 for name in (".", *FILES)]
    assert modes == [0o750, 0o640, 0o640]


def test_a_failed_write_leaves_the_old_export_and_nothing_else(draft, exported):
    before = parameters_sha256(read_strict(exported, METHOD).tensors)
    broken = DraftCheckpoint(METHOD.export(draft, dtype=torch.bfloat16).tensors, {"x": object()})
    with pytest.raises(TypeError, match="not JSON serializable"):
        write(broken, exported)
    assert parameters_sha256(read_strict(exported, METHOD).tensors) == before
    assert [p.name for p in exported.parent.iterdir()] == ["export"]


def test_a_write_killed_before_its_rename_leaves_the_old_export(exported, tmp_path):
    before = parameters_sha256(read_strict(exported, METHOD).tensors)
    script = (
        "import os, pathlib, signal, sys, torch\n"
        "from specforge_ext.export import checkpoint as c\n"
        "from specforge_ext.records import DraftCheckpoint\n"
        "c._swap = lambda fresh, directory: os.kill(os.getpid(), signal.SIGKILL)\n"
        "c.write(DraftCheckpoint({'w': torch.ones(3)}, {}), pathlib.Path(sys.argv[1]))\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(exported)], timeout=120, check=False)
    assert done.returncode == -9
    assert parameters_sha256(read_strict(exported, METHOD).tensors) == before


def test_a_rename_that_fails_puts_the_old_export_back(draft, exported, monkeypatch):
    before = parameters_sha256(read_strict(exported, METHOD).tensors)
    rename = Path.rename

    def fail_for_the_new(self: Path, target: Path) -> Path:
        if ".new-" in self.name:
            raise OSError("disk is gone")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_for_the_new)
    with pytest.raises(OSError, match="disk is gone"):
        write(METHOD.export(draft, dtype=torch.bfloat16), exported)
    assert parameters_sha256(read_strict(exported, METHOD).tensors) == before
    assert [p.name for p in exported.parent.iterdir()] == ["export"]


# --- read strictly ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fc__weight": None}, "fc.weight: missing"),
        ({"fc__weights": torch.ones(1)}, "fc.weights: unknown key, did you mean fc.weight?"),
        ({"zzz": torch.ones(1)}, "zzz: unknown key"),
        ({"fc__weight": torch.ones(3, WIDTH)}, "fc.weight: wanted shape [4, 3], got [3, 4]"),
        (
            {"fc__weight": torch.ones(WIDTH, 3, dtype=torch.int64)},
            "fc.weight: wanted a floating-point dtype, got torch.int64",
        ),
        (
            {"d2t": torch.tensor([0, 1, 1, 4, 6], dtype=torch.int32)},
            "d2t: wanted torch.int64, got torch.int32",
        ),
        (
            {"fc__weight": torch.tensor([float("nan"), float("inf")] * 6).view(WIDTH, 3)},
            "fc.weight: 12 of 12 values are not finite",
        ),
        (
            {"d2t": torch.tensor([0, 2, 3, 7, 10])},  # ids instead of offsets
            "d2t: wanted nonzero(t2d) == d2t + arange(len(d2t)), which it is not",
        ),
        (
            {"t2d": torch.ones(VOCAB, dtype=torch.bool)},
            "d2t: wanted nonzero(t2d) == d2t + arange(len(d2t)), which it is not",
        ),
    ],
)
def test_refused(exported, changes, message):
    edit(exported, **changes)
    with pytest.raises(ValueError) as refusal:
        read_strict(exported, METHOD)
    assert str(refusal.value) == f"{exported}: 1 problem(s): {message}"


def test_all_problems_are_told_at_once(exported):
    edit(
        exported,
        fc__weight=None,
        extra=torch.ones(2),
        d2t=None,
        lm_head__weight=torch.full((1, 1), float("inf")),
    )
    (exported / "model-00002.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"7 problem\(s\)") as refusal:
        read_strict(exported, METHOD)
    for part in (
        "model-00002.safetensors: unexpected weight file",
        "d2t: missing",
        "fc.weight: missing",
        "extra: unknown key",
        "lm_head.weight: wanted shape",
        "lm_head.weight: 1 of 1 values are not finite",
        "t2d and d2t: wanted both or neither",
    ):
        assert part in str(refusal.value)


def damage_nothing_there(directory: Path) -> None:
    for path in directory.iterdir():
        path.unlink()


def damage_no_weights(directory: Path) -> None:
    (directory / "model.safetensors").unlink()


def damage_truncated(directory: Path) -> None:
    data = (directory / "model.safetensors").read_bytes()
    (directory / "model.safetensors").write_bytes(data[:-5])


def damage_config(directory: Path) -> None:
    (directory / "config.json").write_text("{")


def damage_config_kind(directory: Path) -> None:
    (directory / "config.json").write_text(json.dumps([1]))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_nothing_there, r"config\.json: wanted a draft's config\.json, got no such file"),
        (damage_no_weights, r"model\.safetensors: wanted the draft's weights, got no such file"),
        (damage_truncated, r"model\.safetensors: wanted a safetensors file: "),
        (damage_config, r"config\.json: wanted JSON: "),
        (damage_config_kind, r"config\.json: wanted a JSON object, got list"),
    ],
)
def test_unreadable(exported, damage, message):
    damage(exported)
    with pytest.raises(ValueError, match=message):
        read_strict(exported, METHOD)


# --- proven equal ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_honest_export_passes(draft, observed, tmp_path, dtype):
    write(METHOD.export(draft, dtype=dtype), tmp_path / "export")
    check = verify_export(
        METHOD, draft, tmp_path / "export", WEIGHTS, observed, depth=3, dtype=dtype
    )
    assert check.ok
    assert str(check) == "export: 4 tensors and 3 outputs bit-equal to the trainer's"


def test_one_flipped_bit_is_found_by_name(draft, observed, exported):
    weight = draft.lm_head.weight.detach().clone()
    weight.view(torch.int32)[0, 0] ^= 1
    edit(exported, lm_head__weight=weight)
    check = verify_export(METHOD, draft, exported, WEIGHTS, observed, depth=2, dtype=torch.float32)
    assert not check.ok
    assert "lm_head.weight" in check.differences
    assert "lm_head.weight" in str(check)
    assert "DIFFER" in str(check)


def test_a_drafter_that_decodes_otherwise_is_found_although_parameters_agree(
    draft, observed, exported
):
    class Forgetful(ToyMethod):
        def restore(self, checkpoint: DraftCheckpoint, weights: TargetWeights) -> ToyDraft:
            restored = super().restore(checkpoint, weights)
            restored.fc.forward = lambda x: x.new_zeros(*x.shape[:-1], WIDTH)
            return restored

    check = verify_export(
        Forgetful(), draft, exported, WEIGHTS, observed, depth=2, dtype=torch.float32
    )
    assert "probabilities" in check.differences
    assert "fc.weight" not in check.differences


def test_a_precision_other_than_the_declared_one_is_found(draft, observed, tmp_path):
    write(METHOD.export(draft, dtype=torch.bfloat16), tmp_path / "export")
    check = verify_export(
        METHOD, draft, tmp_path / "export", WEIGHTS, observed, depth=2, dtype=torch.float32
    )
    assert {"fc.weight", "lm_head.weight"} <= set(check.differences)


def test_verify_export_leaves_the_draft_alone(draft, observed, tmp_path):
    write(METHOD.export(draft, dtype=torch.bfloat16), tmp_path / "export")
    before = parameters_sha256(draft)
    verify_export(
        METHOD, draft, tmp_path / "export", WEIGHTS, observed, depth=2, dtype=torch.bfloat16
    )
    assert parameters_sha256(draft) == before


def test_verify_export_refuses_integers_and_drafters_without_probabilities(
    draft, observed, exported
):
    with pytest.raises(ValueError, match=r"wanted a floating-point dtype, got torch\.int64"):
        verify_export(METHOD, draft, exported, WEIGHTS, observed, depth=2, dtype=torch.int64)

    class Greedy(ToyMethod):
        def drafter(self, draft: nn.Module) -> SimpleNamespace:
            real = ToyDrafter(draft)
            return SimpleNamespace(
                start=real.start,
                observe=real.observe,
                propose=lambda depth, **_: real.propose(depth, temperature=0.0, generator=None),
            )

    with pytest.raises(ValueError, match="wanted probs at temperature 1, got None"):
        verify_export(Greedy(), draft, exported, WEIGHTS, observed, depth=2, dtype=torch.float32)


# --- fingerprints ----------------------------------------------------------------------------


def test_fingerprint_is_the_documented_one():
    """By hand: one line of JSON, then the bytes."""
    import hashlib

    tensor = torch.tensor([[1.0, 2.0]])
    wanted = hashlib.sha256(b'["w", "float32", [1, 2]]\n' + tensor.numpy().tobytes()).hexdigest()
    assert parameters_sha256({"w": tensor}) == wanted


def test_fingerprint_changes_with_anything_and_only_then():
    base = {"a": torch.arange(4.0), "b": torch.tensor(3)}
    prints = [
        parameters_sha256(changed)
        for changed in (
            base,
            {"a": torch.arange(4.0), "c": torch.tensor(3)},
            {"a": torch.arange(4.0).view(2, 2), "b": torch.tensor(3)},
            {"a": torch.arange(4.0).bfloat16(), "b": torch.tensor(3)},
            {"a": torch.tensor([-0.0, 1.0, 2.0, 3.0]), "b": torch.tensor(3)},
            {"a": torch.arange(4.0)},
            {"a": torch.arange(4.0).view(torch.int32), "b": torch.tensor(3)},
        )
    ]
    assert len(set(prints)) == len(prints)
    strided = torch.arange(8.0).view(4, 2)[:, 0] / 2
    assert parameters_sha256({"b": torch.tensor(3), "a": strided}) == prints[0]


def test_fingerprint_of_a_module_is_that_of_its_parameters(draft):
    assert parameters_sha256(draft) == parameters_sha256(dict(draft.named_parameters()))
