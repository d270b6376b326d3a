"""`minibert diagnose`."""

import argparse

from minibert.commands.options import add_json, add_model
from minibert.commands.printing import as_json

HELP = "Which known porting fault computes what is in a trace. Exit status 1 if wrong."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("trace", metavar="TRACE")
    add_model(parser)
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    from minibert import BertForMaskedLM
    from minibert.parity.diagnosis import diagnose
    from minibert.trace.files import TraceFile

    given = TraceFile(options.trace)
    diagnosis = diagnose(given, BertForMaskedLM.from_pretrained(options.model, revision=options.revision))
    print(as_json(diagnosis.to_dict()) if options.json else "\n".join(diagnosis.lines))
    return 0 if diagnosis.ok else 1
