"""Traces in memory and in files: every named tensor of one pass through BERT.

A trace is a safetensors file, so a port in any language can write one; numpy's files will do too (stores.py).
table.py says which tensors it holds. Only
`input_ids` has to be there: what else is missing is reported, and the rest is compared.

The file's metadata are strings. `format`, `version`, `config` (the keys of config.json, as JSON) and `dtype` (of the
weights: float32, …) are required; `backend`, `device`, `torch` and `settings` are for people.
"""

from dataclasses import dataclass
from math import prod
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from minibert.checkpoint.files import naming, parse_json, whole_file
from minibert.checkpoint.names import some
from minibert.checkpoint.reading import DTYPES
from minibert.config import BertConfig
from minibert.packing import PackedBatch
from minibert.trace.stores import Form, Forms, Renamed, open_store, shown
from minibert.trace.table import (
    INPUTS,
    MEANINGS,
    TABLE,
    Inputs,
    check_inputs,
    dtype_name,
    expected_names,
    expected_shape,
    hide_padding,
    row_of,
)

FORMAT, VERSION = "minibert-trace", "1"
HOW_TO_WRITE = "minibert/parity/README.md shows how to write a trace from any language"
# A file may claim anything. What is read stays within these, which BERT-large on 32 rows of 512 tokens does.
MOST_LAYERS, MOST_NUMBERS, MOST_IN_A_ROW = 1000, 2**30, 2**26


@dataclass
class Trace:
    """A trace in memory: tensors by name, the model's configuration, and the file's metadata. name: for messages."""

    tensors: dict[str, Tensor]
    config: BertConfig
    metadata: dict[str, str]
    name: str = "the trace"
    asked: Tensor | None = None  # (B, S) bool: where the logits are, if not everywhere
    packed: Tensor | None = None  # (B, S) bool: where packed inputs are, once they are padded

    @property
    def dtype(self) -> torch.dtype:
        return next(dtype for dtype in DTYPES.values() if dtype_name(dtype) == self.metadata["dtype"])

    @property
    def names(self) -> list[str]:
        """The tensors in order of execution. Names that TABLE does not have come last."""
        known = expected_names(self.config)
        found = set(self.shapes())
        return [name for name in known if name in found] + sorted(found - set(known))

    @property
    def title(self) -> str:
        backend = self.metadata.get("backend") or "backend not said"
        return f"{shown(self.name)} ({shown(backend)}, {self.metadata['dtype']})"

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}

    def stored_dtype(self, name: str) -> torch.dtype | None:
        """The dtype in which a tensor is stored: a port may write its bfloat16 numbers as float32."""
        return self.tensors[name].dtype

    def compared(self, name: str, mask: Tensor) -> Tensor:
        """mask: (B, S) bool. The part of it in which this tensor is there to be compared."""
        return mask & self.asked.to(mask.device) if name == "logits" and self.asked is not None else mask

    def read(self, name: str) -> Tensor:
        return self.tensors[name]

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows of the first axis of a tensor, or the number itself if it has no axis."""
        return self.tensors[name][start:stop] if self.tensors[name].dim() else self.tensors[name]

    def settle(self, name: str, truth: Tensor) -> None:
        """Where the stored shape allows two layouts of a tensor, read it from now on in the one nearer to `truth`."""

    def layouts(self) -> str | None:
        """Which layout was taken where the stored shapes allow two, in words. None where they never do."""
        return None

    def inputs(self) -> tuple[Inputs, PackedBatch]:
        """What the model was asked. Raises ValueError, naming the trace, if no model could run on it."""
        if "input_ids" not in self.shapes():
            raise ValueError(
                f"{self.name}: there is no input_ids in it, so the same cannot be computed again. Write the inputs "
                "into the trace too"
            )
        found = self.shapes()
        try:
            inputs = [self.read(name).long() if name in found else None for name in INPUTS]
            if inputs[1] is None and self.packed is not None:
                inputs[1] = self.packed.long()
            return check_inputs(self.config, *inputs)  # type: ignore[arg-type]
        except ValueError as error:
            raise ValueError(f"{shown(self.name)}: {error}") from error

    def save(self, path: str | PathLike[str]) -> None:
        """Write it as a safetensors file: the whole file, or none, and then the file that was there stays.

        Raises OSError if it cannot be written.
        """
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.tensors.items()}
        try:
            with whole_file(Path(path)) as scratch:
                save_file(tensors, scratch, metadata=self.metadata)
        except SafetensorError as error:
            raise OSError(f"{path} cannot be written: {error}") from error


class TraceFile(Trace):
    """A trace in a file (or a folder, see stores.py), of which only what is asked for is read.

    Tensors in another form that means the same (stores.py) are turned into the form of the table. Raises OSError if the
    file is not there, and ValueError if it is not a trace. Each message names the file. names: what the names in the
    file stand for, if they are a port's own; see `read_names`.
    """

    def __init__(self, path: str | PathLike[str], names: dict[str, str | None] | None = None) -> None:
        self.store = open_store(Path(path))
        if names:
            with naming(Path(path)):
                self.store = Renamed(self.store, names)
        metadata = self.store.metadata
        with naming(Path(path, "metadata.json") if Path(path).is_dir() else Path(path)):
            config = read_metadata(metadata)
        with naming(Path(path)):
            _check_header(self.store.header, config)
            found = Forms(self.store, config)
        self.forms, self.others, self.mask = found.forms, found.others, found.mask
        super().__init__({}, config, metadata, str(path), found.asked, found.packed)
        self.inputs()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: form.shape for name, form in self.forms.items()}

    def stored_dtype(self, name: str) -> torch.dtype | None:
        return DTYPES.get(self.store.header[self.forms[name].stored]["dtype"])

    def read(self, name: str) -> Tensor:
        form = self.forms[name]
        return form.turn(self.store.read(form.stored))

    def settle(self, name: str, truth: Tensor) -> None:
        if name in self.others:
            stored = self.store.read(self.forms[name].stored).double()
            truth = hide_padding(name, truth.double().cpu(), self.mask)

            def far(form: Form) -> float:
                x = hide_padding(name, form.turn(stored), self.mask)
                return (x - truth).nan_to_num(1e30, 1e30, 1e30).square().sum().item()

            if far(self.others[name]) < far(self.forms[name]):
                self.forms[name], self.others[name] = self.others[name], self.forms[name]

    def layouts(self) -> str | None:
        found: dict[str, list[str]] = {}
        for name, other in self.others.items():
            found.setdefault(f"{self.forms[name].layout}, not {other.layout}", []).append(name)
        read = [f"{some(names)} as {layout}" for layout, names in found.items()]
        if not read:
            return None
        return (
            f"{shown(self.name)}: with as many heads as positions, the shapes allow two layouts. Taken was the one "
            f"nearer to what is right: {'; '.join(read)}"
        )

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        form = self.forms[name]
        if not form.shape:
            return self.read(name)
        if not form.rowwise:
            return self.read(name)[start:stop]
        return form.turn(self.store.rows(form.stored, start, stop))


def read_metadata(metadata: dict[str, str]) -> BertConfig:
    """The configuration in a trace's metadata. Raises ValueError if the metadata are not those of a trace."""
    if metadata.get("format") != FORMAT:
        raise ValueError(
            f"its metadata give the format {metadata.get('format')!r}, and a trace gives {FORMAT!r}. Write one "
            f"with `minibert trace`; {HOW_TO_WRITE}"
        )
    if metadata.get("version") != VERSION:
        raise ValueError(f"a trace of version {metadata.get('version')!r}; this minibert reads {VERSION!r}")
    if absent := [key for key in ("config", "dtype") if key not in metadata]:
        raise ValueError(f"there is no {absent[0]} in its metadata; {HOW_TO_WRITE}")
    try:
        config = BertConfig.from_dict(parse_json(metadata["config"].encode()))
    except (ValueError, TypeError) as error:
        raise ValueError(f"the config in its metadata: {error}") from error
    known = [dtype_name(dtype) for dtype in DTYPES.values()]
    if metadata["dtype"] not in known:
        raise ValueError(f"the dtype in its metadata is {metadata['dtype']!r}, and must be {', '.join(known)}")
    if config.num_hidden_layers > MOST_LAYERS:
        raise ValueError(f"num_hidden_layers {config.num_hidden_layers}, and a trace has {MOST_LAYERS} at most")
    return config


