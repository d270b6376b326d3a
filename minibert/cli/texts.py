"""`minibert fill-mask`, `mlm`, `score` and `study`: what is asked of BERT about a text."""

import argparse
import json
import sys
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import asdict
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minibert.checkpoint.files import read_lines
from minibert.cli.options import (
    DEFAULT_MODEL,
    add,
    as_json,
    load,
    one_text,
    print_json_list,
    progress,
    read_texts,
    require_model_of_revision,
    standard_input,
)

if TYPE_CHECKING:
    from minibert.mlm import MaskedText
    from minibert.score import Pair, Score
    from minibert.study import Study

# From so many texts on, the model is prepared for inference: with fewer, that takes longer than it saves. To score a
# text, the model reads it once for each of its tokens, so few texts are many.
MANY_MASKS, MANY_SCORES = 64, 4

# ----------------------------------------------------------------------------------------------------------- fill-mask


def fill_mask_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("texts", nargs="+", metavar="TEXT", help='"Paris is the capital of [MASK]."; - reads lines')
    add(parser, "--targets", help="only these words compete")
    add(parser, "--top-k", "--truncate", "--dtype", "--device", "--model", "--revision", "--json")


def run_fill_mask(options: argparse.Namespace) -> None:
    from minibert import FillMask

    groups = read_texts(options.texts, blank=False)
    first = next(groups, None)
    if first is None:
        raise ValueError("there was no line on standard input")
    fill = FillMask(*load(options, many=len(first) >= MANY_MASKS), top_k=options.top_k, targets=options.targets)

    def answers() -> Iterator[tuple[str, list[Any]]]:
        """Each text and its answer, while later ones are still to be read."""
        for texts in chain([first], groups):
            yield from zip(texts, fill.stream(texts, truncate=options.truncate), strict=True)

    found = answers() if sys.stdout.isatty() else progress(answers(), "texts")
    if options.json:
        print_json_list({"text": text, "answers": answer} for text, answer in found)
        return
    for text, answer in found:
        print(text)
        several = isinstance(answer[0], list)
        for number, rows in enumerate(answer if several else [answer], start=1):
            if several:
                print(f"  [MASK] number {number}")
            for row in rows:
                print(f"  {percent(row['score']):>7}  {row['token_str']}", flush=True)


def percent(probability: float) -> str:
    """ "12.34%"; what would round to 0 keeps one digit: "3e-05%"."""
    return f"{probability:.2%}" if probability >= 5e-5 else f"{100 * probability:.0e}%"


# ----------------------------------------------------------------------------------------------------------------- mlm


def mlm_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("text", metavar="TEXT", help="- reads a line; where it has a [MASK], only that is guessed")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--seed", type=int, metavar="N", help="draw the masked tokens with this seed (default: 0)")
    where.add_argument("--positions", metavar="9,18,…", help="mask these tokens, counted from [CLS] = 0")
    parser.add_argument("--probability", type=float, metavar="P", help="of each token to be chosen (default: 0.15)")
    recipes = (
        "bert (default): 80 %% [MASK], 10 %% random, 10 %% kept, no special tokens; plain: all [MASK], [CLS] and [SEP] "
        "too; whole-word: as bert, whole words"
    )
    parser.add_argument("--recipe", choices=("bert", "plain", "whole-word"), help=recipes)
    over = "what the loss is over: the chosen tokens, as in BERT, or all (default: %(default)s)"
    parser.add_argument("--score", choices=("masked", "all"), default="masked", help=over)
    parser.add_argument("--layers", action="store_true", help="also the best guess after each layer (the logit lens)")
    add(parser, "--truncate", "--device", "--model", "--revision", "--json")


def run_mlm(options: argparse.Namespace) -> None:
    from minibert.mlm import mask_and_guess

    text = one_text(options.text)
    result = mask_and_guess(
        *load(options),
        text,
        positions=None if options.positions is None else whole_numbers(options.positions),
        probability=options.probability,
        recipe=options.recipe,
        seed=options.seed,
        score=options.score,
        truncate=options.truncate,
        layers=options.layers,
    )
    if options.json:
        print(json.dumps(asdict(result), ensure_ascii=False, allow_nan=False, indent=2))
    else:
        print_masked_text(result)


