"""`minibert export`."""

import argparse
import json
from dataclasses import asdict

from minibert.commands.options import add_json, add_model

HELP = "Write a model as an ONNX or .pt2 file, and check the file against the model."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out", required=True, metavar="FILE", help="the file to write: its name ends in .onnx or .pt2"
    )
    add_model(parser)
    add_json(parser)


def run(options: argparse.Namespace) -> None:
    from minibert import BertForMaskedLM
    from minibert.export import export

    result = export(BertForMaskedLM.from_pretrained(options.model, revision=options.revision), options.out)
    if options.json:
        print(json.dumps({**asdict(result), "path": str(result.path)}))
        return
    print(f"{result.path}: input_ids, attention_mask and token_type_ids (B, S) give logits (B, S, V)")
    print(f"largest difference from the model, in {len(result.shapes)} shapes: {result.difference:.0e} of a logit")
