"""How a run that cannot go on says so: one sentence on the screen, the traceback in a file."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
import traceback
from pathlib import Path

from specforge_ext.loader import TooManySkipped
from specforge_ext.runs.link import ProducerRefused
from specforge_ext.store.base import StoreError
from specforge_ext.trainer import CheckpointError, CollectiveError, NonFiniteError

EXPECTED = (
    ValueError,
    OSError,
    StoreError,
    ProducerRefused,
    TooManySkipped,
    NonFiniteError,
    CheckpointError,
    CollectiveError,
)
"""What recipes, data and machines cause. Anything else is our own fault: it shows its traceback."""


def report(error: BaseException, output_dir: Path | None = None) -> None:
    """Print what is wrong; the traceback goes to output_dir/traceback-RANK.txt."""
    rank = os.environ.get("RANK", "0")
    alone = os.environ.get("WORLD_SIZE", "1") == "1"
    text = f"{'' if alone else f'rank {rank}: '}{sentence(error)}"
    if output_dir is not None and (path := _keep(error, output_dir / f"traceback-{rank}.txt")):
        text += f" (traceback: {path})"
    print(f"specforge_ext: {text}", file=sys.stderr, flush=True)
    _tell_torchrun(text)


def sentence(error: BaseException) -> str:
    """The message; with the class where the message alone would not say what happened."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror is not None:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    enough = isinstance(error, (ValueError, ProducerRefused)) and text
    return text if enough else f"{type(error).__name__}: {text}"


def _keep(error: BaseException, path: Path) -> Path | None:
    """None where the folder cannot be written to, which may be what the error is about."""
    with contextlib.suppress(OSError):
        path.write_text("".join(traceback.format_exception(error)), encoding="utf-8")
        return path
    return None


def _tell_torchrun(text: str) -> None:
    """torchrun ends with a summary of the rank that failed first, and takes its reason from here.

    The file is named in its environment; the format is torch.distributed.elastic's (errors/*.py).
    """
    if (file := os.environ.get("TORCHELASTIC_ERROR_FILE")) is None:
        return
    stamp = {"timestamp": str(int(time.time()))}
    with contextlib.suppress(OSError):  # the message is on the screen already
        Path(file).write_text(
            json.dumps({"message": {"message": text, "extraInfo": stamp}}), encoding="utf-8"
        )
