"""`minibert score`: how likely sentences are, or which of two is likelier."""

import argparse
import json
import sys
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minibert.checkpoint.files import read_lines
from minibert.cli.options import add, load, one_text, prepare, read_texts, standard_input
from minibert.cli.printing import print_json_list, progress

if TYPE_CHECKING:
    from minibert.score import Pair, Score

WORTH_PREPARING = 4  # texts, each of which is computed once for every token: with fewer, preparing takes longer


def score_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("texts", nargs="*", metavar="TEXT", help='such as "The cat sat on the mat."; - reads lines')
    parser.add_argument(
        "--pairs",
        metavar="FILE",
        help="a good and a bad sentence a line, with a tab between (- is standard input): how often the good one wins",
    )
    parser.add_argument("--given", metavar="CONTEXT", help="a sentence before each text, which is seen and not scored")
    parser.add_argument(
        "--within-word",
        choices=("l2r", "original"),
        default="l2r",
        help="l2r: of a word in pieces, those to the right are masked too; original: one token at a time "
        "(default: %(default)s)",
    )
    add(parser, "--truncate", "--dtype", "--device", "--model", "--revision", "--json")


def run_score(options: argparse.Namespace) -> None:
    from minibert import pseudo_log_likelihood
    from minibert.score import score_pairs

    if options.pairs is not None and options.texts:
        raise ValueError(f"--pairs {options.pairs} and the text {options.texts[0]!r}: give one of the two")
    texts: Iterator[Any]
    texts = chain.from_iterable(read_texts(options.texts)) if options.pairs is None else read_pairs(options.pairs)
    first = list(islice(texts, WORTH_PREPARING))
    if not first:
        if "-" in (*options.texts, options.pairs):
            raise ValueError("there was no line on standard input")
        raise ValueError("there is nothing to score: give texts, - for the lines of standard input, or --pairs FILE")
    model, tokenizer = load(options)
    score: Any = pseudo_log_likelihood if options.pairs is None else score_pairs
    answers = score(
        prepare(model, options.dtype, many=len(first) >= WORTH_PREPARING),
        tokenizer,
        chain(first, texts),
        within_word=options.within_word,
        given=None if options.given is None else one_text(options.given),
        truncate=options.truncate,
    )
    if not (options.json and sys.stdout.isatty()):
        answers = progress(answers, "texts" if options.pairs is None else "pairs")
    if options.pairs is not None:
        print_pairs(answers, options.json)
    elif options.json:
        print_json_list(map(as_values, answers))
    else:
        print_scores(answers)


def read_pairs(name: str) -> Iterator[tuple[str, str]]:
    if name != "-" and (Path(name).is_dir() or not Path(name).exists()):
        what = "it is a folder" if Path(name).is_dir() else "no such file"
        raise FileNotFoundError(f"--pairs {name}: {what}; it should have a good and a bad sentence a line")
    where = "standard input" if name == "-" else name
    with nullcontext(standard_input()) if name == "-" else open(name, "rb") as file:
        for number, line in enumerate(chain.from_iterable(read_lines(file, where)), start=1):
            columns = line.split("\t")
            if len(columns) != 2:
                raise ValueError(
                    f"{where}, line {number}: there should be a good and a bad sentence with a tab between them, and "
                    f"there are {len(columns)} columns"
                )
            yield columns[0], columns[1]


def as_values(score: "Score") -> dict[str, Any]:
    tokens = [
        {"token": one.token, "log_probability": one.log_probability, "start": one.start, "end": one.end}
        for one in score.tokens
    ]
    return {"text": score.text, "pll": score.pll, "pseudo_perplexity": score.pseudo_perplexity, "tokens": tokens}


def print_scores(scores: "Iterable[Score]") -> None:
    """The likeliest text first, those without a token last; under several, the figures of all together."""
    from minibert.score import pseudo_perplexity

    def figures(pll: float, tokens: int) -> str:
        if not tokens:
            return f"{'–':>12} {'–':>10} {'–':>18}"
        return f"{pll:>12.3f} {pll / tokens:>10.3f} {pseudo_perplexity(pll, tokens):>18.2f}"

    rows = [(score.pll, len(score.tokens), str(score.text)) for score in scores]
    print(f"{'PLL':>12} {'per token':>10} {'pseudo-perplexity':>18}")
    for pll, tokens, text in sorted(rows, key=lambda row: (row[1] == 0, -row[0])):
        print(f"{figures(pll, tokens)}  {' '.join(text.split()) if tokens else f'(nothing to score in {text!r})'}")
    if len(rows) > 1:
        pll, tokens = sum(row[0] for row in rows), sum(row[1] for row in rows)
        print(f"{figures(pll, tokens)}  all {len(rows)} texts, {tokens} tokens")


def print_pairs(pairs: "Iterable[Pair]", as_json: bool) -> None:
    from minibert.score import WinRate

    outcomes: Counter[str] = Counter()

    def values() -> Iterator[dict[str, Any]]:
        for pair in pairs:
            outcomes[pair.outcome] += 1
            sides = {"good": pair.good.text, "bad": pair.bad.text, "good_pll": pair.good.pll, "bad_pll": pair.bad.pll}
            yield {**sides, "outcome": pair.outcome}

    if as_json:
        print('{"results":')
        print_json_list(values())
    else:
        deque(values(), maxlen=0)
    rate = WinRate(outcomes["win"], outcomes["tie"], outcomes["loss"])
    low, high = rate.interval
    if as_json:
        summary: dict[str, Any] = {"pairs": rate.pairs, "wins": rate.wins, "ties": rate.ties, "losses": rate.losses}
        print(f", {json.dumps({**summary, 'share': rate.share, 'interval': [low, high]})[1:]}")
        return
    print(f"the good one wins {rate.wins} of {rate.pairs}: {rate.share:.1%}, 95 % interval {low:.1%} to {high:.1%}")
    if rate.ties:
        print(f"{rate.ties} tied (less than 0.0001 nats apart), which counts as not won")
