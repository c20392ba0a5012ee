"""The loss of all rows of a draft at once, from hidden states; logits exist one chunk at a time.

Per chunk: two matrix products give the logits of its students and of their teachers, one native
kernel turns the students' logits into their gradient, two more products turn that into the
gradients of hidden and head. So the forward pass does all the work, and backward only scales.
Legend: N student rows, R teacher rows, H and G widths of draft and target, V the draft's
vocabulary, U >= V rows of the target's head, L steps.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from specforge_ext.ops._chunks import default_workspace_bytes
from specforge_ext.ops._draft_loss import draft_loss_op
from specforge_ext.ops._native import FLOATS, check, in_autocast_dtype
from specforge_ext.ops.results import DraftLoss, KlSchedule, RowLoss


def draft_loss(
    hidden_NH: Tensor,
    head_VH: Tensor,
    teacher_hidden_RG: Tensor | None = None,
    teacher_head_UG: Tensor | None = None,
    teacher_lse_R: Tensor | None = None,
    *,
    loss: RowLoss | str = "soft_ce",
    row_to_teacher: Tensor,
    row_weight: Tensor,
    row_step: Tensor,
    num_steps: int,
    teacher_argmax: Tensor | None = None,
    label: Tensor | None = None,
    kl_schedule: KlSchedule | None = None,
    step_acceptance: Tensor | None = None,
    step_kl_weight: Tensor | None = None,
    workspace_bytes: int | None = None,
) -> DraftLoss:
    """A loss of draft rows against the target, summed with weights, and statistics per step.

    hidden: [N, H], what the draft's head multiplies. head: [V, H]. Both float32 or both bfloat16;
        under autocast they are cast to its dtype first. Gradients flow to these two, each only
        where wanted.
    teacher_hidden: [R, G] after the target's final norm. teacher_head: [U, G], the target's head
        with the draft's vocabulary first (`draft_first_permutation`), or only that part of it.
        float32 or bfloat16, the same. Both None for "hard_ce".
    teacher_lse: [R] float32, logsumexp of the target's logits / temperature over its FULL
        vocabulary (`teacher_stats`, or shipped by an engine). Given: rows of teacher_head past V
        are not used. None: teacher_head is the full vocabulary, and lse and argmax come from it.
    loss: kind and parameters; a bare name takes the defaults of `RowLoss`.
    row_to_teacher: [N] int32, non-decreasing: each teacher is then computed once for all its
        students.
    row_weight: [N] float32; rows of weight 0 may hold anything, NaN too, and get a gradient of
        exactly 0.
    row_step: [N] int32 in [0, num_steps).
    teacher_argmax: [R] int32 or int64, the target's first choice as an index into the permuted
        head, only beside teacher_lse; None: the first choice within the draft's vocabulary.
    label: [R] int32 in [0, V): for "hard_ce", or a hard_weight.
    kl_schedule: for "lk_lambda": w = scale * exp(-decay * A), A the mean acceptance of a step's
        rows (weight not 0), which a first pass without gradients measures (a third more work), or
        step_acceptance: [L] gives, e.g. reduced over ranks. None: the defaults of `KlSchedule`.
    step_kl_weight: [L], for "lk_lambda": w itself, in place of both.
    workspace_bytes: bound on the logits that exist at a time, students and teachers together. None:
        what the matrix products need for full speed: 384 float32 rows on the CPU, 2560 bf16 ones
        on CUDA, whatever N is.

    Beyond outputs and workspace it may take float32 [V, H] for the head's gradient when that is
    bfloat16. On CUDA it synchronises once a pass, to read row_to_teacher. Deterministic.
    Differentiable once. ValueError if something is missing, too much or does not fit,
    row_to_teacher falls or leaves [0, R), or a student row and its teacher do not fit the
    workspace. Formulas and sources: csrc/loss/loss_rows.h.
    """
    spec = RowLoss(loss) if isinstance(loss, str) else loss
    hidden_NH, head_VH = in_autocast_dtype(hidden_NH, head_VH)
    schedule = (kl_schedule, step_acceptance, step_kl_weight)
    _check_presence(
        spec,
        teacher_hidden=teacher_hidden_RG,
        teacher_head=teacher_head_UG,
        teacher_lse=teacher_lse_R,
        teacher_argmax=teacher_argmax,
        label=label,
        kl=next((x for x in schedule if x is not None), None),
    )
    inputs = _Inputs(
        hidden_NH,
        head_VH,
        _detached(teacher_hidden_RG),
        _detached(teacher_head_UG),
        _detached(teacher_lse_R),
        teacher_argmax,
        label,
        row_to_teacher,
        row_weight.detach(),
        row_step,
        num_steps,
    )
    inputs.check()
    if teacher_lse_R is not None and inputs.teacher_head is not None:
        inputs = dataclasses.replace(inputs, teacher_head=inputs.teacher_head[: head_VH.shape[0]])
    if teacher_argmax is not None:
        inputs = dataclasses.replace(inputs, teacher_argmax=teacher_argmax.to(torch.int32))
    if workspace_bytes is None:
        workspace_bytes = inputs.default_workspace_bytes()
    kl_weight_N = None
    if spec.kind == "lk_lambda":
        if step_kl_weight is None:
            step_kl_weight = _scheduled(
                inputs, spec, kl_schedule or KlSchedule(), step_acceptance, workspace_bytes
            )
        check("draft_loss", "step_kl_weight", step_kl_weight, (num_steps,), *_STEP_FLOATS)
        kl_weight_N = step_kl_weight.detach().float()[row_step.long()]
    return _run(inputs, spec, kl_weight_N, workspace_bytes, differentiates=torch.is_grad_enabled())


def draft_first_permutation(t2d: Tensor) -> Tensor:
    """[U] int64: the words of the draft's vocabulary, ascending, then the others, ascending.

    t2d: [U] bool, whether the draft has the word. `target_head[permutation]`, made once, has the
    draft's part as its first rows, so that restricting the target to it is a slice.
    """
    return torch.cat([t2d.nonzero()[:, 0], (~t2d).nonzero()[:, 0]])


_STEP_FLOATS = (torch.float32, torch.float64)


@dataclass(frozen=True)
class _Inputs:
    hidden: Tensor
    head: Tensor
    teacher_hidden: Tensor | None
    teacher_head: Tensor | None
    teacher_lse: Tensor | None
    teacher_argmax: Tensor | None
    label: Tensor | None
    row_to_teacher: Tensor
    row_weight: Tensor
    row_step: Tensor
    num_steps: int

    @property
    def num_teachers(self) -> int:
        per_teacher = self.label if self.teacher_hidden is None else self.teacher_hidden
        assert per_teacher is not None  # _check_presence
        return per_teacher.shape[0]

    def default_workspace_bytes(self) -> int:
        heads = (self.head, self.teacher_head)
        vocab = max(head.shape[0] for head in heads if head is not None)
        return default_workspace_bytes(self.hidden.device, vocab=vocab)

    def check(self) -> None:
        num_rows, width = self.hidden.shape[0], self.hidden.shape[-1]
        vocab, num_teachers = self.head.shape[0], self.num_teachers

        def fits(name: str, shape: tuple[int, ...], *dtypes: torch.dtype) -> None:
            tensor: Tensor | None = getattr(self, name)
            if tensor is not None:
                check("draft_loss", name, tensor, shape, *dtypes)

        fits("hidden", (num_rows, width), *FLOATS)
        fits("head", (vocab, width), self.hidden.dtype)
        if self.teacher_hidden is not None and self.teacher_head is not None:
            teacher_width = self.teacher_hidden.shape[-1]
            # More rows are fine, fewer are not.
            rows = max(vocab, self.teacher_head.shape[0])
            fits("teacher_hidden", (num_teachers, teacher_width), *FLOATS)
            fits("teacher_head", (rows, teacher_width), self.teacher_hidden.dtype)
        fits("teacher_lse", (num_teachers,), torch.float32)
        fits("teacher_argmax", (num_teachers,), torch.int32, torch.int64)
        fits("label", (num_teachers,), torch.int32)
        fits("row_to_teacher", (num_rows,), torch.int32)
        fits("row_weight", (num_rows,), torch.float32)
        fits("row_step", (num_rows,), torch.int32)


def _check_presence(
    spec: RowLoss, *, teacher_lse: Tensor | None, kl: object, **others: Tensor | None
) -> None:
    """What the kind of loss needs is there, and what it would not look at is not."""
    has_teacher = spec.kind != "hard_ce"
    wanted = {
        "teacher_hidden": has_teacher,
        "teacher_head": has_teacher,
        "label": not has_teacher or spec.hard_weight != 0,
    }
    for name, is_wanted in wanted.items():
        if (others[name] is not None) != is_wanted:
            verb = "must be given" if is_wanted else "must be None"
            raise ValueError(f"draft_loss: {name} {verb} with {spec}")
    if spec.top_k and (spec.kind != "soft_ce" or spec.hard_weight or spec.top_k < 0):
        raise ValueError(
            f"draft_loss: top_k must be 0, or positive with soft_ce and no hard_weight, got {spec}"
        )
    if spec.top_k and not spec.top_k_weight > 0:
        raise ValueError(f"draft_loss: top_k_weight must be above 0, got {spec.top_k_weight}")
    if others["teacher_argmax"] is not None and teacher_lse is None:
        raise ValueError("draft_loss: teacher_argmax must be None without teacher_lse")
    if teacher_lse is not None and not has_teacher:
        raise ValueError(f"draft_loss: teacher_lse must be None with {spec}")
    if kl is not None and spec.kind != "lk_lambda":
        raise ValueError(
            f"draft_loss: kl_schedule, step_acceptance and step_kl_weight are for lk_lambda, "
            f"got one with {spec}"
        )


def _scheduled(
    inputs: _Inputs,
    spec: RowLoss,
    schedule: KlSchedule,
    acceptance_L: Tensor | None,
    workspace_bytes: int,
) -> Tensor:
    """[L] weights of the KL term: arXiv 2602.23881."""
    if acceptance_L is None:
        only_acceptance = RowLoss("soft_ce", temperature=spec.temperature)
        plain = dataclasses.replace(inputs, label=None)
        first = _run(plain, only_acceptance, None, workspace_bytes, differentiates=False)
        acceptance_L = first.step_accepted / first.step_rows.clamp_min(1)
    check("draft_loss", "step_acceptance", acceptance_L, (inputs.num_steps,), *_STEP_FLOATS)
    return schedule.weight(acceptance_L.detach())


def _run(
    inputs: _Inputs,
    spec: RowLoss,
    kl_weight_N: Tensor | None,
    workspace_bytes: int,
    *,
    differentiates: bool,
) -> DraftLoss:
    loss_sum, sums_7L, _, _ = draft_loss_op(
        inputs.hidden,
        inputs.head,
        inputs.teacher_hidden,
        inputs.teacher_head,
        inputs.teacher_lse,
        inputs.teacher_argmax,
        inputs.label,
        kl_weight_N,
        inputs.row_to_teacher,
        inputs.row_weight,
        inputs.row_step,
        inputs.num_teachers,
        inputs.num_steps,
        spec.kind,
        spec.temperature,
        spec.beta,
        spec.hard_weight,
        spec.top_k,
        spec.top_k_weight,
        workspace_bytes,
        differentiates and inputs.hidden.requires_grad,
        differentiates and inputs.head.requires_grad,
    )
    sums_7L = sums_7L.detach()
    return DraftLoss(
        loss_sum, sums_7L[0], sums_7L[1], sums_7L[2], sums_7L[3], sums_7L[5], sums_7L[6]
    )


def _detached(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach()
