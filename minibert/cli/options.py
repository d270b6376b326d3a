"""What several commands share: their options, how models and texts are read, how answers are printed. Without torch."""

import argparse
import io
import json
import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, BinaryIO

from minibert.checkpoint.files import as_line, read_lines

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from minibert import BertForMaskedLM
    from minibert.parity.report import Report


def names(text: str) -> tuple[str, ...]:
    """ "a, b,a" as ("a", "b")."""
    return tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))


PATIENCE = 2.0  # seconds until a line of progress is shown
DEFAULT_MODEL = "minibert-uncased"
A_MODEL = "a folder, a bundled name, bert-base-uncased, or a hub id"
OPTIONS: dict[str, dict[str, Any]] = {
    "--model": {"default": DEFAULT_MODEL, "help": f"{A_MODEL} (default: %(default)s)"},
    "--revision": {"metavar": "REV", "help": "a branch, tag or commit of the model, if that is a hub id"},
    "--device": {
        "default": "auto",
        "help": "cpu, cuda, cuda:1, mps, …; auto: cuda where there is one, else cpu (default: %(default)s)",
    },
    "--dtype": {
        "choices": ("float32", "bfloat16", "int8"),
        "help": "prepare the model for inference in this type; for many texts bfloat16 and int8 are faster and less "
        "exact: a close call may go the other way (default: float32, prepared if there are many texts)",
    },
    "--top-k": {"type": int, "default": 5, "metavar": "K", "help": "how many words to show (default: %(default)s)"},
    "--targets": {"type": names, "metavar": "W,W"},
    "--truncate": {"action": "store_true", "help": "cut a text that is too long for the model"},
    "--names": {"metavar": "FILE", "help": "JSON: what the port's own names stand for, {N} for a layer's number"},
    "--json": {"action": "store_true", "help": "print JSON"},
}


def add(parser: argparse._ActionsContainer, *names: str, **others: Any) -> None:
    """Add these of OPTIONS. others: what this command says otherwise."""
    for name in names:
        parser.add_argument(name, **{**OPTIONS[name], **others})


# -------------------------------------------------------------------------------------------------- what they stand for


def load_model(options: argparse.Namespace, **how: Any) -> "BertForMaskedLM":
    """The model of --model and --revision."""
    from minibert import BertForMaskedLM

    return BertForMaskedLM.from_pretrained(options.model, revision=options.revision, **how)


def load(options: argparse.Namespace, *, many: bool = False) -> "tuple[BertForMaskedLM, Tokenizer]":
    """That model, on --device, and its tokenizer. The model is prepared for inference if --dtype was given, or if there
    are many texts.
    """
    import torch

    from minibert import load_tokenizer
    from minibert.checks import find_device
    from minibert.inference import prepare_for_inference

    model = load_model(options, device=find_device(options.device))
    dtype = getattr(options, "dtype", None)
    if dtype is not None:
        model = prepare_for_inference(model, getattr(torch, dtype))
    elif many:
        model = prepare_for_inference(model, model.embeddings.word.weight.dtype)
    return model, load_tokenizer(options.model, revision=options.revision)


def require_model_of_revision(options: argparse.Namespace) -> None:
    """For a command whose --model may be left out."""
    if options.model is None and options.revision is not None:
        raise ValueError(f"--revision {options.revision} is of a hub model, and no --model was given")


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


def as_json(value: Any) -> str:
    """JSON, indented. JSON has no NaN and no infinity: they become the words "nan" and "inf"."""

    def finite(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: finite(each) for key, each in value.items()}
        if isinstance(value, list | tuple):
            return [finite(each) for each in value]
        return str(value) if isinstance(value, float) and not abs(value) < float("inf") else value

    return json.dumps(finite(value), indent=2, allow_nan=False)


def print_json_list(values: Iterable[Any]) -> None:
    """A JSON list with a value a line, each of which is written as soon as it is known."""
    separator = "["
    for value in values:
        print(separator, json.dumps(value, ensure_ascii=False, allow_nan=False), sep="\n", end="", flush=True)
        separator = ","
    print("\n]" if separator == "," else "[]")


def shown(report: "Report", form: str) -> int:
    """Print a report as `--format` says. The exit status: 1 if what was compared is not right."""
    if form == "json":
        print(as_json(report.to_dict()))
    else:
        print("\n".join(report.markdown() if form == "markdown" else report.lines()))
    return 0 if report.ok else 1


def progress(values: Iterable[Any], what: str) -> Iterable[Any]:
    """A line on stderr that tells how far it is, on a terminal, for what takes longer than PATIENCE."""
    from tqdm import tqdm

    return tqdm(values, desc=what, disable=None, delay=PATIENCE, leave=False)
