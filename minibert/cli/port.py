"""The porter's commands: `minibert parity`, `trace`, `diff` and `diagnose`."""

import argparse
from itertools import chain
from pathlib import Path

from minibert.checkpoint.files import writable_place
from minibert.cli.options import add_device_and_dtype, add_format, add_model, add_names, read_texts
from minibert.cli.printing import as_json, print_report, progress


def parity_arguments(parser: argparse.ArgumentParser) -> None:
    add_device_and_dtype(parser)
    add_model(parser)
    parser.add_argument("--tokenizer", metavar="FILE", help="compare this tokenizer.json with the model's own, instead")
    add_format(parser)


def run_parity(options: argparse.Namespace) -> int:
    import importlib.util
    from importlib.metadata import version

    import torch

    from minibert import BertForMaskedLM
    from minibert.checks import find_device
    from minibert.parity import golden
    from minibert.parity.check import check, collator_masks, reference_of

    if options.tokenizer is not None:
        return compare_tokenizer(options)
    device, dtype = find_device(options.device), getattr(torch, options.dtype)
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


def trace_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--text", action="append", metavar="TEXT", help="may be given several times: rows of one batch")
    what.add_argument("--ids", metavar="FILE", help="JSON: input_ids, and attention_mask, token_type_ids, labels")
    parser.add_argument("--out", required=True, metavar="FILE", help="the safetensors file to write")
    parser.add_argument("--backend", choices=("minibert", "transformers"), default="minibert")
    parser.add_argument("--grad", action="store_true", help="also the gradient of every parameter")
    add_device_and_dtype(parser)
    add_model(parser)


def run_trace(options: argparse.Namespace) -> None:
    import torch

    from minibert import BertConfig, BertForMaskedLM, load_tokenizer
    from minibert.checks import find_device
    from minibert.parity.golden import transformers_model
    from minibert.trace.recorder import read_ids, tokenized, trace
    from minibert.trace.table import standard_inputs

    require_writable(options.out)
    device, dtype = find_device(options.device), getattr(torch, options.dtype)
    model: torch.nn.Module
    if options.backend == "transformers":
        model = transformers_model(options.model, dtype, device, revision=options.revision)
        config = BertConfig.from_pretrained(options.model, revision=options.revision)
    else:
        model = BertForMaskedLM.from_pretrained(options.model, dtype=dtype, device=device, revision=options.revision)
        config = model.config
    if options.ids:
        inputs = read_ids(Path(options.ids))
    elif options.text:
        inputs = tokenized(
            [*chain(*read_texts(options.text))], load_tokenizer(options.model, revision=options.revision), config
        )
    else:
        inputs = standard_inputs(config)
    result = trace(model, **inputs, grad=options.grad)
    result.save(options.out)
    print(f"{options.out}: {len(result.tensors)} tensors of {result.metadata['backend']}, {options.dtype}")


def require_writable(out: str) -> None:
    """Before any work: a file can be written there, and what is there is a trace, if anything is."""
    if writable_place(out).exists() and b"minibert-trace" not in _start(out):
        raise ValueError(f"--out {out}: it is there, and is no trace: choose another name, or delete it first")


def _start(path: str) -> bytes:
    """The beginning of a file, in which a trace has its metadata."""
    with open(path, "rb") as file:
        return file.read(4096)


def diff_arguments(parser: argparse.ArgumentParser) -> None:
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


def run_diff(options: argparse.Namespace) -> int:
    from minibert import BertForMaskedLM
    from minibert.parity.comparison import diff, own_trace
    from minibert.parity.fewer_bits import quantised
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


def diagnose_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("trace", metavar="TRACE", help="a safetensors or .npz file, or a folder of .npy files")
    add_model(parser)
    add_names(parser)
    add_format(parser)


def run_diagnose(options: argparse.Namespace) -> int:
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
