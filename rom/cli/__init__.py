"""The `rom` command: `rom train`, `rom generate`, …

Each subcommand is a module with a docstring (its help), `add_arguments(parser)` and `run(args) -> int`, the exit code.
They import what is slow inside `run`, so that help and errors come at once.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

import rom
from rom.cli import campaign, doctor, fed, generate, train
from rom.training.errors import TrainingError

COMMANDS = {"train": train, "generate": generate, "fed": fed, "campaign": campaign, "doctor": doctor}

USER_ERROR, INTERRUPTED, PIPE_CLOSED = 2, 130, 141  # as argparse's, and as a shell's for SIGINT and SIGPIPE


def build_parser() -> argparse.ArgumentParser:
    """The parser of all subcommands."""
    parser = argparse.ArgumentParser(prog="rom", description=rom.__doc__)
    parser.add_argument("--version", action="version", version=f"rom {rom.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module in COMMANDS.items():
        text = (module.__doc__ or "").strip()
        command = commands.add_parser(
            name, help=text.split("\n")[0], description=text, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; the exit code is 2, with a line on standard error, for outside causes."""
    args = build_parser().parse_args(arguments)
    try:
        return args.run(args)
    except TrainingError as error:
        print(f"rom {args.command}: {error}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # the reader (`| head`) has enough; nothing more can be written, at exit either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_CLOSED
    except OSError as error:  # disk full, a file taken away: the machine's state, not a defect to trace
        print(f"rom {args.command}: {error}", file=sys.stderr)
        return USER_ERROR
