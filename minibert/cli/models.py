"""`minibert info` and `minibert export`: what is in a model's files, and its file for other programs."""

import argparse
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any

from minibert.cli.options import add, load_model

if TYPE_CHECKING:
    from minibert.checkpoint.reading import LoadReport
    from minibert.tokenizer import TokenizerReport


def info_arguments(parser: argparse.ArgumentParser) -> None:
    add(parser, "--model", "--revision", "--json")


def run_info(options: argparse.Namespace) -> None:
    from minibert import load_tokenizer
    from minibert.tokenizer import TokenizerReport

    model = load_model(options)
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
        values: dict[str, Any] = {"config": asdict(model.config), "parameters": counts}
        values["load_report"] = {
            **{field.name: getattr(report, field.name) for field in fields(report) if field.repr},
            "files": [str(path) for path in report.files],
            "sha256": report.sha256,
        }
        values["tokenizer"] = tokenizer and {
            "files": [str(path) for path in tokenizer.files],
            "notes": list(tokenizer.notes),
            "roles": dict(tokenizer.roles),
        }
        print(json.dumps(values, indent=2))
        return
    sections: dict[str, Iterable[str]] = {
        "configuration": (f"{key:<30} {value}" for key, value in asdict(model.config).items()),
        "parameters (the decoder is the word embedding matrix, and is counted once)": (
            f"{name:<30} {number:>12,}" for name, number in counts.items()
        ),
        "load report": report_lines(report),
        "tokenizer": ["there is none"] if tokenizer is None else tokenizer_lines(tokenizer),
    }
    for title, lines in sections.items():
        print(title, *lines, sep="\n  ")


def report_lines(report: "LoadReport") -> Iterator[str]:
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


def tokenizer_lines(report: "TokenizerReport") -> Iterator[str]:
    yield from (str(path) for path in report.files)
    yield from report.notes
    if report.roles:
        yield "special tokens: " + ", ".join(f"{role} {token}" for role, token in report.roles.items())


def export_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out", required=True, metavar="FILE", help="the file to write: its name ends in .onnx or .pt2"
    )
    add(parser, "--model", "--revision", "--json")
    add(
        parser,
        "--device",
        default="cpu",
        help="where the file is tried: cpu, cuda, cuda:1, mps, … (default: %(default)s)",
    )


def run_export(options: argparse.Namespace) -> None:
    from minibert.export import export

    result = export(load_model(options), options.out, device=options.device)
    if options.json:
        print(json.dumps({**asdict(result), "path": str(result.path)}))
        return
    print(f"{result.path}: input_ids, attention_mask and token_type_ids (B, S) give logits (B, S, V)")
    print(f"largest difference from the model, in {len(result.shapes)} shapes: {result.difference:.0e} of a logit")
