"""`minibert study`: what happens to a text, printed or as a page."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from minibert.cli.options import DEFAULT_MODEL, add, load, one_text, require_model_of_revision
from minibert.cli.printing import as_json

if TYPE_CHECKING:
    from minibert.study import Study


def study_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("text", nargs="?", metavar="TEXT", help='such as "Paris is the capital of [MASK]."')
    parser.add_argument("--pair", metavar="TEXT", help="a second text, as the second segment")
    parser.add_argument(
        "--trace", metavar="FILE", help="show what is in a trace instead; --model gives what needs weights"
    )
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
    others = of_texts if traced else {"--row": options.row}
    for name, value in others.items():
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
