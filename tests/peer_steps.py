"""One training step of a peer's own model, tiny, on the CPU: loss, and gradients by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

Step = Callable[[], tuple[Tensor, dict[str, Tensor]]]


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def specforge_step(
    *,
    lk_loss_type: str | None = None,
    compact_teacher: bool = False,
    is_compiled: bool = False,
    tokens: int = 24,
    width: int = 32,
    vocab: int = 200,
    draft_vocab: int = 120,
    length: int = 3,
) -> Step:
    """SpecForge's EAGLE-3 model, with its decay of 0.8 per step. A batch of one conversation."""
    from specforge.algorithms.eagle3.model import OnlineEagle3Model
    from specforge.modeling.draft.llama3_eagle import LlamaForCausalLMEagle3
    from transformers import LlamaConfig

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=2 * width,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=1,
        max_position_embeddings=max(64, tokens),
        draft_vocab_size=draft_vocab,
        pad_token_id=0,
    )
    draft = LlamaForCausalLMEagle3(config, attention_backend="sdpa")
    kept = torch.randperm(vocab)[:draft_vocab].sort().values
    draft.t2d.zero_()[kept] = True
    draft.d2t.copy_(kept - torch.arange(draft_vocab))
    draft.embed_tokens.weight.requires_grad_(False)
    model = OnlineEagle3Model(
        draft, length=length, attention_backend="sdpa", lk_loss_type=lk_loss_type, kl_decay=3.0
    )
    head, last = torch.randn(vocab, width), torch.randn(1, tokens, width)
    batch = {
        "input_ids": torch.randint(vocab, (1, tokens)),
        "attention_mask": torch.ones(1, tokens, dtype=torch.long),
        "loss_mask": (torch.arange(tokens) % 5 > 1).long()[None, :, None],
        "hidden_states": torch.randn(1, tokens, 3 * width),
    }

    def step() -> tuple[Tensor, dict[str, Tensor]]:
        draft.zero_grad(set_to_none=True)
        teacher: dict[str, Any] = {"target": None if compact_teacher else F.linear(last, head)}
        if compact_teacher:
            teacher |= {"target_hidden_for_compact": last, "target_head_weight": head}
        with torch.compiler.set_stance("default" if is_compiled else "force_eager"):
            losses, rates, accuracies = model(**batch, **teacher)[:3]
        loss = torch.stack([0.8**i * value for i, value in enumerate(losses)]).sum()
        loss.backward()
        return torch.stack([loss.detach(), *rates, *accuracies]), gradients(draft)

    return step


def speculators_step(
    *,
    draft: str = "eagle3",
    loss: str = "kl_div",
    tokens: int = 24,
    width: int = 32,
    vocab: int = 120,
    max_anchors: int = 6,
) -> Step:
    """speculators' EAGLE-3 or DFlash model, with its eager losses: the others need Triton."""
    from speculators.losses import resolve_loss_config
    from speculators.models.dflash import DFlashSpeculatorConfig
    from speculators.models.dflash.core import DFlashDraftModel
    from speculators.models.eagle3 import Eagle3SpeculatorConfig
    from speculators.models.eagle3.core import Eagle3DraftModel
    from transformers.models.llama.configuration_llama import LlamaConfig
    from transformers.models.qwen3.configuration_qwen3 import Qwen3Config

    torch.manual_seed(0)
    shape = {
        "vocab_size": vocab,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": width // 4,
        "num_hidden_layers": 1,
        "max_position_embeddings": max(64, 4 * tokens),
        "pad_token_id": 0,
    }
    model: Any
    if draft == "eagle3":
        layer: Any = LlamaConfig(**shape)
        layer._attn_implementation = "eager"
        model = Eagle3DraftModel(
            Eagle3SpeculatorConfig(transformer_layer_config=layer, draft_vocab_size=vocab)
        )
        options: dict[str, Any] = {"ttt_steps": 3, "ttt_step_loss_decay": 0.8}
        num_aux = 3
    else:
        layer = Qwen3Config(**shape)
        layer._attn_implementation = "eager"
        model = DFlashDraftModel(
            DFlashSpeculatorConfig(
                transformer_layer_config=layer,
                draft_vocab_size=vocab,
                block_size=4,
                aux_hidden_state_layer_ids=[0, 1],
                mask_token_id=1,
            )
        )
        options = {"max_anchors": max_anchors}
        num_aux = 2
    for parameter in (model.lm_head, model.verifier_lm_head, model.embed_tokens):
        torch.nn.init.normal_(parameter.weight, std=0.3)
    batch = {
        "input_ids": torch.randint(vocab, (1, tokens)),
        "hidden_states": torch.randn(1, tokens, num_aux * width),
        "document_ids": torch.zeros(1, tokens, dtype=torch.long),
        "loss_mask": (torch.arange(tokens) % 5 > 1)[None],
        "verifier_last_hidden_states": torch.randn(1, tokens, width),
    }
    config = resolve_loss_config(loss, "eager")

    def step() -> tuple[Tensor, dict[str, Tensor]]:
        model.zero_grad(set_to_none=True)
        torch.manual_seed(1)  # DFlash draws its anchors
        _, value, metrics = model(**batch, loss_config=config, **options)
        value.backward()
        numbers = [metrics[name].detach().float().mean() for name in sorted(metrics)]
        return torch.stack([value.detach(), *numbers]), gradients(model)

    return step


def trl_step(
    folder: Path, *, beta: float = 0.5, tokens: int = 20, width: int = 32, vocab: int = 120
) -> Step:
    """A batch of two prompts through trl's GKD trainer, as its training loop does it."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    torch.manual_seed(0)
    words = {f"w{i}": i for i in range(vocab)}
    backend = Tokenizer(models.WordLevel(words, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="w0", eos_token="w1", unk_token="w0"
    )
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message['content'] + ' w1 ' }}{% endfor %}"
    )
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=2 * width,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=1,
        max_position_embeddings=max(64, tokens),
        pad_token_id=0,
        eos_token_id=1,
        initializer_range=1.5 / width**0.5,
    )
    student, teacher = LlamaForCausalLM(config), LlamaForCausalLM(config)
    said = " ".join(f"w{i % vocab}" for i in range(2, 6))
    messages = [{"role": "user", "content": said}, {"role": "assistant", "content": said}]
    trainer = GKDTrainer(
        model=student,
        teacher_model=teacher,
        args=GKDConfig(
            output_dir=str(folder), use_cpu=True, report_to=[], beta=beta, lmbda=0.0, max_length=16,
            bf16=False, gradient_checkpointing=False, disable_tqdm=True,
        ),
        processing_class=tokenizer,
        train_dataset=Dataset.from_list([{"messages": messages}] * 2),
    )  # fmt: skip
    ids = torch.randint(2, vocab, (2, tokens))
    labels = ids.masked_fill(
        torch.arange(tokens) < torch.tensor([[tokens // 3], [tokens // 2]]), -100
    )
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    batch |= {"prompts": ids[:, :4], "prompt_attention_mask": torch.ones_like(ids[:, :4])}

    def step() -> tuple[Tensor, dict[str, Tensor]]:
        student.zero_grad(set_to_none=True)
        loss = trainer.training_step(
            student, dict(batch), num_items_in_batch=(labels != -100).sum()
        )
        return loss.detach()[None], gradients(student)

    return step
