"""`minibert trace`."""

import argparse
from itertools import chain
from pathlib import Path

from minibert.checkpoint.files import writable_place
from minibert.commands.options import add_device_and_dtype, add_model, read_texts

HELP = "Write every intermediate tensor of a model, for `diff` and `diagnose`."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--text", action="append", metavar="TEXT", help="may be given several times: rows of one batch")
    what.add_argument("--ids", metavar="FILE", help="JSON: input_ids, and attention_mask, token_type_ids, labels")
    parser.add_argument("--out", required=True, metavar="FILE", help="the safetensors file to write")
    parser.add_argument("--backend", choices=("minibert", "transformers"), default="minibert")
    parser.add_argument("--grad", action="store_true", help="also the gradient of every parameter")
    add_device_and_dtype(parser)
    add_model(parser)


def run(options: argparse.Namespace) -> None:
    import torch

    from minibert import BertConfig, BertForMaskedLM, load_tokenizer
    from minibert.devices import computing_device
    from minibert.parity.golden import transformers_model
    from minibert.trace.recorder import read_ids, tokenized, trace
    from minibert.trace.table import standard_inputs

    require_writable(options.out)
    device, dtype = computing_device(options.device), getattr(torch, options.dtype)
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
