"""`minibert fill-mask` and `minibert mlm`: what the model guesses for [MASK]."""

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from itertools import chain
from typing import TYPE_CHECKING, Any

from minibert.cli.options import add, load, one_text, prepare, read_texts
from minibert.cli.printing import percent, print_json_list, progress

if TYPE_CHECKING:
    from minibert.mlm import MaskedText, ScoredToken

WORTH_PREPARING = 64  # texts: with fewer, putting the weights in order takes longer than it saves


def fill_mask_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "texts", nargs="+", metavar="TEXT", help='such as "The capital of France is [MASK]."; - reads lines'
    )
    add(parser, "--targets", help="only these words compete")
    add(parser, "--top-k", "--truncate", "--dtype", "--device", "--model", "--revision", "--json")


def run_fill_mask(options: argparse.Namespace) -> None:
    answers: Iterable[tuple[str, list[Any]]] = answer(options, read_texts(options.texts, blank=False))
    if not sys.stdout.isatty():
        answers = progress(answers, "texts")
    if options.json:
        print_json_list({"text": text, "answers": answer} for text, answer in answers)
        return
    for text, found in answers:
        print_answer(text, found)


def answer(options: argparse.Namespace, texts: Iterator[list[str]]) -> Iterator[tuple[str, list[Any]]]:
    """Each text and its answer, while later ones are still to be read."""
    from minibert import FillMask

    if (first := next(texts, None)) is None:
        raise ValueError("there was no line on standard input")
    model, tokenizer = load(options)
    fill = FillMask(model, tokenizer, top_k=options.top_k, targets=options.targets)
    count, prepared = 0, False
    for together in chain([first], texts):
        count += len(together)
        if not prepared and (options.dtype is not None or count >= WORTH_PREPARING):
            fill.model, prepared = prepare(model, options.dtype, many=True), True
        yield from zip(together, fill.stream(together, truncate=options.truncate), strict=True)


def print_answer(text: str, answer: list[Any]) -> None:
    print(text)
    several = isinstance(answer[0], list)
    for number, rows in enumerate(answer if several else [answer], start=1):
        if several:
            print(f"  [MASK] number {number}")
        for row in rows:
            print(f"  {percent(row['score']):>7}  {row['token_str']}", flush=True)


def mlm_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "text",
        metavar="TEXT",
        help="a text, or - for a line of standard input; if it has a [MASK] of its own, that is guessed, and no other "
        "token is drawn",
    )
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--seed", type=int, metavar="N", help="draw the masked tokens with this seed (default: 0)")
    where.add_argument("--positions", metavar="9,18,…", help="mask these tokens, counted from [CLS] = 0")
    parser.add_argument("--probability", type=float, metavar="P", help="of each token to be chosen (default: 0.15)")
    parser.add_argument(
        "--recipe",
        choices=("bert", "plain", "whole-word"),
        help="bert (default): 80 %% [MASK], 10 %% random, 10 %% kept, no special tokens; plain: all [MASK], "
        "[CLS] and [SEP] too; whole-word: as bert, whole words",
    )
    parser.add_argument(
        "--score",
        choices=("masked", "all"),
        default="masked",
        help="what the loss is over: the chosen tokens, as in BERT, or all of them (default: %(default)s)",
    )
    parser.add_argument(
        "--layers", action="store_true", help="show the best guess after each layer too, as the logit lens reads it"
    )
    add(parser, "--truncate", "--device", "--model", "--revision", "--json")


def run_mlm(options: argparse.Namespace) -> None:
    from minibert.mlm import mask_and_guess

    text = one_text(options.text)
    positions = None if options.positions is None else whole_numbers(options.positions)
    result = mask_and_guess(
        *load(options),
        text,
        positions=positions,
        probability=options.probability,
        recipe=options.recipe,
        seed=options.seed,
        score=options.score,
        truncate=options.truncate,
        layers=options.layers,
    )
    if options.json:
        print(json.dumps(asdict(result), ensure_ascii=False, allow_nan=False, indent=2))
        return
    print_table(result)
    if options.layers:
        for row in result.scored:
            print_layers(row)
    print()
    print(summary(result))


def whole_numbers(text: str) -> list[int]:
    """ "9,18" as [9, 18]."""
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = [-1]
    if min(numbers) < 0:
        raise ValueError(f"--positions takes whole numbers from 0, with commas between, not {text!r}")
    return numbers


def print_table(result: "MaskedText") -> None:
    seen = dict(enumerate(result.tokens)) | {row.position: row.seen for row in result.scored}
    print(f"{len(result.ids)} tokens; what the model saw:")
    print(" ".join(seen.values()))
    print()
    print(f"{'position':>8}  {'token':<15} {'outcome':<12} {'its guess':<15} {'probability':>11}  true token    loss")
    for row in result.scored:
        best = row.predictions[0]
        truth = "–" if row.probability_of_token is None else f"{row.probability_of_token:.1%}"
        loss = "–" if row.loss is None else f"{row.loss:.3f}"
        print(
            f"{row.position:>8}  {row.token:<15} {row.outcome:<12} {best.token_str:<15} "
            f"{best.score:>11.1%} {truth:>11} {loss:>7}"
        )


def print_layers(row: "ScoredToken") -> None:
    """The best guess at one position after the embeddings and after each layer."""
    print()
    print(f"position {row.position}, seen as {row.seen}: the best guess after")
    for number, guess in enumerate(row.layers or []):
        print(f"  {f'layer {number}' if number else 'embeddings':<15} {guess.token_str:<15} {guess.score:>8.1%}")


def summary(result: "MaskedText") -> str:
    right = sum(row.predictions[0].token_str == row.token for row in result.scored if row.loss is not None)
    if result.count:
        return f"loss {result.loss:.4f} over {result.count} tokens ({result.score}), {right} guessed right"
    if result.scored:
        return "no loss: the text does not say which word is true. Write that word, and mask it with --positions"
    return "no token was chosen: try another --seed, or a higher --probability"
