"""Arguments that several commands take, and how they are read. Without torch."""

import argparse

DEFAULT_MODEL = "minibert-uncased"


def add_model(parser: argparse.ArgumentParser, default: str | None = DEFAULT_MODEL) -> None:
    """--model and --revision."""
    parser.add_argument(
        "--model",
        default=default,
        help="a folder, a bundled name, bert-base-uncased, or a hub id (default: %(default)s)",
    )
    add_revision(parser, "--model")


def add_revision(parser: argparse.ArgumentParser, of: str) -> None:
    parser.add_argument("--revision", metavar="REV", help=f"a branch, tag or commit of {of}, if that is a hub id")


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def add_format(parser: argparse.ArgumentParser) -> None:
    """--format, and --json, which is short for one of them."""
    parser.add_argument("--format", choices=("text", "markdown", "json"), default="text", help="(default: %(default)s)")
    parser.add_argument("--json", action="store_const", const="json", dest="format", help="short for --format json")


def add_truncate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--truncate", action="store_true", help="cut a text that is too long for the model")


def add_device_and_dtype(parser: argparse.ArgumentParser) -> None:
    """--device and --dtype."""
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16", "float64"), default="float32")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, … (default: %(default)s)")


def whole_numbers(name: str, text: str) -> list[int]:
    """ "9,18" as [9, 18]. Raises ValueError, naming the option `name`, for anything else."""
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = [-1]
    if min(numbers) < 0:
        raise ValueError(f"{name} takes whole numbers from 0, with commas between, not {text!r}")
    return numbers


def names(text: str) -> tuple[str, ...]:
    """ "a, b,a" as ("a", "b")."""
    return tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
