#!/usr/bin/env python3
"""Train the embedded demo target and write it as package data.

The model is a small Qwen3 causal LM; its text is the ``train`` split of the standard library's
own sources (see ``specforge_ext.prompts.python_stdlib``), plain and as chats whose user turn is
a function's signature and whose assistant turn is the function. No file of the ``heldout``
split is read for anything but the held-out loss.

    OMP_NUM_THREADS=1 python tools/train_demo_target.py --work build/demo_target --bf16 --compile

Every draw is a function of ``--seed`` and the step number, so a run that was cut off and
resumed from its checkpoint sees the batches that an uninterrupted run sees.
"""

from __future__ import annotations

import argparse
import ast
import json
import math
import os
import platform
import random
import shlex
import shutil
import sys
import textwrap
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY / "python"))

from specforge_ext.prompts.python_stdlib import read_source, stdlib_files  # noqa: E402

END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
MAX_BYTES = 8_000_000
CHAT_LINES = range(4, 61)
WINDOW = 256
RECORDED_FILES = ("compileall.py", "doctest.py", "modulefinder.py")

CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{%- if message['role'] == 'assistant' %}"
    "{{- '<|im_start|>assistant\\n' }}"
    "{%- generation %}{{- message['content'] + '<|im_end|>' }}{%- endgeneration %}"
    "{{- '\\n' }}"
    "{%- else %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)


@dataclass(frozen=True)
class Corpus:
    """Token ids of one split, all documents in a row.

    Attributes:
        plain: ``[tokens]`` int64, each file followed by the end-of-text id.
        chat: ``[tokens]`` int64, chats made of the same files' functions.
        plain_bytes: UTF-8 bytes of the files behind ``plain``.
    """

    plain: Tensor
    chat: Tensor
    plain_bytes: int


