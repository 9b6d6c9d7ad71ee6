"""Report machine, versions, backends with reasons, and run every operator once.

The exit code is 1 when something is broken. `--json` prints the same report for machines.
"""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def run(args: argparse.Namespace) -> int:
    """Prints the report."""
    import json  # noqa: PLC0415

    from rom import doctor  # noqa: PLC0415

    report = doctor.examine()
    print(json.dumps(report, indent=2) if args.json else doctor.render(report))
    return 1 if report["problems"] else 0
