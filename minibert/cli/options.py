"""Arguments that several commands take, and how they are read. Without torch."""

import argparse
import io
import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, BinaryIO

from minibert.checkpoint.files import as_line, read_lines

if TYPE_CHECKING:
    from minibert import BertForMaskedLM

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


def load_model(options: argparse.Namespace, name: str | None = None) -> "BertForMaskedLM":
    """The model of --model and --revision, or the one named, on --device."""
    from minibert import BertForMaskedLM
    from minibert.checks import find_device

    device = find_device(options.device)
    return BertForMaskedLM.from_pretrained(name or options.model, device=device, revision=options.revision)


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def add_format(parser: argparse.ArgumentParser) -> None:
    """--format, and --json, which is short for one of them."""
    parser.add_argument("--format", choices=("text", "markdown", "json"), default="text", help="(default: %(default)s)")
    parser.add_argument("--json", action="store_const", const="json", dest="format", help="short for --format json")


def add_names(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--names", metavar="FILE", help="JSON: what the port's own names stand for, {N} for a layer's number"
    )


def add_truncate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--truncate", action="store_true", help="cut a text that is too long for the model")


def add_device(parser: argparse._ActionsContainer, default: str = "auto") -> None:
    """--device, for `checks.find_device`."""
    parser.add_argument(
        "--device",
        default=default,
        help="cpu, cuda, cuda:1, mps, …; auto: cuda where there is one, else cpu (default: %(default)s)",
    )


def add_device_and_dtype(parser: argparse.ArgumentParser) -> None:
    """--device and --dtype of a command whose numbers are compared: where nothing else is said, they are the CPU's."""
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16", "float64"), default="float32")
    add_device(parser, default="cpu")


def add_inference_dtype(parser: argparse.ArgumentParser) -> None:
    """--dtype of a command that answers, for `prepare`."""
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "int8"),
        help="prepare the model for inference in this type, however few the texts; for many, bfloat16 and int8 take "
        "less time than float32 and are less exact: a close call may go the other way (default: float32, prepared if "
        "there are many texts)",
    )


def prepare(model: "BertForMaskedLM", dtype: str | None, many: bool) -> "BertForMaskedLM":
    """The model, prepared for inference if --dtype was given, or if there are many texts. Raises ValueError for a dtype
    that this CPU does not have.
    """
    import torch

    from minibert.inference import prepare_for_inference

    if dtype is not None:
        return prepare_for_inference(model, getattr(torch, dtype))
    return prepare_for_inference(model, model.embeddings.word.weight.dtype) if many else model


def read_texts(arguments: Iterable[str], *, blank: bool = True) -> Iterator[list[str]]:
    """The texts on the command line; "-" stands for the lines of standard input. In lists, each of the texts that are
    there together. blank: whether blank lines count.
    """
    given: list[str] = []
    for text in arguments:
        if text == "-":
            if given:
                yield given
            given = []
            for lines in read_lines(standard_input(), "standard input"):
                if kept := [line for line in lines if blank or line.strip()]:
                    yield kept
        else:
            given.append(as_line(text.encode(errors="surrogateescape"), f"the text {text[:60]!r}"))
    if given:
        yield given


def one_text(argument: str) -> str:
    """A text, or with "-" the one line of standard input. Raises ValueError if that has another number of lines."""
    lines = [text for texts in read_texts([argument], blank=argument != "-") for text in texts]
    if len(lines) != 1:
        raise ValueError(f"one text is needed, and standard input has {len(lines)} lines with text")
    return lines[0]


def standard_input() -> BinaryIO:
    if sys.stdin is None:
        raise ValueError("standard input is closed, so there is no line for -: give the texts as arguments")
    return getattr(sys.stdin, "buffer", None) or io.BytesIO(sys.stdin.read().encode())  # in a notebook it has no bytes


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