class Muon(torch.optim.Optimizer):
    """Momentum whose matrix updates are orthogonalised, matrices of one shape in one batch.

    Five Newton-Schulz steps in float32: for matrices this small the half-precision of the
    usual version buys nothing on a CPU. An update is scaled by ``sqrt(max(1, rows/columns))``.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, momentum: float) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient; ``closure`` is not used."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                by_shape[parameter.shape].append(parameter)
            for parameters in by_shape.values():
                self._step_stack(parameters, group["lr"], group["momentum"])

    def _step_stack(self, parameters: list[Tensor], lr: float, momentum: float) -> None:
        updates = []
        for parameter in parameters:
            assert parameter.grad is not None
            state = self.state[parameter]
            if "momentum" not in state:
                state["momentum"] = torch.zeros_like(parameter)
            state["momentum"].lerp_(parameter.grad, 1 - momentum)
            updates.append(parameter.grad.lerp(state["momentum"], momentum))
        rows, columns = parameters[0].shape
        scale = math.sqrt(max(1.0, rows / columns))
        for parameter, update in zip(parameters, orthogonalise(torch.stack(updates)), strict=True):
            parameter.add_(update, alpha=-lr * scale)


def orthogonalise(matrices: Tensor) -> Tensor:
    """Bring the singular values of each matrix near 1.

    Args:
        matrices: ``[count, rows, columns]`` float32.

    Returns:
        The same shape, ``U @ V^T`` of each up to the quintic's error.
    """
    wide = matrices.mT if matrices.shape[1] > matrices.shape[2] else matrices
    x = wide / (wide.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    result: Tensor = x.mT if wide is not matrices else x
    return result


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    add = parser.add_argument
    add("--work", type=Path, required=True, help="folder of the checkpoint, tokenizer and log")
    add(
        "--out",
        type=Path,
        default=REPOSITORY / "python" / "specforge_ext" / "assets" / "demo_target",
        help="folder of the package data, replaced as a whole",
    )
    add("--seed", type=int, default=20261121)
    add("--steps", type=int, default=3800)
    add("--warmup-steps", type=int, default=50)
    add("--decay-fraction", type=float, default=0.28, help="share of the steps that decay the lr")
    add("--batch-tokens", type=int, default=4096, help="tokens of one step")
    add("--seq-len", type=int, default=256, help="tokens of one training sequence")
    add("--long-seq-len", type=int, default=1024, help="the same, in the last steps")
    add("--long-fraction", type=float, default=0.1, help="share of the steps that are long")
    add("--chat-share", type=float, default=0.15, help="share of the sequences that are chats")
    add("--muon-lr", type=float, default=0.02)
    add("--adam-lr", type=float, default=4e-3)
    add("--bf16", action="store_true", help="autocast the matrix products to bfloat16")
    add("--compile", action="store_true", help="compile the training step")
    add("--stop-after", type=int, help="stop before this step, keeping the schedule")
    add("--log-every", type=int, default=20)
    add("--save-every", type=int, default=200)
    add("--export-only", action="store_true", help="write the package data of the checkpoint")
    return parser.parse_args()


def make_tokenizer(folder: Path, texts: list[str]) -> Any:
    """Train the byte-level BPE tokenizer (2048 ids), or load the one trained before."""
    path = folder / "tokenizer.json"
    if not path.exists():
        core = Tokenizer(models.BPE())
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        core.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=2048,
            special_tokens=[END_OF_TEXT, TURN_START, TURN_END],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        core.train_from_iterator(texts, trainer)
        core.save(str(path))
    tokenizer: Any = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_file=str(path),
        eos_token=TURN_END,
        pad_token=END_OF_TEXT,
        model_input_names=["input_ids", "attention_mask"],
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def functions_of(source: str) -> Iterator[list[dict[str, str]]]:
    """Yield a chat for each function of a module: the signature asked for, the source given."""
    lines = source.split("\n")
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        assert node.end_lineno is not None
        body = lines[node.lineno - 1 : node.end_lineno]
        if len(body) in CHAT_LINES:
            text = textwrap.dedent("\n".join(body))
            signature = f"def {node.name}({ast.unparse(node.args)}):"
            yield [
                {"role": "user", "content": f"Write this function.\n{signature}"},
                {"role": "assistant", "content": text},
            ]


def load_corpus(files: list[Path], tokenizer: Any, seed: int) -> Corpus:
    """Tokenize one split; the order of the chats is drawn from ``seed``."""
    sources = [read_source(path) for path in files]
    chats = [chat for source in sources for chat in functions_of(source)]
    random.Random(seed).shuffle(chats)
    chat_texts = [
        str(tokenizer.apply_chat_template(chat, tokenize=False)) + END_OF_TEXT for chat in chats
    ]
    return Corpus(
        plain=encode(tokenizer, [source + END_OF_TEXT for source in sources]),
        chat=encode(tokenizer, chat_texts),
        plain_bytes=sum(len(source.encode("utf-8")) for source in sources),
    )


def encode(tokenizer: Any, texts: list[str]) -> Tensor:
    """Return the ids of all the texts in a row, ``[tokens]`` int64."""
    rows = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor([token for row in rows for token in row], dtype=torch.int64)


def make_model(tokenizer: Any, seed: int) -> Any:
    """Build the untrained float32 model (1.8 million parameters, embeddings tied)."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=1024,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        use_cache=True,
        attention_bias=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen3ForCausalLM(config)


def make_optimizers(model: nn.Module, arguments: argparse.Namespace) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for the embeddings and the norms' gains."""
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        is_matrix = parameter.ndim == 2 and "embed" not in name
        (matrices if is_matrix else others).append(parameter)
    return [
        Muon(matrices, lr=arguments.muon_lr, momentum=0.95),
        torch.optim.AdamW(
            others, lr=arguments.adam_lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True
        ),
    ]


def lr_scale(step: int, arguments: argparse.Namespace) -> float:
    """Return the learning rate's factor at a step: warm-up, constant, linear decay to 0."""
    decay_steps = max(1, round(arguments.steps * arguments.decay_fraction))
    warm = (step + 1) / arguments.warmup_steps
    return float(min(1.0, warm, (arguments.steps - step) / decay_steps))


