"""The `minibert` command: it parses the arguments and hands them to the command's file in this folder.

A file has two functions for each of its commands: `NAME_arguments(parser)`, and `run_NAME(options)`, which returns the
exit status, or None for 0. It imports torch, and what needs torch, only inside `run_NAME`: `minibert --help` is quick.
"""

import argparse
import io
import os
import sys
import warnings
from contextlib import redirect_stdout
from importlib import import_module
from typing import TYPE_CHECKING, Any, NoReturn, TextIO, cast

from minibert import __version__

if TYPE_CHECKING:
    from collections.abc import Sequence

COMMANDS = {  # what each is for, and its file
    "fill-mask": ("The likeliest words for each [MASK].", "texts"),
    "study": ("See what BERT does with a sentence: guesses after each layer, words that matter, every head.", "texts"),
    "mlm": ("Mask a text, let the model guess, and give its loss.", "texts"),
    "score": ("How likely each sentence is: its pseudo-log-likelihood, in nats.", "texts"),
    "info": ("A model's configuration, its parameters, and how its files were read.", "models"),
    "train": ("Train a masked language model on text files.", "runs"),
    "parity": ("Compare this model with transformers, on this machine. Exit status 1 if they differ.", "port"),
    "trace": ("Write every intermediate tensor of a model, for `diff` and `diagnose`.", "port"),
    "diff": ("The first tensor in which two traces differ. Exit status 1 if there is one.", "port"),
    "diagnose": ("Name the known porting fault that explains a trace. Exit status 1 if the trace is wrong.", "port"),
    "export": ("Write a model as an ONNX or .pt2 file, and check the file against the model.", "models"),
    "bench": ("Time minibert beside the peers that are installed.", "runs"),
}
USER_ERRORS = (ValueError, OSError, FloatingPointError)  # OSError: no such file, no connection, disk full
# What a terminal would obey → what is shown. (JSON writes those below 32 itself, and may have \u009b in a text.)
CONTROL = {n: f"\\x{n:02x}" for n in range(32) if chr(n) not in "\n\t"} | {n: f"\\u{n:04x}" for n in range(127, 160)}


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        say(f"{self.prog}: {message} (see {self.prog} --help)")
        self.exit(2)


class Shown:
    """Standard output, on which the control characters in a text, a token or a name are shown (as \\x1b) and not sent:
    a terminal would obey them.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        return self._stream.write(text.translate(CONTROL))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def main(arguments: "Sequence[str] | None" = None) -> int:
    """Run the command; returns the exit status. A user's mistake is one line on stderr and status 2."""
    if sys.stderr is None:  # closed, as a program that is not started from a terminal may find it
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal or pipe that is not UTF-8
    options, unknown = build_parser().parse_known_args(arguments)
    name = f"minibert {options.command}"
    if unknown:
        say(f"{name}: unrecognized arguments: {' '.join(unknown)} (see {name} --help)")
        return 2
    if sys.stdout is None:
        if getattr(options, "out", None) is None or getattr(options, "json", False):
            say(f"{name}: standard output is closed, so there is nowhere to print the answer")
            return 2
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (the answer goes to --out)
    try:
        with redirect_stdout(cast(TextIO, Shown(sys.stdout))), warnings.catch_warnings():
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
        say(f"{name}: {error}")
        return 2
    return int(status)


def say(message: str) -> None:
    """One line on stderr."""
    print(" ".join(message.split()).translate(CONTROL), file=sys.stderr)


def build_parser() -> Parser:
    """A parser with a subcommand for each of COMMANDS."""
    parser = Parser(prog="minibert", description="BERT's masked language model: ask it, look into it, train it.")
    parser.add_argument("--version", action="version", version=f"minibert {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (about, file) in COMMANDS.items():
        part, word = import_module(f"minibert.cli.{file}"), name.replace("-", "_")
        sub = commands.add_parser(name, help=about, description=about, allow_abbrev=False)
        sub.add_argument("--traceback", action="store_true", help="on an error, show where it happened")
        getattr(part, f"{word}_arguments")(sub)
        sub.set_defaults(run=getattr(part, f"run_{word}"))
    return parser


def _one_line_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    say(f"minibert: warning: {message}")
