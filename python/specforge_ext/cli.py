"""`specforge-ext <command>`: info, train, convert."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from specforge_ext.export import FORMATS, convert
from specforge_ext.runs import local
from specforge_ext.runs.info import describe


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="specforge-ext", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="version, build, devices, kernels, transports, engines")
    run = commands.add_parser("train", help="what torchrun -m specforge_ext.train does")
    run.add_argument("arguments", nargs="*", metavar="RECIPE|key.sub=value")
    _add_convert(commands.add_parser("convert", help="a draft's checkpoint to another format"))
    parsed = parser.parse_args(arguments)
    if parsed.command == "convert":
        return _convert(parsed)
    if parsed.command == "info":
        print(describe())
        return 0
    return local.main(parsed.arguments)


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
    except ValueError as error:
        print(f"convert: {error}", file=sys.stderr)
        return 1
    print(done)
    return 0


if __name__ == "__main__":
    sys.exit(main())
