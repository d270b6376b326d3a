"""The porter's commands: `minibert parity`, `trace`, `diff` and `diagnose`."""

import argparse
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from minibert.checkpoint.files import writable_place
from minibert.cli.options import (
    A_MODEL,
    add,
    as_json,
    load_model,
    progress,
    read_texts,
    require_model_of_revision,
    shown,
)

if TYPE_CHECKING:
    from minibert.trace.tracefile import TraceFile

COMPUTED = {"--dtype": "float32", "--device": "cpu"}  # where numbers are compared, they are those of the CPU


def _computed_arguments(parser: argparse.ArgumentParser) -> None:
    types = ("float32", "float16", "bfloat16", "float64")
    add(parser, "--dtype", choices=types, default=COMPUTED["--dtype"], help="(default: %(default)s)")
    add(parser, "--device", default=COMPUTED["--device"])
    add(parser, "--model", "--revision")


def _format_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--format", choices=("text", "markdown", "json"), default="text", help="(default: %(default)s)")
    add(parser, "--json", action="store_const", const="json", dest="format", help="short for --format json")


def _read_trace(options: argparse.Namespace, path: str) -> "TraceFile":
    """The port's trace, with the names that --names gives it."""
    from minibert.trace.stores import read_names
    from minibert.trace.tracefile import TraceFile

    return TraceFile(path, None if options.names is None else read_names(Path(options.names)))


def parity_arguments(parser: argparse.ArgumentParser) -> None:
    _computed_arguments(parser)
    parser.add_argument("--tokenizer", metavar="FILE", help="compare this tokenizer.json with the model's own, instead")
    _format_arguments(parser)


def run_parity(options: argparse.Namespace) -> int:
    import importlib.util
    from importlib.metadata import version

    import torch

    from minibert.checks import find_device
    from minibert.parity import golden
    from minibert.parity.check import check, collator_masks, reference_of

    if options.tokenizer is not None:
        return compare_tokenizer(options)
    device, dtype = find_device(options.device), getattr(torch, options.dtype)
    model = load_model(options, dtype=dtype, device=device)
    if importlib.util.find_spec("transformers") is None:
        reference = golden.read(model)
    else:
        theirs = golden.transformers_model(options.model, dtype, device, revision=options.revision)
        reference = reference_of(theirs, f"transformers {version('transformers')}", dtype)
        reference.masked = collator_masks(model.config.vocab_size)
    return shown(check(model, reference), options.format)


def compare_tokenizer(options: argparse.Namespace) -> int:
    from minibert import load_tokenizer
    from minibert.parity.check import compare_tokenizers, read_tokenizer

    for name, value in COMPUTED.items():
        if getattr(options, name[2:]) != value:
            raise ValueError(f"{name} is for comparing models, and --tokenizer compares tokenizers: leave it out")
    ours = load_tokenizer(options.model, revision=options.revision)
    return shown(compare_tokenizers(ours, read_tokenizer(Path(options.tokenizer))), options.format)


def trace_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--text", action="append", metavar="TEXT", help="may be given several times: rows of one batch")
    what.add_argument("--ids", metavar="FILE", help="JSON: input_ids, and attention_mask, token_type_ids, labels")
    parser.add_argument("--out", required=True, metavar="FILE", help="the safetensors file to write")
    parser.add_argument("--backend", choices=("minibert", "transformers"), default="minibert")
    parser.add_argument("--grad", action="store_true", help="also the gradient of every parameter")
    _computed_arguments(parser)


def run_trace(options: argparse.Namespace) -> None:
    import torch

    from minibert import BertConfig, load_tokenizer
    from minibert.checks import find_device
    from minibert.parity.golden import transformers_model
    from minibert.trace.recorder import read_ids, tokenized, trace
    from minibert.trace.table import standard_inputs

    require_writable(options.out)
    device, dtype = find_device(options.device), getattr(torch, options.dtype)
    config = BertConfig.from_pretrained(options.model, revision=options.revision)
    model: torch.nn.Module
    if options.backend == "transformers":
        model = transformers_model(options.model, dtype, device, revision=options.revision)
    else:
        model = load_model(options, dtype=dtype, device=device)
    if options.ids:
        inputs = read_ids(Path(options.ids))
    elif options.text:
        tokenizer = load_tokenizer(options.model, revision=options.revision)
        inputs = tokenized([*chain(*read_texts(options.text))], tokenizer, config)
    else:
        inputs = standard_inputs(config)
    result = trace(model, **inputs, grad=options.grad)
    result.save(options.out)
    print(f"{options.out}: {len(result.tensors)} tensors of {result.metadata['backend']}, {options.dtype}")


def require_writable(out: str) -> None:
    """Before any work: a file can be written there, and what is there is a trace, if anything is."""
    if not writable_place(out).exists():
        return
    with open(out, "rb") as file:
        start = file.read(4096)  # in which a trace has its metadata
    if b"minibert-trace" not in start:
        raise ValueError(f"--out {out}: it is there, and is no trace: choose another name, or delete it first")


def diff_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("a", metavar="A", help="a trace: a safetensors or .npz file, or a folder of .npy files")
    parser.add_argument("b", metavar="B", nargs="?", help="another; left out, A is compared with --model's own trace")
    parser.add_argument("--all", action="store_true", help="do not stop at the first tensor that differs")
    parser.add_argument("--quantised", action="store_true", help="A has 8 bits: name what that does not explain")
    add(parser, "--model", default=None, help=A_MODEL)
    add(parser, "--revision", "--names")
    _format_arguments(parser)


def run_diff(options: argparse.Namespace) -> int:
    from minibert.parity.comparison import diff, own_trace
    from minibert.parity.fewer_bits import quantised
    from minibert.trace.tracefile import TraceFile

    require_model_of_revision(options)
    if options.quantised and (options.b is not None or options.all):
        raise ValueError("--quantised measures one trace against --model: leave B and --all out")
    if options.b is not None:  # of two traces, B is the port's
        model = None if options.model is None else load_model(options)
        a, b = TraceFile(options.a), _read_trace(options, options.b)
        return shown(diff(a, b, model, everything=options.all), options.format)
    if options.model is None:
        raise ValueError("one trace alone is compared with a model: give --model, or a second trace")
    port, model = _read_trace(options, options.a), load_model(options)
    if options.quantised:
        return shown(quantised(port, model), options.format)
    return shown(diff(own_trace(model, port), port, model, everything=options.all), options.format)


def diagnose_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("trace", metavar="TRACE", help="a safetensors or .npz file, or a folder of .npy files")
    add(parser, "--model", "--revision", "--names")
    _format_arguments(parser)


def run_diagnose(options: argparse.Namespace) -> int:
    from minibert.parity.diagnosis import diagnose

    diagnosis = diagnose(_read_trace(options, options.trace), load_model(options), progress)
    if options.format == "json":
        print(as_json(diagnosis.to_dict()))
    else:
        print("\n".join(diagnosis.markdown() if options.format == "markdown" else diagnosis.lines))
    return 0 if diagnosis.ok else 1
