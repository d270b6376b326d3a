"""`minibert parity`."""

import argparse

from minibert.commands.options import add_device_and_dtype, add_json, add_model
from minibert.commands.printing import as_json

HELP = "This model against transformers, on this machine. Exit status 1 if they differ."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_device_and_dtype(parser)
    add_model(parser)
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    import importlib.util
    from importlib.metadata import version

    import torch

    from minibert import BertForMaskedLM
    from minibert.devices import find_device
    from minibert.parity import golden
    from minibert.parity.check import check, collator_masks, reference_of

    device, dtype = find_device(options.device), getattr(torch, options.dtype)
    model = BertForMaskedLM.from_pretrained(options.model, dtype=dtype, device=device, revision=options.revision)
    if importlib.util.find_spec("transformers") is None:
        reference = golden.read(model)
    else:
        theirs = golden.transformers_model(options.model, dtype, device, revision=options.revision)
        reference = reference_of(theirs, f"transformers {version('transformers')}", dtype)
        reference.masked = collator_masks(model.config.vocab_size)
    report = check(model, reference)
    print(as_json(report.to_dict()) if options.json else "\n".join(report.lines()))
    return 0 if report.ok else 1
