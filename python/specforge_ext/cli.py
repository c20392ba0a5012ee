"""`specforge-ext <command>`: info, check, train."""

from __future__ import annotations

import argparse
import sys

from specforge_ext.runs import local
from specforge_ext.runs.check import check
from specforge_ext.runs.info import describe
from specforge_ext.runs.recipe import load, split_arguments


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="specforge-ext", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="version, build, devices, kernels, transports, engines")
    look = commands.add_parser("check", help="what a recipe asks for and costs; loads no model")
    look.add_argument("arguments", nargs="*", metavar="RECIPE|key.sub=value")
    look.add_argument("--ranks", type=int, default=1, metavar="N", help="of the trainer (1)")
    run = commands.add_parser("train", help="what torchrun -m specforge_ext.train does")
    run.add_argument("arguments", nargs="*", metavar="RECIPE|key.sub=value")
    parsed = parser.parse_args(arguments)
    if parsed.command == "info":
        print(describe())
        return 0
    if parsed.command == "check":
        return checked(parsed.arguments, ranks=parsed.ranks)
    return local.main(parsed.arguments)


def checked(arguments: list[str], *, ranks: int) -> int:
    """0 if the recipe is fine, 1 if it has problems, 2 if it is not a recipe."""
    if ranks < 1:
        print(f"specforge-ext: --ranks: wanted 1 or more, got {ranks}", file=sys.stderr)
        return 2
    try:
        recipe = load(*split_arguments(arguments))
    except ValueError as error:
        print(f"problem: {error}", file=sys.stderr)
        return 2
    result = check(recipe, ranks=ranks)
    print(result.render())
    return 1 if result.problems else 0


if __name__ == "__main__":
    sys.exit(main())
