"""The `minibert` command: it parses the arguments and hands them to the command's own file (commands/)."""

import argparse
import io
import os
import sys
import warnings
from importlib import import_module
from typing import TYPE_CHECKING, Any, NoReturn

from minibert import __version__
from minibert.commands import COMMANDS

if TYPE_CHECKING:
    from collections.abc import Sequence

USER_ERRORS = (ValueError, OSError, FloatingPointError)  # OSError: no such file, no connection, disk full


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def main(arguments: "Sequence[str] | None" = None) -> int:
    """Run the command; returns the exit status. A user's mistake is one line on stderr and status 2."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal or pipe that is not UTF-8
    options, unknown = build_parser().parse_known_args(arguments)
    if unknown:
        said = f"unrecognized arguments: {' '.join(unknown)}"
        print(f"minibert {options.command}: {said} (see minibert {options.command} --help)", file=sys.stderr)
        return 2
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _one_line_warning
            status = options.run(options) or 0  # None, or the exit status of a command that judges
        sys.stdout.flush()
    except BrokenPipeError:  # `minibert … | head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 130
    except USER_ERRORS as error:
        if options.traceback:
            raise
        print(f"minibert {options.command}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return int(status)


def build_parser() -> Parser:
    """A parser with a subcommand for each file in commands/."""
    parser = Parser(prog="minibert", description="BERT's masked language model: ask it, look into it, train it.")
    parser.add_argument("--version", action="version", version=f"minibert {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in COMMANDS:
        command = import_module(f"minibert.commands.{name.replace('-', '_')}")
        sub = commands.add_parser(name, help=command.HELP, description=command.HELP, allow_abbrev=False)
        sub.add_argument("--traceback", action="store_true", help="on an error, show where it happened")
        command.add_arguments(sub)
        sub.set_defaults(run=command.run)
    return parser


def _one_line_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"minibert: warning: {' '.join(str(message).split())}", file=sys.stderr)
