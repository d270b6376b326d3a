"""`minibert parity`."""

import argparse

from minibert.commands.options import add_device_and_dtype, add_format, add_model
from minibert.commands.printing import print_report

HELP = "This model against transformers, on this machine. Exit status 1 if they differ."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_device_and_dtype(parser)
    add_model(parser)
    parser.add_argument("--tokenizer", metavar="FILE", help="compare this tokenizer.json with the model's own, instead")
    add_format(parser)


def run(options: argparse.Namespace) -> int:
    import importlib.util
    from importlib.metadata import version

    import torch

    from minibert import BertForMaskedLM
    from minibert.devices import computing_device
    from minibert.parity import golden
    from minibert.parity.check import check, collator_masks, reference_of

    if options.tokenizer is not None:
        return compare_tokenizer(options)
    device, dtype = computing_device(options.device), getattr(torch, options.dtype)
    model = BertForMaskedLM.from_pretrained(options.model, dtype=dtype, device=device, revision=options.revision)
    if importlib.util.find_spec("transformers") is None:
        reference = golden.read(model)
    else:
        theirs = golden.transformers_model(options.model, dtype, device, revision=options.revision)
        reference = reference_of(theirs, f"transformers {version('transformers')}", dtype)
        reference.masked = collator_masks(model.config.vocab_size)
    report = check(model, reference)
    print_report(report, options.format)
    return 0 if report.ok else 1


def compare_tokenizer(options: argparse.Namespace) -> int:
    from pathlib import Path

    from minibert import load_tokenizer
    from minibert.parity.tokenizers import compare_tokenizers, read_tokenizer

    ours = load_tokenizer(options.model, revision=options.revision)
    report = compare_tokenizers(ours, read_tokenizer(Path(options.tokenizer)))
    print_report(report, options.format)
    return 0 if report.ok else 1