def whole_numbers(text: str) -> list[int]:
    """ "9,18" as [9, 18]."""
    if not all(part.strip().isdecimal() for part in text.split(",")):
        raise ValueError(f"--positions takes whole numbers from 0, with commas between, not {text!r}")
    return [int(part) for part in text.split(",")]


def print_masked_text(result: "MaskedText") -> None:
    """What the model saw, a table of its guesses, the guesses after each layer if there are any, and the loss."""
    seen = dict(enumerate(result.tokens)) | {row.position: row.seen for row in result.scored}
    print(f"{len(result.ids)} tokens; what the model saw:", " ".join(seen.values()), "", sep="\n")
    print(f"{'position':>8}  {'token':<15} {'outcome':<12} {'its guess':<15} {'probability':>11}  true token    loss")
    for row in result.scored:
        best = row.predictions[0]
        truth = "–" if row.probability_of_token is None else f"{row.probability_of_token:.1%}"
        loss = "–" if row.loss is None else f"{row.loss:.3f}"
        guess = f"{best.token_str:<15} {best.score:>11.1%}"
        print(f"{row.position:>8}  {row.token:<15} {row.outcome:<12} {guess} {truth:>11} {loss:>7}")
    for row in result.scored:
        for number, layer in enumerate(row.layers or []):
            if number == 0:
                print(f"\nposition {row.position}, seen as {row.seen}: the best guess after")
            print(f"  {f'layer {number}' if number else 'embeddings':<15} {layer.token_str:<15} {layer.score:>8.1%}")
    right = sum(row.predictions[0].token_str == row.token for row in result.scored if row.loss is not None)
    if result.count:
        print(f"\nloss {result.loss:.4f} over {result.count} tokens ({result.score}), {right} guessed right")
    elif result.scored:
        print("\nno loss: the text does not say which word is true. Write that word, and mask it with --positions")
    else:
        print("\nno token was chosen: try another --seed, or a higher --probability")


# --------------------------------------------------------------------------------------------------------------- score


def score_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("texts", nargs="*", metavar="TEXT", help='such as "The cat sat on the mat."; - reads lines')
    wins = "how often the good one of two sentences wins: both on a line, good first, a tab between; - reads lines"
    parser.add_argument("--pairs", metavar="FILE", help=wins)
    parser.add_argument("--given", metavar="CONTEXT", help="a sentence before each text, which is seen and not scored")
    pieces = "of a word in pieces, l2r masks those to the right too, original one at a time (default: %(default)s)"
    parser.add_argument("--within-word", choices=("l2r", "original"), default="l2r", help=pieces)
    add(parser, "--truncate", "--dtype", "--device", "--model", "--revision", "--json")


