"""`minibert diff`."""

import argparse
from pathlib import Path

from minibert.commands.options import add_format, add_model, add_names
from minibert.commands.printing import print_report

HELP = "The first tensor in which two traces differ. Exit status 1 if there is one."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("a", metavar="A", help="a trace: a safetensors or .npz file, or a folder of .npy files")
    parser.add_argument("b", metavar="B", nargs="?", help="another; left out, A is compared with --model's own trace")
    parser.add_argument("--all", action="store_true", help="do not stop at the first tensor that differs")
    parser.add_argument(
        "--quantised",
        action="store_true",
        help="A is of a quantised port: which steps 8 bits do not explain",
    )
    add_model(parser, default=None)
    add_names(parser)
    add_format(parser)


def run(options: argparse.Namespace) -> int:
    from minibert import BertForMaskedLM
    from minibert.parity.comparison import diff, own_trace
    from minibert.parity.quantised import quantised
    from minibert.trace.stores import read_names
    from minibert.trace.tracefile import TraceFile

    if options.model is None and options.revision is not None:
        raise ValueError(f"--revision {options.revision} is of a hub model, and no --model was given")
    if options.model is None and (options.b is None or options.quantised):
        raise ValueError("one trace alone is compared with a model: give --model, or a second trace")
    if options.quantised and (options.b is not None or options.all):
        raise ValueError("--quantised measures one trace against --model: leave B and --all out")
    names = None if options.names is None else read_names(Path(options.names))
    a = TraceFile(options.a, names if options.b is None else None)  # of two traces, B is the port's
    model = None if options.model is None else BertForMaskedLM.from_pretrained(options.model, revision=options.revision)
    if options.quantised:
        assert model is not None
        measured = quantised(a, model)
        print_report(measured, options.format)
        return 0 if measured.ok else 1
    if options.b is None:
        assert model is not None
        report = diff(own_trace(model, a), a, model, everything=options.all)
    else:
        report = diff(a, TraceFile(options.b, names), model, everything=options.all)
    print_report(report, options.format)
    return 0 if report.ok else 1