def _check_header(header: dict[str, dict[str, Any]], config: BertConfig) -> None:
    """Raise ValueError for tensors of a kind or a size that cannot be compared."""
    for name, entry in header.items():
        if row_of(name) not in MEANINGS:
            continue  # stores.py has a sentence for it
        wanted = ("I64", "I32", "I16", "I8", "U8", "BOOL") if name in INPUTS else tuple(DTYPES)
        if entry["dtype"] not in wanted:
            raise ValueError(f"{name} is {entry['dtype']}, and must be one of {', '.join(wanted)}")
        if 0 in entry["shape"]:
            raise ValueError(f"{name} is empty, {tuple(entry['shape'])}: there is nothing to compare")
    shape = tuple(header["input_ids"]["shape"]) if "input_ids" in header else ()
    if len(shape) == 1:  # one row, or packed tokens, of which there may be one long sequence
        shape = (1, *shape)
    for name in [name for name, _, _ in TABLE[:-1]] if len(shape) == 2 else []:
        size = expected_shape(name, config, shape)
        if prod(size) > MOST_NUMBERS or prod(size[1:]) > MOST_IN_A_ROW:
            raise ValueError(
                f"with this config and {shape[0]} × {shape[1]} tokens {name} has the shape {size}: at most "
                f"{MOST_NUMBERS:,} numbers are compared, {MOST_IN_A_ROW:,} of a row. Trace fewer or shorter rows"
            )