def run_score(options: argparse.Namespace) -> None:
    from minibert.score import pseudo_log_likelihood, score_pairs

    if options.pairs is not None and options.texts:
        raise ValueError(f"--pairs {options.pairs} and the text {options.texts[0]!r}: give one of the two")
    texts: Iterator[Any]
    texts = chain.from_iterable(read_texts(options.texts)) if options.pairs is None else read_pairs(options.pairs)
    first = list(islice(texts, MANY_SCORES))
    if not first:
        raise ValueError("there is nothing to score: give texts, or --pairs FILE, or lines on standard input for -")
    score: Any = pseudo_log_likelihood if options.pairs is None else score_pairs
    answers = score(
        *load(options, many=len(first) == MANY_SCORES),
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
    """The two sentences of each line of a file."""
    where = "standard input" if name == "-" else name
    if name != "-" and (Path(name).is_dir() or not Path(name).exists()):
        raise ValueError(
            f"--pairs {name} is no file: name one with a good and a bad sentence a line, or - for standard input"
        )
    with nullcontext(standard_input()) if name == "-" else open(name, "rb") as file:
        for number, line in enumerate(chain.from_iterable(read_lines(file, where)), start=1):
            columns = line.split("\t")
            if len(columns) != 2:
                said = f"a good and a bad sentence with a tab between are needed, not {len(columns)} columns"
                raise ValueError(f"{where}, line {number}: {said}")
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

    if as_json:  # a result is printed and forgotten: there may be millions
        print('{"results":')
        print_json_list(values())
    else:
        deque(values(), maxlen=0)
    rate = WinRate(outcomes["win"], outcomes["tie"], outcomes["loss"])
    low, high = rate.interval
    if as_json:
        counts = {"pairs": rate.pairs, "wins": rate.wins, "ties": rate.ties, "losses": rate.losses}
        print(f", {json.dumps({**counts, 'share': rate.share, 'interval': [low, high]})[1:]}")
        return
    print(f"the good one wins {rate.wins} of {rate.pairs}: {rate.share:.1%}, 95 % interval {low:.1%} to {high:.1%}")
    if rate.ties:
        print(f"{rate.ties} tied (less than 0.0001 nats apart), which counts as not won")


# --------------------------------------------------------------------------------------------------------------- study


def study_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("text", nargs="?", metavar="TEXT", help='such as "Paris is the capital of [MASK]."')
    parser.add_argument("--pair", metavar="TEXT", help="a second text, as the second segment")
    parser.add_argument("--trace", metavar="FILE", help="show a trace instead; --model gives what needs weights")
    parser.add_argument("--row", type=int, metavar="N", help="which text of the trace, counted from 0")
    parser.add_argument("--out", metavar="FILE", help="write a page, one HTML file, instead of printing")
    parser.add_argument("--force", action="store_true", help="replace a file that is not such a page")
    add(parser, "--targets", help="follow these words too")
    add(parser, "--top-k", "--truncate", "--device", "--revision", "--json")
    add(parser, "--model", default=None, help=f"as for the other commands (default: {DEFAULT_MODEL}, of a trace none)")


def run_study(options: argparse.Namespace) -> None:
    from minibert.study.page import require_writable

    traced = options.trace is not None
    if (options.text is None) != traced:
        raise ValueError("give a text, or --trace with a file: one of the two")
    if traced:
        require_model_of_revision(options)
    of_texts = {"--pair": options.pair, "--truncate": options.truncate or None}
    for name, value in (of_texts if traced else {"--row": options.row}).items():
        if value is not None:
            raise ValueError(f"{name} belongs to {'a text' if traced else '--trace'}: leave it out")
    if options.out is not None:
        require_writable(options.out, force=options.force)
    elif options.force:
        raise ValueError("--force belongs to --out: leave it out")
    found = study_of_trace(options) if traced else study_of_text(options)
    if options.out is not None:
        found.save(options.out, force=options.force)
        print(f"{options.out}: open it in a browser", file=sys.stderr if options.json else sys.stdout)
    if options.json:
        print(as_json(found.to_dict()))
    elif options.out is None:
        print(found.to_text(), end="")


def study_of_text(options: argparse.Namespace) -> "Study":
    from minibert.study import study

    options.model = name = options.model or DEFAULT_MODEL
    return study(
        *load(options),
        one_text(options.text),
        None if options.pair is None else one_text(options.pair),
        options.top_k,
        options.targets,
        truncate=options.truncate,
        progress=sys.stderr.isatty(),
        name=Path(name).resolve().name if Path(name).is_dir() else name,  # a page that is sent tells no folder
    )


def study_of_trace(options: argparse.Namespace) -> "Study":
    from minibert.study import study_trace
    from minibert.trace.tracefile import TraceFile

    recorded = TraceFile(options.trace)
    rows = recorded.shapes().get("input_ids", (1,))[0]
    if options.row is None and rows > 1:
        raise ValueError(f"{options.trace} has {rows} texts: say which with --row, 0 to {rows - 1}")
    model, tokenizer = (None, None) if options.model is None else load(options)
    return study_trace(recorded, options.row or 0, model, tokenizer, options.top_k, options.targets)
