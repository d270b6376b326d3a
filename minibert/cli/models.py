"""`minibert info` and `minibert export`: what is in a model's files, and its file for other programs."""

import argparse
import json
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any

from minibert.cli.options import add_json, add_model

if TYPE_CHECKING:
    from collections.abc import Iterator

    from minibert.checkpoint.reading import LoadReport
    from minibert.tokenizer import TokenizerReport


def info_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    add_json(parser)


def run_info(options: argparse.Namespace) -> None:
    from minibert import BertForMaskedLM, load_tokenizer
    from minibert.tokenizer import TokenizerReport

    model = BertForMaskedLM.from_pretrained(options.model, revision=options.revision)
    report = model.load_report
    assert report is not None
    try:
        tokenizer = load_tokenizer(options.model, revision=options.revision).load_report  # type: ignore[attr-defined]
    except FileNotFoundError:
        tokenizer = None
    except ValueError as error:  # such as one for Japanese: the model can be used all the same
        tokenizer = TokenizerReport(options.model, (), (f"it cannot be read: {error}",))
    parts = {
        "embeddings": model.embeddings,
        "encoder layers": model.get_submodule("layers"),
        "masked-language-model head": model.head,
    }
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
    counts["total"] = sum(p.numel() for p in model.parameters())
    if options.json:
        result = {
            "config": asdict(model.config),
            "parameters": counts,
            "load_report": report_values(report),
            "tokenizer": None if tokenizer is None else tokenizer_values(tokenizer),
        }
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
    print("tokenizer")
    for line in ["there is none"] if tokenizer is None else tokenizer_lines(tokenizer):
        print(f"  {line}")


def report_values(report: "LoadReport") -> dict[str, Any]:
    """Every field of the report, and the SHA-256 of each file."""
    values = {field.name: getattr(report, field.name) for field in fields(report) if field.repr}
    return {**values, "files": [str(path) for path in report.files], "sha256": report.sha256}


def report_lines(report: "LoadReport") -> "Iterator[str]":
    for path in report.files:
        yield f"{path}"
        yield f"SHA-256 {report.sha256[path.name]}"
    if report.commit is not None:
        yield f"commit {report.commit}"
    stored = ", ".join(f"{count} × {name}" for name, count in report.file_dtypes.items())
    yield f"{len(report.loaded)} tensors loaded (in the file: {stored}), held as {report.dtype}"
    if report.prefix:
        yield f"before every name in the file stands {report.prefix!r}"
    for title, names in (("renamed", report.renamed), ("tied copy", report.tied), ("ignored", report.ignored)):
        for name, what in names.items():
            yield f"{title}: {name} ({what})"
    for title, listed in (
        ("initialised, not loaded", report.initialised),
        ("NaN or infinite values in", report.non_finite),
        ("config keys that change nothing", report.ignored_config_keys),
        ("config keys that no BERT reads", report.unknown_config_keys),
        ("config keys left to their default", report.defaulted_config_keys),
    ):
        if listed:
            yield f"{title}: {', '.join(listed)}"


def tokenizer_values(report: "TokenizerReport") -> dict[str, Any]:
    return {"files": [str(path) for path in report.files], "notes": list(report.notes), "roles": dict(report.roles)}


def tokenizer_lines(report: "TokenizerReport") -> "Iterator[str]":
    yield from (str(path) for path in report.files)
    yield from report.notes
    if report.roles:
        yield "special tokens: " + ", ".join(f"{role} {token}" for role, token in report.roles.items())


def export_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out", required=True, metavar="FILE", help="the file to write: its name ends in .onnx or .pt2"
    )
    add_model(parser)
    add_json(parser)


def run_export(options: argparse.Namespace) -> None:
    from minibert import BertForMaskedLM
    from minibert.export import export

    result = export(BertForMaskedLM.from_pretrained(options.model, revision=options.revision), options.out)
    if options.json:
        print(json.dumps({**asdict(result), "path": str(result.path)}))
        return
    print(f"{result.path}: input_ids, attention_mask and token_type_ids (B, S) give logits (B, S, V)")
    print(f"largest difference from the model, in {len(result.shapes)} shapes: {result.difference:.0e} of a logit")
