"""`specforge-ext <command>`: info, check, train, convert, merge."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from specforge_ext import __version__
from specforge_ext.export import FORMATS, convert, merge_export
from specforge_ext.runs import local
from specforge_ext.runs.check import check
from specforge_ext.runs.failure import sentence
from specforge_ext.runs.info import describe
from specforge_ext.runs.recipe import load, split_arguments


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="specforge-ext", description=__doc__)
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="version, build, devices, kernels, transports, engines")
    look = commands.add_parser("check", help="what a recipe asks for and costs; loads no model")
    look.add_argument("arguments", nargs="*", metavar="[RECIPE] key.sub=value")
    look.add_argument("--ranks", type=int, default=1, metavar="N", help="of the trainer (1)")
    commands.add_parser("train", help="what torchrun -m specforge_ext.train does", add_help=False)
    _add_convert(commands.add_parser("convert", help="a draft's checkpoint to another format"))
    put = commands.add_parser("merge", help="an mtp export into a copy of its target")
    put.add_argument("export", type=Path, help="RUN/export, the directory with its tensors")
    put.add_argument("target", type=Path, help="the target's Hugging Face folder")
    put.add_argument("out", type=Path, help="directory to write, which must not be there yet")
    # Assignments may follow an option, which argparse does not see as one list with those before.
    parsed, rest = parser.parse_known_args(arguments)
    if parsed.command == "train":
        return local.main(rest)
    taken = parsed.command == "check"
    assignments = [text for text in rest if taken and not text.startswith("-")]
    if unknown := [text for text in rest if text not in assignments]:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if parsed.command == "convert":
        return _convert(parsed)
    if parsed.command == "merge":
        return _merge(parsed.export, parsed.target, parsed.out)
    if parsed.command == "check":
        return _check([*parsed.arguments, *assignments], ranks=parsed.ranks)
    print(describe())
    return 0


def _add_convert(parser: argparse.ArgumentParser) -> None:
    """See docs/convert.md."""
    parser.add_argument("source", type=Path, help="directory, or SpecForge's training_state.pt")
    parser.add_argument("dest", type=Path, help="directory to write")
    parser.add_argument("--to", required=True, choices=FORMATS)
    parser.add_argument("--from", dest="source_format", choices=FORMATS)
    parser.add_argument("--target", type=Path, help="the target's Hugging Face folder")
    parser.add_argument("--target-name", help="what a speculators checkpoint calls the target")
    parser.add_argument("--config", type=Path, help="config.json beside a training_state.pt")
    parser.add_argument("--depth", type=int, help="tokens a step of a speculators checkpoint")
    parser.add_argument(
        "--ignore", action="append", default=[], metavar="KEY",
        help="of config.json, known to change nothing",
    )  # fmt: skip


def _convert(parsed: argparse.Namespace) -> int:
    """1 where the draft is refused, with the reason on stderr."""
    try:
        done = convert(
            parsed.source,
            parsed.dest,
            to=parsed.to,
            source_format=parsed.source_format,
            target=parsed.target,
            target_name=parsed.target_name,
            config=parsed.config,
            depth=parsed.depth,
            ignored=tuple(parsed.ignore),
        )
    except (ValueError, OSError) as error:
        print(f"convert: {sentence(error)}", file=sys.stderr)
        return 1
    print(done)
    return 0


def _merge(export: Path, target: Path, out: Path) -> int:
    try:
        written = merge_export(export, target, out)
    except (ValueError, OSError) as error:
        print(f"specforge-ext: {sentence(error)}", file=sys.stderr)
        return 2
    print(f"{out}: {len(written)} file(s) written, the others are links to {target}")
    return 0


def _check(arguments: list[str], *, ranks: int) -> int:
    """0 if the recipe is fine, 1 if it has problems, 2 if it is not a recipe."""
    if ranks < 1:
        print(f"specforge-ext: --ranks: wanted 1 or more, got {ranks}", file=sys.stderr)
        return 2
    try:
        recipe = load(*split_arguments(arguments))
    except (ValueError, OSError) as error:
        print(f"problem: {sentence(error)}", file=sys.stderr)
        return 2
    result = check(recipe, ranks=ranks)
    print(result.render())
    return 1 if result.problems else 0


if __name__ == "__main__":
    sys.exit(main())
