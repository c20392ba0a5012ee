"""`specforge-ext <command>`: info, train."""

from __future__ import annotations

import argparse
import sys

from specforge_ext.runs import local
from specforge_ext.runs.info import describe


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="specforge-ext", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="version, build, devices, kernels, transports, engines")
    run = commands.add_parser("train", help="what torchrun -m specforge_ext.train does")
    run.add_argument("arguments", nargs="*", metavar="RECIPE|key.sub=value")
    parsed = parser.parse_args(arguments)
    if parsed.command == "info":
        print(describe())
        return 0
    return local.main(parsed.arguments)


if __name__ == "__main__":
    sys.exit(main())
