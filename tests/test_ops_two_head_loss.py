"""two_head_loss against torch, and against draft_loss on the joined heads."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ops_helpers import assert_no_worse
from specforge_ext.ops import RowLoss, TwoHeadLoss, draft_loss, two_head_loss

WIDTH, NARROW, TEACHER = 24, 5, 16


def inputs(rows: int, vocab: int, dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(rows + vocab)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    teachers = (rows + 1) // 2
    row_to_teacher = torch.arange(rows, dtype=torch.int32) // 2
    return {
        "hidden": normal(rows, WIDTH),
        "head": normal(vocab, WIDTH) * 0.3,
        "narrow": normal(rows, NARROW),
        "narrow_head": normal(vocab, NARROW) * 0.3,
        "teacher_hidden": normal(teachers, TEACHER),
        "teacher_head": normal(vocab, TEACHER) * 0.3,
        "row_to_teacher": row_to_teacher,
        "row_weight": torch.rand(rows, generator=generator) + 0.1,
        "label": torch.randint(vocab, (teachers,), generator=generator, dtype=torch.int32),
    }


def call(x: dict[str, Tensor], loss: RowLoss, *, workspace_bytes: int | None = None) -> TwoHeadLoss:
    teacher = loss.kind != "hard_ce"
    return two_head_loss(
        x["hidden"],
        x["head"],
        x["narrow"],
        x["narrow_head"],
        x["teacher_hidden"] if teacher else None,
        x["teacher_head"] if teacher else None,
        loss=loss,
        row_to_teacher=x["row_to_teacher"],
        row_weight=x["row_weight"],
        label=x["label"] if not teacher or loss.hard_weight else None,
        workspace_bytes=workspace_bytes,
    )


def torch_rows(x: dict[str, Tensor], hard_weight: float) -> tuple[Tensor, Tensor]:
    """Rows of L1 + hard_weight CE, and of L1."""
    logits = F.linear(x["hidden"], x["head"]) + F.linear(x["narrow"], x["narrow_head"])
    teacher = F.linear(x["teacher_hidden"], x["teacher_head"])[x["row_to_teacher"].long()]
    wide = torch.promote_types(logits.dtype, torch.float32)
    l1 = (logits.to(wide).softmax(1) - teacher.to(wide).softmax(1)).abs().sum(1)
    label = x["label"].long()[x["row_to_teacher"].long()]
    ce = F.cross_entropy(logits.to(wide), label, reduction="none")
    return l1 + hard_weight * ce, l1


TRAINED = ("hidden", "narrow", "narrow_head")


def cast(x: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Floats but the weight in dtype; those that are trained as leaves."""
    out = {
        name: t.to(dtype) if t.is_floating_point() and name != "row_weight" else t
        for name, t in x.items()
    }
    return {name: t.requires_grad_() if name in TRAINED else t for name, t in out.items()}


