"""The commands parity, trace, diff and diagnose: what cli.py calls with its options. Each returns the exit status."""

import argparse
import importlib.util
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minibert.checkpoint import DTYPES
from minibert.config import BertConfig
from minibert.files import read_json
from minibert.loss import IGNORE
from minibert.masked_lm import BertForMaskedLM
from minibert.parity import golden
from minibert.parity.check import check, collator_masks, reference_of
from minibert.parity.comparison import diff
from minibert.parity.diagnosis import diagnose
from minibert.parity.golden import transformers_model
from minibert.tokenizer import encode, load_tokenizer
from minibert.trace import TraceFile, standard_inputs, trace
from minibert.trace.files import require_file
from minibert.trace.table import INPUTS


def parity(options: argparse.Namespace) -> int:
    device, dtype = torch_device(options.device), getattr(torch, options.dtype)
    model = BertForMaskedLM.from_pretrained(options.model, dtype=dtype, device=device)
    if importlib.util.find_spec("transformers") is None:
        reference = golden.read(model)
    else:
        theirs = transformers_model(options.model, dtype, device)
        reference = reference_of(theirs, f"transformers {version('transformers')}", dtype)
        reference.masked = collator_masks(model.config.vocab_size)
    report = check(model, reference)
    print(as_json(report.to_dict()) if options.json else "\n".join(report.lines()))
    return 0 if report.ok else 1


def write_trace(options: argparse.Namespace) -> int:
    if not options.out.strip() or Path(options.out).is_dir():
        raise ValueError(f"--out {options.out!r}: it needs the name of a file")
    if not Path(options.out).absolute().parent.is_dir():
        raise FileNotFoundError(f"--out {options.out}: there is no such folder. Make it first")
    device, dtype = torch_device(options.device), getattr(torch, options.dtype)
    model: torch.nn.Module
    if options.backend == "transformers":
        model = transformers_model(options.model, dtype, device)
        config = BertConfig.from_pretrained(options.model)
    else:
        model = BertForMaskedLM.from_pretrained(options.model, dtype=dtype, device=device)
        config = model.config
    if options.ids:
        inputs = read_ids(Path(options.ids))
    elif options.text:
        inputs = tokenized(options.text, options.model, config)
    else:
        inputs = standard_inputs(config)
    result = trace(model, **inputs, grad=options.grad)
    result.save(options.out)
    print(f"{options.out}: {len(result.tensors)} tensors of {result.metadata['backend']}, {options.dtype}")
    return 0


def compare(options: argparse.Namespace) -> int:
    a, b = TraceFile(options.a), TraceFile(options.b)
    model = None if options.model is None else BertForMaskedLM.from_pretrained(options.model)
    report = diff(a, b, model, everything=options.all)
    print(as_json(report.to_dict()) if options.json else "\n".join(report.lines()))
    return 0 if report.ok else 1


def name_fault(options: argparse.Namespace) -> int:
    given = TraceFile(options.trace)
    diagnosis = diagnose(given, BertForMaskedLM.from_pretrained(options.model))
    print(as_json(diagnosis.to_dict()) if options.json else "\n".join(diagnosis.lines))
    return 0 if diagnosis.ok else 1


def as_json(report: dict[str, object]) -> str:
    """JSON has no NaN and no infinity: they become the words."""

    def finite(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: finite(each) for key, each in value.items()}
        if isinstance(value, list | tuple):
            return [finite(each) for each in value]
        return str(value) if isinstance(value, float) and not abs(value) < float("inf") else value

    return json.dumps(finite(report), indent=2, allow_nan=False)


def torch_device(name: str) -> torch.device:
    """Raises ValueError if torch knows no such device, or this machine has none."""
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(
            f"--device {name}: torch cannot use it here ({str(error).splitlines()[0]}). --device cpu is everywhere"
        ) from error
    return device


def tokenized(texts: list[str], name: str, config: BertConfig) -> dict[str, Tensor]:
    """The texts as rows, padded on the right. Every token is its own label, so that there is a loss."""
    tokenizer = load_tokenizer(name)
    rows = [encode(tokenizer, text, config.max_position_embeddings).ids for text in texts]
    length = max(len(row) for row in rows)
    padding = config.pad_token_id or 0
    ids = torch.tensor([row + [padding] * (length - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, IGNORE)}


def read_ids(path: Path) -> dict[str, Tensor]:
    """A JSON object of lists of rows: input_ids, and if wanted attention_mask, token_type_ids, labels."""
    require_file(path, "a JSON file of ids")
    values = read_json(path)
    if "input_ids" not in values or (unknown := values.keys() - set(INPUTS)):
        said = f"the key {sorted(unknown)[0]!r} is not known" if "input_ids" in values else "there is no input_ids"
        raise ValueError(f"{path}: {said}; it holds {', '.join(INPUTS)}, each a list of rows")
    result = {}
    for name, rows in values.items():
        if not isinstance(rows, list) or not rows or not all(isinstance(row, list) and row for row in rows):
            raise ValueError(f"{path}: {name} must be a list of rows, [[…], […]], none of them empty")
        for number, row in enumerate(rows):
            if len(row) != len(rows[0]):
                raise ValueError(
                    f"{path}: {name} must be rows of one length, and row {number} has {len(row)} entries, row 0 "
                    f"{len(rows[0])}: fill up with padding, and give an attention_mask"
                )
            for column, entry in enumerate(row):
                if type(entry) is not int or not -(2**63) <= entry < 2**63:  # true and false are no ids
                    said = json.dumps(entry)[:40]
                    raise ValueError(f"{path}: {name} at {(number, column)} is {said}, and must be a whole number")
        result[name] = torch.tensor(rows)
    return result


DTYPE_NAMES = tuple(str(dtype).removeprefix("torch.") for dtype in DTYPES.values())
