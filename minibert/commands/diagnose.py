"""`minibert diagnose`."""

import argparse
from pathlib import Path

from minibert.commands.options import add_format, add_model, add_names
from minibert.commands.printing import as_json, progress

HELP = "Which known porting fault computes what is in a trace. Exit status 1 if wrong."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("trace", metavar="TRACE", help="a safetensors or .npz file, or a folder of .npy files")
    add_model(parser)
    add_names(parser)
    add_format(parser)


def run(options: argparse.Namespace) -> int:
    from minibert import BertForMaskedLM
    from minibert.parity.diagnosis import diagnose
    from minibert.trace.stores import read_names
    from minibert.trace.tracefile import TraceFile

    given = TraceFile(options.trace, None if options.names is None else read_names(Path(options.names)))
    model = BertForMaskedLM.from_pretrained(options.model, revision=options.revision)
    diagnosis = diagnose(given, model, progress)
    if options.format == "json":
        print(as_json(diagnosis.to_dict()))
    else:
        print("\n".join(diagnosis.markdown() if options.format == "markdown" else diagnosis.lines))
    return 0 if diagnosis.ok else 1