# No row, one, a prime, more than a chunk holds; a vocabulary of one word, off the vector width.
@pytest.mark.parametrize(("rows", "vocab"), [(0, 7), (1, 1), (13, 61), (50, 1000)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_is_l1_and_cross_entropy(rows: int, vocab: int, dtype: torch.dtype) -> None:
    x = inputs(rows, vocab, dtype)
    slack = 1e-6 if dtype == torch.float32 else 8e-3  # a gradient is rounded once a chunk
    found: list[list[Tensor]] = []
    for kind in (torch.double, dtype):
        leaves = cast(x, kind)
        loss, l1 = torch_rows(leaves, 0.25)
        total = (loss * x["row_weight"].to(loss.dtype)).sum()
        grads = torch.autograd.grad(total, [leaves[name] for name in TRAINED])
        found.append([total.detach(), loss.detach(), 1 - l1.detach() / 2, *grads])
    leaves = cast(x, dtype)
    result = call(leaves, RowLoss("l1", hard_weight=0.25), workspace_bytes=24 * max(vocab, 1) * 4)
    grads = torch.autograd.grad(result.loss_sum, [leaves[name] for name in TRAINED])
    found.append([result.loss_sum.detach(), result.loss, result.accepted, *grads])
    for true, base, got in zip(*found, strict=True):
        assert_no_worse(got.detach().to(base.dtype), true, base, slack=slack)
    assert result.correct.dtype == torch.bool and result.top_prob.shape == (rows,)


@pytest.mark.parametrize("kind", ["hard_ce", "soft_ce", "l1", "jsd"])
def test_is_draft_loss_on_the_joined_heads(kind: str) -> None:
    x = cast(inputs(9, 40, torch.float32), torch.float32)
    result = call(x, RowLoss(kind))
    rows = torch.arange(9, dtype=torch.int32)
    both = torch.cat((x["hidden"], x["narrow"]), 1), torch.cat((x["head"], x["narrow_head"]), 1)
    teacher = (None, None) if kind == "hard_ce" else (x["teacher_hidden"], x["teacher_head"])
    joined = draft_loss(
        *both, *teacher, loss=kind, row_to_teacher=x["row_to_teacher"],
        row_weight=x["row_weight"], row_step=rows, num_steps=9,
        label=x["label"] if kind == "hard_ce" else None,
    )  # fmt: skip
    assert result.loss_sum.item() == pytest.approx(joined.loss_sum.item(), rel=1e-6)
    torch.testing.assert_close(result.loss.double(), joined.step_loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(result.accepted.double(), joined.step_accepted, rtol=1e-5, atol=0)
    torch.testing.assert_close(result.top_prob.double(), joined.step_top_prob, rtol=1e-5, atol=0)
    assert torch.equal(result.correct.double(), joined.step_correct)
    ours = torch.autograd.grad(result.loss_sum, [x[name] for name in TRAINED])
    theirs = torch.autograd.grad(joined.loss_sum, [x[name] for name in TRAINED])
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_chunks_do_not_matter() -> None:
    results = []
    for workspace in (None, 2 * 101 * 4, 9 * 101 * 4):
        x = cast(inputs(37, 101, torch.float32), torch.float32)
        result = call(x, RowLoss("l1", hard_weight=0.1), workspace_bytes=workspace)
        grads = torch.autograd.grad(result.loss_sum, [x[name] for name in TRAINED])
        results.append((result.loss, result.accepted, *grads))
    for other in results[1:]:
        for a, b in zip(other, results[0], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_rows_of_weight_zero_are_not_read() -> None:
    plain = inputs(12, 31, torch.float32)
    plain["row_weight"][[2, 3, 11]] = 0
    poisoned = {name: t.clone() for name, t in plain.items()}
    poisoned["hidden"][[2, 11]], poisoned["narrow"][3] = float("nan"), float("nan")
    poisoned["teacher_hidden"][1] = float("nan")  # that of rows 2 and 3
    found = []
    for x in (plain, poisoned):
        leaves = cast(x, torch.float32)
        result = call(leaves, RowLoss("l1", hard_weight=0.1))
        grads = torch.autograd.grad(result.loss_sum, [leaves[name] for name in TRAINED])
        found.append([*(t.detach() for t in result), *grads])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)
    assert not found[1][5][[2, 3, 11]].any() and not found[1][1][[2, 3, 11]].any()


def test_the_wide_head_is_frozen() -> None:
    x = cast(inputs(5, 11, torch.float32), torch.float32)
    x["head"].requires_grad_()
    x["teacher_hidden"].requires_grad_()
    call(x, RowLoss("l1")).loss_sum.backward()
    assert x["head"].grad is None and x["teacher_hidden"].grad is None
    assert all(x[name].grad is not None for name in TRAINED)
    with torch.no_grad():
        assert not call(x, RowLoss("l1")).loss_sum.requires_grad


def test_only_wanted_gradients_and_a_scaled_backward() -> None:
    x = cast(inputs(7, 13, torch.float32), torch.float32)
    (full,) = torch.autograd.grad(call(x, RowLoss("l1")).loss_sum, [x["narrow_head"]])
    x["hidden"], x["narrow"] = x["hidden"].detach(), x["narrow"].detach()
    (scaled,) = torch.autograd.grad(call(x, RowLoss("l1")).loss_sum * 3, [x["narrow_head"]])
    torch.testing.assert_close(scaled, 3 * full)


def test_autocast_takes_its_dtype() -> None:
    x = inputs(5, 11, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        got = call(x, RowLoss("hard_ce")).loss
    assert torch.equal(got, call(cast(x, torch.bfloat16), RowLoss("hard_ce")).loss)


def test_emulated_bf16_computes_logits_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    from specforge_ext.ops import _matmul

    class NoFastBf16:
        @staticmethod
        def has_fast_bf16() -> bool:
            return False

        @staticmethod
        def advise_huge_pages(tensor: Tensor) -> None:
            pass

    x = cast(inputs(13, 61, torch.bfloat16), torch.bfloat16)
    true, _ = torch_rows(cast(x, torch.double), 0.0)
    monkeypatch.setattr(_matmul, "_C", NoFastBf16)
    monkeypatch.setattr(_matmul, "_BLOCK_BYTES", 4 * NARROW * 16)  # several blocks of the heads
    result = call(x, RowLoss("l1"))
    torch.testing.assert_close(result.loss.double(), true.detach(), rtol=1e-5, atol=1e-6)
    grads = torch.autograd.grad(result.loss_sum, [x[name] for name in TRAINED])
    assert all(g.dtype == torch.bfloat16 and g.any() for g in grads)


def test_logits_of_all_rows_never_exist() -> None:
    """The largest tensor alive inside the op holds a chunk's logits, not all rows'."""
    x = cast(inputs(600, 997, torch.float32), torch.float32)
    with torch.profiler.profile(profile_memory=True) as profile:
        call(x, RowLoss("l1"), workspace_bytes=40 * 997 * 4)
    sizes = [event.cpu_memory_usage for event in profile.events() if event.cpu_memory_usage > 0]
    assert max(sizes) <= 40 * 997 * 4 < 600 * 997 * 4 / 10


def test_compiles_and_passes_opcheck() -> None:
    x = cast(inputs(6, 13, torch.float32), torch.float32)

    def function(hidden: Tensor) -> TwoHeadLoss:
        return call({**x, "hidden": hidden}, RowLoss("l1", hard_weight=0.5))

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)(x["hidden"])
    torch.testing.assert_close(compiled.loss_sum, function(x["hidden"]).loss_sum)
    torch.library.opcheck(
        torch.ops.specforge_ext.two_head_loss.default,
        (
            *(x[name] for name in ("hidden", "narrow", "narrow_head", "head")),
            *(x[name] for name in ("teacher_hidden", "teacher_head", "label")),
            *(x[name] for name in ("row_to_teacher", "row_weight")),
            "l1", 1.0, 0.5, 0.5, None, 8 * 13 * 4, True, True, True,
        ),
    )  # fmt: skip


def test_second_derivatives_are_refused() -> None:
    x = cast(inputs(3, 7, torch.float32), torch.float32)
    with pytest.raises(RuntimeError, match="two_head_loss: second derivatives"):
        torch.autograd.grad(call(x, RowLoss("l1")).loss_sum, [x["hidden"]], create_graph=True)


@pytest.mark.parametrize(
    ("change", "loss", "message"),
    [
        ({"narrow": (4, 6)}, "l1", r"two_head_loss: narrow_head must be \[9, 6\] float32, got"),
        ({"narrow_head": (8, NARROW)}, "l1", r"narrow_head must be \[9, 5\] float32, got \[8, 5\]"),
        ({"head": (9, 23)}, "l1", r"head must be \[9, 24\] float32, got \[9, 23\]"),
        ({"teacher_head": (8, TEACHER)}, "l1", r"teacher_head must be \[9, 16\] float32, got"),
        ({"row_weight": (3,)}, "l1", r"row_weight must be \[4\] float32, got \[3\]"),
        ({}, "lk_lambda", "loss must not be lk_lambda or have a top_k"),
    ],
)
def test_errors_name_what_is_wrong(
    change: dict[str, tuple[int, ...]], loss: str, message: str
) -> None:
    x = {**inputs(4, 9, torch.float32), **{name: torch.ones(s) for name, s in change.items()}}
    with pytest.raises(ValueError, match=message):
        call(x, RowLoss(loss))


def test_errors_of_values_and_presence() -> None:
    x = inputs(4, 9, torch.float32)
    for indices, message in (
        ([0, 0, 1, 2], r"two_head_loss: row_to_teacher must lie in \[0, 2\), got 0 to 2"),
        ([0, 1, 0, 1], r"two_head_loss: row_to_teacher must not fall, got 1 then 0 at row 2"),
    ):
        wrong = {**x, "row_to_teacher": torch.tensor(indices, dtype=torch.int32)}
        with pytest.raises(ValueError, match=message):
            call(wrong, RowLoss("l1"))
    with pytest.raises(ValueError, match=r"two_head_loss: workspace_bytes must hold .* got 71"):
        call(x, RowLoss("l1"), workspace_bytes=71)
    common = {"row_to_teacher": x["row_to_teacher"], "row_weight": x["row_weight"]}
    heads = (x["hidden"], x["head"], x["narrow"], x["narrow_head"])
    with pytest.raises(ValueError, match="two_head_loss: teacher_hidden must be given with"):
        two_head_loss(*heads, loss=RowLoss("l1"), **common)
    with pytest.raises(ValueError, match="two_head_loss: label must be given with"):
        two_head_loss(*heads, loss=RowLoss("hard_ce"), **common)
