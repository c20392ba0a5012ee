"""`specforge-ext <command>`: info, train, merge."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from specforge_ext.export import merge_export
from specforge_ext.runs import local
from specforge_ext.runs.info import describe


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="specforge-ext", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="version, build, devices, kernels, transports, engines")
    run = commands.add_parser("train", help="what torchrun -m specforge_ext.train does")
    run.add_argument("arguments", nargs="*", metavar="RECIPE|key.sub=value")
    put = commands.add_parser("merge", help="an mtp export into a copy of its target")
    for name in ("export", "target", "out"):
        put.add_argument(name, type=Path)
    parsed = parser.parse_args(arguments)
    if parsed.command == "info":
        print(describe())
        return 0
    if parsed.command == "merge":
        return _merge(parsed.export, parsed.target, parsed.out)
    return local.main(parsed.arguments)


def _merge(export: Path, target: Path, out: Path) -> int:
    try:
        written = merge_export(export, target, out)
    except ValueError as error:
        print(f"specforge-ext: {error}", file=sys.stderr)
        return 2
    print(f"{out}: {len(written)} file(s) written, the others are links to {target}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