def draw_batch(corpus: Corpus, step: int, arguments: argparse.Namespace) -> Tensor:
    """Draw the sequences of one step, ``[batch, seq + 1]`` int64, from the seed and the step."""
    long = step >= round(arguments.steps * (1 - arguments.long_fraction))
    seq = arguments.long_seq_len if long else arguments.seq_len
    batch = arguments.batch_tokens // seq
    generator = torch.Generator().manual_seed(arguments.seed * 1_000_003 + step)
    is_chat = torch.rand(batch, generator=generator) < arguments.chat_share
    rows = []
    for chat in is_chat.tolist():
        tokens = corpus.chat if chat else corpus.plain
        start = int(torch.randint(len(tokens) - seq, (), generator=generator))
        rows.append(tokens[start : start + seq + 1])
    return torch.stack(rows)


def token_loss(model: nn.Module, rows: Tensor) -> Tensor:
    """Return the mean cross-entropy in nats per token of ``rows``, ``[batch, seq + 1]`` int64."""
    logits = model(input_ids=rows[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten())


@torch.no_grad()
def evaluate(model: nn.Module, tokens: Tensor, seq: int, limit: int | None = None) -> float:
    """Return the loss in nats per token over consecutive windows of ``seq`` tokens.

    Args:
        model: any causal LM of ``transformers``.
        tokens: ``[tokens]`` int64.
        seq: tokens of one window.
        limit: windows to look at, evenly spread; ``None`` for all.
    """
    starts = torch.arange(0, len(tokens) - seq, seq)
    if limit is not None and limit < len(starts):
        starts = starts[torch.linspace(0, len(starts) - 1, limit).long()]
    total = 0.0
    for part in torch.split(starts, max(1, 4096 // seq)):
        rows = torch.stack([tokens[start : start + seq + 1] for start in part.tolist()])
        total += float(token_loss(model, rows)) * len(rows)
    return total / len(starts)


class Run:
    """A training run: model, optimisers, step and time so far, kept in one checkpoint file."""

    def __init__(self, arguments: argparse.Namespace, tokenizer: Any) -> None:
        self.arguments = arguments
        self.model = make_model(tokenizer, arguments.seed)
        self.optimizers = make_optimizers(self.model, arguments)
        self.step = 0
        self.cpu_seconds = 0.0
        self.train_loss = math.nan
        self._path: Path = arguments.work / "checkpoint.pt"
        if self._path.exists():
            self._load()

    def _load(self) -> None:
        state = torch.load(self._path, weights_only=True)
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step, self.cpu_seconds = state["step"], state["cpu_seconds"]
        self.train_loss = state["train_loss"]

    def save(self) -> None:
        """Write the checkpoint, replacing the last one in one move."""
        partial = self._path.with_suffix(".partial")
        state = {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step,
            "cpu_seconds": self.cpu_seconds,
            "train_loss": self.train_loss,
        }
        torch.save(state, partial)
        partial.replace(self._path)

    def train(self, train: Corpus, heldout: Corpus) -> None:
        """Train to the last step, logging to ``log.jsonl`` and saving as asked."""
        arguments = self.arguments
        loss_of = torch.compile(token_loss, dynamic=False) if arguments.compile else token_loss
        end = min(arguments.steps, arguments.stop_after or arguments.steps)
        clock, recent = time.process_time(), []
        while self.step < end:
            recent.append(self._train_step(loss_of, draw_batch(train, self.step, arguments)))
            self.step += 1
            now = time.process_time()
            self.cpu_seconds, clock = self.cpu_seconds + now - clock, now
            saves = self.step % arguments.save_every == 0 or self.step == end
            if saves or self.step % arguments.log_every == 0:
                self.train_loss, recent = sum(recent) / len(recent), []
                self._log(heldout if saves else None)
            if saves:
                self.save()
                clock = time.process_time()

    def _train_step(self, loss_of: Callable[[nn.Module, Tensor], Tensor], rows: Tensor) -> float:
        scale = lr_scale(self.step, self.arguments)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.arguments.bf16):
            loss = loss_of(self.model, rows)
        loss.backward()  # type: ignore[no-untyped-call]
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = optimizer.defaults["lr"] * scale
            optimizer.step()
            optimizer.zero_grad()
        return float(loss.detach())

    def _log(self, heldout: Corpus | None) -> None:
        record: dict[str, Any] = {
            "step": self.step,
            "cpu_seconds": round(self.cpu_seconds, 1),
            "lr_scale": round(lr_scale(self.step, self.arguments), 4),
            "train_loss": round(self.train_loss, 4),
        }
        if heldout is not None:
            record["heldout_loss"] = round(evaluate(self.model, heldout.plain, WINDOW, limit=32), 4)
        line = json.dumps(record)
        print(line, flush=True)
        with (self.arguments.work / "log.jsonl").open("a", encoding="utf-8") as log:
            log.write(line + "\n")


def is_cyclic(tokens: list[int], longest: int = 24, repeats: int = 3) -> bool:
    """Tell whether a continuation ends in one block of at most ``longest`` tokens, repeated."""
    for period in range(1, longest + 1):
        tail = tokens[-period * repeats :]
        if len(tail) == period * repeats and tail == tail[:period] * repeats:
            return True
    return False


@torch.no_grad()
def probe(model: Any, tokenizer: Any, tokens: Tensor) -> dict[str, Any]:
    """Continue held-out prompts of 64 tokens greedily and by sampling; print some of it.

    Returns:
        ``greedy_cyclic_share`` of 32 continuations of 128 tokens, and ``greedy_ended_share``.
    """
    starts = torch.linspace(0, len(tokens) - 65, 32).long().tolist()
    prompts = torch.stack([tokens[start : start + 64] for start in starts])
    length = {"max_new_tokens": 128, "attention_mask": torch.ones_like(prompts)}
    greedy = model.generate(prompts, do_sample=False, **length)[:, 64:].tolist()
    stops = {tokenizer.eos_token_id, tokenizer.pad_token_id}
    ended = [not stops.isdisjoint(row) for row in greedy]
    cyclic = [not over and is_cyclic(row) for row, over in zip(greedy, ended, strict=True)]
    length = {"max_new_tokens": 128, "attention_mask": torch.ones_like(prompts[:3])}
    sampled = model.generate(
        prompts[4:32:10], do_sample=True, temperature=0.8, top_k=0, top_p=1.0, **length
    )
    for row in sampled:
        print("=" * 40, tokenizer.decode(row[:64]), "-" * 40, tokenizer.decode(row[64:]), sep="\n")
    return {
        "greedy_cyclic_share": sum(cyclic) / len(cyclic),
        "greedy_ended_share": sum(ended) / len(ended),
    }


def export(run: Run, tokenizer: Any, train: Corpus, heldout: Corpus) -> None:
    """Write the package data: bfloat16 weights, tokenizer, configuration and ``TRAINING.json``.

    The losses that ``TRAINING.json`` reports are those of the bfloat16 weights.
    """
    model = make_model(tokenizer, run.arguments.seed)
    model.load_state_dict(run.model.state_dict())
    model.to(torch.bfloat16).eval()
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        eos_token_id=[tokenizer.eos_token_id, tokenizer.pad_token_id],
        pad_token_id=tokenizer.pad_token_id,
        do_sample=False,
    )
    folder = run.arguments.work / "export"
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    save_tokenizer(tokenizer, folder)
    rounded = make_model(tokenizer, run.arguments.seed)
    rounded.load_state_dict(model.state_dict())
    rounded.eval().generation_config = model.generation_config
    record = training_record(run, rounded, tokenizer, train, heldout)
    torch.manual_seed(run.arguments.seed)
    record |= probe(rounded, tokenizer, heldout.plain)
    text = json.dumps(record, indent=2) + "\n"
    (folder / "TRAINING.json").write_text(text, encoding="utf-8")
    print(text)
    install(folder, run.arguments.out)


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Save the tokenizer under the class name that every supported ``transformers`` knows."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    settings.pop("backend", None)
    path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def install(folder: Path, out: Path) -> None:
    """Move a finished folder into place, refusing one that is too large to ship."""
    size = sum(path.stat().st_size for path in folder.iterdir())
    if size > MAX_BYTES:
        raise SystemExit(f"package data of {size} bytes, more than {MAX_BYTES}")
    staged = out.with_name(out.name + ".new")
    shutil.rmtree(staged, ignore_errors=True)
    shutil.copytree(folder, staged)
    for path in staged.iterdir():
        path.chmod(0o644)
    shutil.rmtree(out, ignore_errors=True)
    staged.replace(out)


def file_losses(model: nn.Module, tokenizer: Any) -> dict[str, float]:
    """Return the loss in nats per token of some held-out files, by name, for a later check."""
    losses = {}
    for path in stdlib_files("heldout"):
        if path.name in RECORDED_FILES:
            tokens = encode(tokenizer, [read_source(path)])
            losses[path.name] = round(evaluate(model, tokens, WINDOW), 4)
    return losses


def training_record(
    run: Run,
    model: nn.Module,
    tokenizer: Any,
    train: Corpus,
    heldout: Corpus,
) -> dict[str, Any]:
    """Describe how the weights came about and how good they are."""
    loss = evaluate(model, heldout.plain, WINDOW)
    bits_per_byte = loss * len(heldout.plain) / heldout.plain_bytes / math.log(2)
    return {
        "corpus": "specforge_ext.prompts.python_stdlib: sources of the CPython standard library, "
        "split by a hash of the relative path; plain text, and chats made of its functions",
        "licence": "Trained on the CPython standard library's sources (PSF licence).",
        "command": "python tools/train_demo_target.py " + shlex.join(schedule_flags(run.arguments)),
        "seed": run.arguments.seed,
        "steps": run.step,
        "steps_of_schedule": run.arguments.steps,
        "tokens_per_step": run.arguments.batch_tokens,
        "cpu_seconds": round(run.cpu_seconds),
        "threads": torch.get_num_threads(),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "train_files": len(stdlib_files("train")),
        "train_bytes": train.plain_bytes,
        "train_tokens": len(train.plain),
        "train_chat_tokens": len(train.chat),
        "heldout_files": len(stdlib_files("heldout")),
        "heldout_bytes": heldout.plain_bytes,
        "heldout_tokens": len(heldout.plain),
        "train_loss_nats_per_token": round(evaluate(model, train.plain, WINDOW, limit=400), 4),
        "heldout_loss_nats_per_token": round(loss, 4),
        "heldout_loss_window": WINDOW,
        "heldout_loss_window_1024": round(evaluate(model, heldout.plain, 1024), 4),
        "heldout_chat_loss_nats_per_token": round(evaluate(model, heldout.chat, WINDOW), 4),
        "heldout_file_losses": file_losses(model, tokenizer),
        "heldout_bits_per_byte": round(bits_per_byte, 4),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def schedule_flags(arguments: argparse.Namespace) -> list[str]:
    """Return the flags that decide the weights, so that the record's command repeats the run."""
    skipped = {"work", "out", "stop_after", "export_only", "log_every", "save_every"}
    flags = ["--work", "build/demo_target"]
    for name, value in sorted(vars(arguments).items()):
        flag = "--" + name.replace("_", "-")
        if name in skipped or value is False:
            continue
        flags += [flag] if value is True else [flag, str(value)]
    return flags


def main() -> None:
    """Train (or resume), then write the package data."""
    arguments = parse_arguments()
    arguments.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    train_files = stdlib_files("train")
    tokenizer = make_tokenizer(arguments.work, [read_source(path) for path in train_files])
    train = load_corpus(train_files, tokenizer, arguments.seed)
    heldout = load_corpus(stdlib_files("heldout"), tokenizer, arguments.seed)
    print(f"tokens: train {len(train.plain)} + {len(train.chat)}, heldout {len(heldout.plain)}")
    run = Run(arguments, tokenizer)
    if not arguments.export_only:
        run.train(train, heldout)
    export(run, tokenizer, train, heldout)


if __name__ == "__main__":
    main()
