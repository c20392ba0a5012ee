"""What the layer for multi-token prediction is called in checkpoints, and what kind it is.

Read in vLLM 0.32 (deepseek_mtp, qwen3_next_mtp, qwen3_5_mtp) and SGLang 0.5.23 (deepseek_nextn,
qwen3_next_mtp, qwen3_5_mtp), which agree but where docs/mtp.md says otherwise.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from specforge_ext.methods._export import Shapes, layer_tensors
from specforge_ext.nn.layer import LayerShape
from specforge_ext.records import TargetSpec

FormName = Literal["deepseek", "qwen3_next"]


@dataclass(frozen=True)
class Form:
    """Names in the checkpoint, and conventions.

    prefix: of all tensors; {L} is the number of the target's layers, {next} one more. layer: of the
    decoder layer's, after it. embedding_norm, hidden_norm, fuse, output_norm: the parts around the
    layer, which reads the embedding first and the hidden state second. next_prefix: where a second
    such layer would be. zero_centred: norms scale by 1 + weight. copies: tensors that repeat the
    target's embedding and head.
    """

    name: FormName
    prefix: str
    layer: str
    next_prefix: str
    embedding_norm: str
    hidden_norm: str
    fuse: str
    output_norm: str
    zero_centred: bool = False
    copies: tuple[str, ...] = ()

    def parts(self) -> dict[str, str]:
        """The draft's modules around the layer -> their names after the prefix."""
        return {
            "embedding_norm": self.embedding_norm,
            "hidden_norm": self.hidden_norm,
            "fuse": self.fuse,
            "output_norm": self.output_norm,
        }


FORMS: dict[FormName, Form] = {
    "deepseek": Form(
        name="deepseek",
        prefix="model.layers.{L}.",
        layer="",
        next_prefix="model.layers.{next}.",
        embedding_norm="enorm",
        hidden_norm="hnorm",
        fuse="eh_proj",
        output_norm="shared_head.norm",
        copies=("embed_tokens.weight", "shared_head.head.weight"),
    ),
    "qwen3_next": Form(
        name="qwen3_next",
        prefix="mtp.",
        layer="layers.0.",
        next_prefix="mtp.layers.1.",
        embedding_norm="pre_fc_norm_embedding",
        hidden_norm="pre_fc_norm_hidden",
        fuse="fc",
        output_norm="norm",
        zero_centred=True,
    ),
}
_ARCHITECTURES: dict[str, FormName] = {
    "qwen3_next": "qwen3_next",
    "qwen3_5": "qwen3_next",
    "qwen3_5_text": "qwen3_next",
}

_REFUSED = {
    "kv_a_proj_with_mqa": (
        "latent attention (MLA)",
        "low-rank projections of queries, keys and values and heads that turn in part",
    ),
    "mlp.experts.": (
        "a mixture of experts",
        "a router, grouped products of experts and the shared expert",
    ),
    "block_sparse_moe.": ("a mixture of experts", "a router and grouped products of experts"),
    "linear_attn.": ("linear attention", "the gated delta rule and its state"),
    "scale_inv": ("quantised weights", "their scales, to be undone here and made anew in exports"),
    "weight_scale": ("quantised weights", "their scales, as above"),
    "qweight": ("quantised weights", "their packed codes, as above"),
}
"""Part of a tensor's name -> what has it, and what training it would need."""


@dataclass(frozen=True)
class LayerKind:
    """Which decoder layer of the Llama family: qk_norm as in Qwen 3, qkv_bias as in Qwen 2,
    output_gate as in Qwen 3-Next (the attention's result times the sigmoid of a projection that
    shares q_proj's matrix, head by head).
    """

    qk_norm: bool
    qkv_bias: bool
    output_gate: bool

    def shapes(self, shape: LayerShape) -> Shapes:
        """Of the layer's tensors, as they lie in a checkpoint."""
        return layer_tensors(
            shape, qk_norm=self.qk_norm, qkv_bias=self.qkv_bias, output_gate=self.output_gate
        )


def shape_of(target: TargetSpec) -> LayerShape:
    """Sizes of the layer: the target's own."""
    return LayerShape(
        hidden_size=target.hidden_size,
        intermediate_size=target.intermediate_size,
        num_heads=target.num_heads,
        num_kv_heads=target.num_kv_heads,
        head_dim=target.head_dim,
        rms_norm_eps=target.rms_norm_eps,
    )


