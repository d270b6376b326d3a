"""`minibert info` and `minibert export`: what is in a model's files, and its file for other programs."""

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, fields
from typing import Any

from minibert.cli.options import add, load_model


def info_arguments(parser: argparse.ArgumentParser) -> None:
    add(parser, "--model", "--revision", "--json")


def run_info(options: argparse.Namespace) -> None:
    model = load_model(options)
    parts = {
        "embeddings": model.embeddings,
        "encoder layers": model.get_submodule("layers"),
        "masked-language-model head": model.head,
    }
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
    counts["total"] = sum(p.numel() for p in model.parameters())
    report = model.load_report
    assert report is not None
    found = {field.name: getattr(report, field.name) for field in fields(report) if field.repr}
    found |= {"files": [str(path) for path in report.files], "sha256": report.sha256}
    tokenizer = tokenizer_values(options)
    config = asdict(model.config)
    if options.json:
        values = {"config": config, "parameters": counts, "load_report": found, "tokenizer": tokenizer}
        print(json.dumps(values, indent=2))
        return
    sections = {
        "configuration": config,
        "parameters (the decoder is the word embedding matrix, and is counted once)": {
            name: f"{count:>12,}" for name, count in counts.items()
        },
        "load report": {**found, "loaded": f"{len(report.loaded)} tensors"},
        "tokenizer": tokenizer or {"files": "none"},
    }
    for title, section in sections.items():
        print(title, *lines_of(section), sep="\n  ")


def tokenizer_values(options: argparse.Namespace) -> dict[str, Any] | None:
    """What its files say, or why they cannot be read: the model can be used all the same. None where there are none."""
    from minibert import load_tokenizer

    try:
        report = load_tokenizer(options.model, revision=options.revision).load_report  # type: ignore[attr-defined]
    except FileNotFoundError:
        return None
    except ValueError as error:  # such as one for Japanese
        return {"files": [], "notes": [f"it cannot be read: {error}"], "roles": {}}
    files = [str(path) for path in report.files]
    return {"files": files, "notes": list(report.notes), "roles": dict(report.roles)}


def lines_of(values: dict[str, Any]) -> Iterator[str]:
    """A line for each value, and for each entry of one that has names; none for what is empty."""
    for name, value in values.items():
        for key, one in value.items() if isinstance(value, dict) else [("", value)]:
            shown = ", ".join(one) if isinstance(one, list | tuple) else str(one)
            if shown not in ("", "None"):
                yield f"{f'{name} {key}':<30} {shown}"


def export_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", required=True, metavar="FILE", help="what is written: its name ends in .onnx or .pt2")
    add(parser, "--device", default="cpu", help="where the file is tried: cpu, cuda, … (default: %(default)s)")
    add(parser, "--model", "--revision", "--json")


def run_export(options: argparse.Namespace) -> None:
    from minibert.export import export

    result = export(load_model(options), options.out, device=options.device)
    if options.json:
        print(json.dumps({**asdict(result), "path": str(result.path)}))
        return
    print(f"{result.path}: input_ids, attention_mask and token_type_ids (B, S) give logits (B, S, V)")
    print(f"largest difference from the model, in {len(result.shapes)} shapes: {result.difference:.0e} of a logit")
