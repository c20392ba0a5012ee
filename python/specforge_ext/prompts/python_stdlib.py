"""Text that every Python install carries: the sources of its own standard library.

The corpus is defined by relative path alone, so the same file is in the same split on every
install and every Python version that has it. The text is under the PSF licence.
"""

from __future__ import annotations

import hashlib
import sysconfig
from pathlib import Path, PurePosixPath
from typing import Literal

Split = Literal["train", "heldout"]

HELDOUT_PERCENT = 10
"""Share of the paths, in percent, that the hash assigns to ``heldout``."""

MIN_BYTES = 512
"""Files below this many bytes are package stubs and re-exports: left out."""

_EXCLUDED_DIRECTORIES = frozenset(
    {
        "site-packages",
        "dist-packages",
        "__pycache__",
        "test",
        "tests",
        "idle_test",
        "encodings",
        "pydoc_data",
        "_bundled",
        "__phello__",
    }
)
_EXCLUDED_FILES = frozenset({"html/entities.py", "stringprep.py"})
_EXCLUDED_PREFIXES = ("_sysconfigdata", "config-", "lib-dynload", "_sysconfig_vars")


def in_corpus(relative: PurePosixPath) -> bool:
    """Tell by its path below the library's root whether a file belongs to the corpus.

    Tests, installed packages, generated tables and build records are left out.
    """
    return (
        relative.suffix == ".py"
        and str(relative) not in _EXCLUDED_FILES
        and _EXCLUDED_DIRECTORIES.isdisjoint(relative.parts[:-1])
        and not relative.parts[0].startswith(_EXCLUDED_PREFIXES)
    )


def split_of(relative: PurePosixPath) -> Split:
    """Return the split of a file: a pure function of its path below the library's root."""
    digest = hashlib.sha256(str(relative).encode("utf-8")).digest()
    heldout = int.from_bytes(digest[:8], "big") % 100 < HELDOUT_PERCENT
    return "heldout" if heldout else "train"


def read_source(path: Path) -> str:
    r"""Return the text of one file, UTF-8, with ``\n`` line ends.

    Raises:
        UnicodeDecodeError: the file is not UTF-8 (``stdlib_files`` lists no such file).
    """
    return path.read_text(encoding="utf-8")


def stdlib_files(split: Split) -> list[Path]:
    """List the files of one split of the running interpreter's library, sorted by path.

    Args:
        split: ``train`` (about nine tenths of the files) or ``heldout`` (the others).

    Returns:
        Absolute paths of UTF-8 files of at least ``MIN_BYTES`` bytes.

    Raises:
        ValueError: ``split`` is neither of the two names.
        FileNotFoundError: this install has no library sources (a zipped or stripped one).
    """
    if split not in ("train", "heldout"):
        raise ValueError(f"split must be 'train' or 'heldout', not {split!r}")
    root = Path(sysconfig.get_path("stdlib"))
    chosen = [path for path in sorted(root.rglob("*.py")) if _belongs(path, root, split)]
    if not chosen:
        raise FileNotFoundError(f"no standard library sources below {root}")
    return chosen


def _belongs(path: Path, root: Path, split: Split) -> bool:
    relative = PurePosixPath(path.relative_to(root).as_posix())
    if not in_corpus(relative) or split_of(relative) != split:
        return False
    return path.is_file() and path.stat().st_size >= MIN_BYTES and _is_utf8(path)


def _is_utf8(path: Path) -> bool:
    try:
        read_source(path)
    except UnicodeDecodeError:
        return False
    return True