def checkpoint_shapes(form: Form, kind: LayerKind, target_layers: int, shape: LayerShape) -> Shapes:
    """Every tensor of the form in a checkpoint, by its public name."""
    hidden, prefix = shape.hidden_size, prefix_of(form, target_layers)
    out: Shapes = {
        f"{prefix}{name}.weight": (hidden, 2 * hidden) if part == "fuse" else (hidden,)
        for part, name in form.parts().items()
    }
    layer = f"{prefix}{form.layer}"
    return out | {f"{layer}{name}": size for name, size in kind.shapes(shape).items()}


def prefix_of(form: Form, target_layers: int) -> str:
    """Of all tensors of the layer in a checkpoint of a target with so many layers."""
    return form.prefix.format(L=target_layers, next=target_layers + 1)


def next_prefix_of(form: Form, target_layers: int) -> str:
    """Of those that a second such layer would have."""
    return form.next_prefix.format(L=target_layers, next=target_layers + 1)


def find_form(names: Iterable[str], target_layers: int) -> Form | None:
    """The form whose fusing projection is among a checkpoint's names; None if no name speaks of
    multi-token prediction. ValueError if one does, and is of neither form.
    """
    found = set(names)
    for form in FORMS.values():
        if f"{prefix_of(form, target_layers)}{form.fuse}.weight" in found:
            return form
    others = sorted(name for name in found if _speaks_of_mtp(name, target_layers))
    if others:
        known = [f"{prefix_of(form, target_layers)}{form.fuse}" for form in FORMS.values()]
        raise ValueError(
            f"mtp: the checkpoint has {others[0]} ({len(others)} such tensors); wanted a layer "
            f"with {' or '.join(known)}. start: fresh makes a new one beside it"
        )
    return None


def _speaks_of_mtp(name: str, target_layers: int) -> bool:
    words = ("mtp", "nextn", f"layers.{target_layers}.")
    return any(word in name for word in words)


def default_form(model_type: str) -> Form:
    """That which servers read for this architecture; "deepseek" where none is known."""
    return FORMS[_ARCHITECTURES.get(model_type, "deepseek")]


def refuse_others(names: Iterable[str], *, where: str) -> None:
    """ValueError if a tensor's name is of a part that no layer here has."""
    for name in sorted(names):
        for part, (what, needs) in _REFUSED.items():
            if part in name:
                raise ValueError(
                    f"mtp: {where} has {what} ({name}); wanted attention with q_proj, k_proj, "
                    f"v_proj, o_proj and a SwiGLU MLP in plain floating point. That would need "
                    f"{needs}"
                )


def kind_of(layer: Mapping[str, Tensor], target: TargetSpec, *, where: str) -> LayerKind:
    """The kind of a decoder layer, given by its tensors.

    ValueError as `refuse_others`, or lists the tensors that are missing, unknown or of another
    shape than the target's sizes make them.
    """
    refuse_others(layer, where=where)
    shape = shape_of(target)
    q = layer.get("self_attn.q_proj.weight")
    kind = LayerKind(
        qk_norm="self_attn.q_norm.weight" in layer,
        qkv_bias="self_attn.q_proj.bias" in layer,
        output_gate=q is not None and q.shape[0] == 2 * shape.num_heads * shape.head_dim,
    )
    check_shapes(layer, kind.shapes(shape), where=where)
    return kind


def check_shapes(tensors: Mapping[str, Tensor], wanted: Shapes, *, where: str) -> None:
    """ValueError lists what is missing, unknown or misshapen."""
    problems = [f"{name}: missing" for name in wanted.keys() - tensors.keys()]
    problems += [f"{name}: unknown" for name in tensors.keys() - wanted.keys()]
    problems += [
        f"{name}: wanted {list(wanted[name])}, got {list(tensors[name].shape)}"
        for name in wanted.keys() & tensors.keys()
        if tuple(tensors[name].shape) != wanted[name]
    ]
    if problems:
        raise ValueError(f"mtp: {where}: {'; '.join(sorted(problems))}")
