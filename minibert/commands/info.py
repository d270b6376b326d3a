"""`minibert info`."""

import argparse
import json
from typing import TYPE_CHECKING, Any

from minibert.commands.options import add_json, add_model

if TYPE_CHECKING:
    from collections.abc import Iterator

    from minibert.checkpoint import LoadReport

HELP = "A model's configuration, its parameters, and how its file was read."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    add_json(parser)


def run(options: argparse.Namespace) -> None:
    from dataclasses import asdict

    from minibert import BertForMaskedLM

    model = BertForMaskedLM.from_pretrained(options.model, revision=options.revision)
    report = model.load_report
    assert report is not None
    parts = {"embeddings": model.embeddings, "encoder layers": model.layers, "masked-language-model head": model.head}
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
    counts["total"] = sum(p.numel() for p in model.parameters())
    if options.json:
        result = {"config": asdict(model.config), "parameters": counts, "load_report": report_values(report)}
        print(json.dumps(result, indent=2))
        return
    print("configuration")
    for key, value in asdict(model.config).items():
        print(f"  {key:<30} {value}")
    print("parameters (the decoder is the word embedding matrix, and is counted once)")
    for name, number in counts.items():
        print(f"  {name:<30} {number:>12,}")
    print("load report")
    for line in report_lines(report):
        print(f"  {line}")


def report_values(report: "LoadReport") -> dict[str, Any]:
    return {
        "name": report.name,
        "files": [str(path) for path in report.files],
        "sha256": report.sha256,
        "file_dtypes": report.file_dtypes,
        "dtype": report.dtype,
        "loaded": list(report.loaded),
        "renamed": report.renamed,
        "tied": report.tied,
        "ignored": report.ignored,
        "initialised": list(report.initialised),
        "non_finite": list(report.non_finite),
        "ignored_config_keys": list(report.ignored_config_keys),
        "defaulted_config_keys": list(report.defaulted_config_keys),
    }


def report_lines(report: "LoadReport") -> "Iterator[str]":
    for path in report.files:
        yield f"{path}"
        yield f"SHA-256 {report.sha256[path.name]}"
    stored = ", ".join(f"{count} × {name}" for name, count in report.file_dtypes.items())
    yield f"{len(report.loaded)} tensors loaded (in the file: {stored}), held as {report.dtype}"
    for title, names in (("renamed", report.renamed), ("tied copy", report.tied), ("ignored", report.ignored)):
        for name, what in names.items():
            yield f"{title}: {name} ({what})"
    for title, listed in (
        ("initialised, not loaded", report.initialised),
        ("NaN or infinite values in", report.non_finite),
        ("config keys that change nothing", report.ignored_config_keys),
        ("config keys left to their default", report.defaulted_config_keys),
    ):
        if listed:
            yield f"{title}: {', '.join(listed)}"
