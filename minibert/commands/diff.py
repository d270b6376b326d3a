"""`minibert diff`."""

import argparse

from minibert.commands.options import add_json, add_model
from minibert.commands.printing import as_json

HELP = "The first tensor in which two traces differ. Exit status 1 if there is one."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("a", metavar="A", help="a trace")
    parser.add_argument("b", metavar="B", help="another")
    parser.add_argument("--all", action="store_true", help="do not stop at the first tensor that differs")
    add_model(parser, default=None)
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    from minibert import BertForMaskedLM
    from minibert.parity.comparison import diff
    from minibert.trace.files import TraceFile

    a, b = TraceFile(options.a), TraceFile(options.b)
    if options.model is None and options.revision is not None:
        raise ValueError(f"--revision {options.revision} is of a hub model, and no --model was given")
    model = None if options.model is None else BertForMaskedLM.from_pretrained(options.model, revision=options.revision)
    report = diff(a, b, model, everything=options.all)
    print(as_json(report.to_dict()) if options.json else "\n".join(report.lines()))
    return 0 if report.ok else 1
