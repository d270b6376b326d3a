"""`minibert fill-mask`."""

import argparse
import sys
from itertools import chain
from typing import TYPE_CHECKING, Any

from minibert.commands.options import (
    add_device,
    add_inference_dtype,
    add_json,
    add_model,
    add_truncate,
    load_model,
    prepare,
    read_texts,
)
from minibert.commands.printing import percent, print_json_list, progress

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

HELP = "The likeliest words for each [MASK]."
WORTH_PREPARING = 64  # texts: with fewer, putting the weights in order takes longer than it saves


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "texts", nargs="+", metavar="TEXT", help='such as "The capital of France is [MASK]."; - reads lines'
    )
    parser.add_argument(
        "--top-k", type=int, default=5, metavar="K", help="answers for each [MASK] (default: %(default)s)"
    )
    parser.add_argument("--targets", metavar="W,W", help="only these words compete")
    add_truncate(parser)
    add_inference_dtype(parser)
    add_device(parser)
    add_model(parser)
    add_json(parser)


def run(options: argparse.Namespace) -> None:
    answers: Iterable[tuple[str, list[Any]]] = answer(options, read_texts(options.texts, blank=False))
    if not sys.stdout.isatty():
        answers = progress(answers, "texts")
    if options.json:
        print_json_list({"text": text, "answers": answer} for text, answer in answers)
        return
    for text, found in answers:
        print_answer(text, found)


def answer(options: argparse.Namespace, texts: "Iterator[list[str]]") -> "Iterator[tuple[str, list[Any]]]":
    """Each text and its answer, while later ones are still to be read."""
    from minibert import FillMask, load_tokenizer

    if (first := next(texts, None)) is None:
        raise ValueError("there was no line on standard input")
    model = load_model(options)
    fill = FillMask(model, load_tokenizer(options.model, revision=options.revision))
    targets = None if options.targets is None else [word.strip() for word in options.targets.split(",")]
    count, prepared = 0, False
    for together in chain([first], texts):
        count += len(together)
        if not prepared and (options.dtype is not None or count >= WORTH_PREPARING):
            fill, prepared = FillMask(prepare(model, options.dtype, many=True), fill.tokenizer), True
        found = fill.stream(together, top_k=options.top_k, targets=targets, truncate=options.truncate)
        yield from zip(together, found, strict=True)


def print_answer(text: str, answer: list[Any]) -> None:
    print(text)
    several = isinstance(answer[0], list)
    for number, rows in enumerate(answer if several else [answer], start=1):
        if several:
            print(f"  [MASK] number {number}")
        for row in rows:
            print(f"  {percent(row['score']):>7}  {row['token_str']}", flush=True)
