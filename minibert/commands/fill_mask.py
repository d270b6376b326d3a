"""`minibert fill-mask`."""

import argparse
import json
import sys
from typing import Any

from minibert.commands.options import (
    add_device,
    add_inference_dtype,
    add_json,
    add_model,
    add_truncate,
    load_model,
    prepare,
    standard_input,
)
from minibert.commands.printing import percent

HELP = "The likeliest words for each [MASK]."
WORTH_PREPARING = 64  # texts: with fewer, putting the weights in order takes longer than it saves
WORTH_WATCHING = 16  # texts: with more, there is a progress bar


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
    from minibert import FillMask, load_tokenizer

    texts = read_texts(options.texts)
    model = load_model(options)
    model = prepare(model, options.dtype, many=len(texts) >= WORTH_PREPARING)
    fill = FillMask(model, load_tokenizer(options.model, revision=options.revision))
    targets = None if options.targets is None else [word.strip() for word in options.targets.split(",")]
    answers = fill.stream(texts, top_k=options.top_k, targets=targets, truncate=options.truncate)
    if len(texts) > WORTH_WATCHING and sys.stderr.isatty():
        from tqdm import tqdm

        answers = iter(tqdm(answers, total=len(texts), unit=" texts"))
    if options.json:
        results = [{"text": text, "answers": answer} for text, answer in zip(texts, answers, strict=True)]
        print(json.dumps(results, ensure_ascii=False, allow_nan=False, indent=2))
        return
    for text, answer in zip(texts, answers, strict=True):
        print_answer(text, answer)


def read_texts(arguments: list[str]) -> list[str]:
    """The texts on the command line; "-" stands for the lines of standard input that are not blank."""
    texts: list[str] = []
    for text in arguments:
        texts += [line.rstrip("\n") for line in standard_input() if line.strip()] if text == "-" else [text]
    if not texts:
        raise ValueError("there was no line on standard input")
    return texts


def print_answer(text: str, answer: list[Any]) -> None:
    print(text)
    several = isinstance(answer[0], list)
    for number, rows in enumerate(answer if several else [answer], start=1):
        if several:
            print(f"  [MASK] number {number}")
        for row in rows:
            print(f"  {percent(row['score']):>7}  {row['token_str']}")
