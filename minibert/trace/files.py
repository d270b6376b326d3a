"""Traces in memory and in files: every named tensor of one pass through BERT.

A trace is a safetensors file, so a port in any language can write one. table.py says which tensors it holds. Only
`input_ids` has to be there: what else is missing is reported, and the rest is compared.

The file's metadata are strings. `format`, `version`, `config` (the keys of config.json, as JSON) and `dtype` (of the
weights: float32, …) are required; `backend`, `device`, `torch` and `settings` are for people.
"""

import json
from dataclasses import dataclass
from math import prod
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from minibert.checkpoint import DTYPES, read_header
from minibert.config import BertConfig
from minibert.packing import PackedBatch
from minibert.trace.inputs import Inputs, check_inputs
from minibert.trace.table import INPUTS, MEANINGS, TABLE, dtype_name, expected_names, expected_shape, row_of

FORMAT, VERSION = "minibert-trace", "1"
HOW_TO_WRITE = "minibert/parity/README.md shows how to write a trace from any language"
# A file may claim anything. What is read stays within these, which BERT-large on 32 rows of 512 tokens does.
MOST_HEADER, MOST_LAYERS, MOST_NUMBERS, MOST_IN_A_ROW = 2**24, 1000, 2**30, 2**26


@dataclass
class Trace:
    """A trace in memory: tensors by name, the model's configuration, and the file's metadata. name: for messages."""

    tensors: dict[str, Tensor]
    config: BertConfig
    metadata: dict[str, str]
    name: str = "the trace"

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
        return f"{self.name} ({self.metadata.get('backend') or 'backend not said'}, {self.metadata['dtype']})"

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}

    def read(self, name: str) -> Tensor:
        return self.tensors[name]

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows of the first axis of a tensor, or the number itself if it has no axis."""
        return self.tensors[name][start:stop] if self.tensors[name].dim() else self.tensors[name]

    def inputs(self) -> tuple[Inputs, PackedBatch]:
        """What the model was asked. Raises ValueError, naming the trace, if no model could run on it."""
        if "input_ids" not in self.shapes():
            raise ValueError(
                f"{self.name}: there is no input_ids in it, so the same cannot be computed again. Write the inputs "
                "into the trace too"
            )
        found = self.shapes()
        try:
            inputs = (self.read(name).long() if name in found else None for name in INPUTS)
            return check_inputs(self.config, *inputs)  # type: ignore[arg-type]
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from error

    def save(self, path: str | PathLike[str]) -> None:
        """Write it as a safetensors file: the whole file or none. Raises OSError if it cannot be written."""
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.tensors.items()}
        try:
            save_file(tensors, path, metadata=self.metadata)
        except SafetensorError as error:
            raise OSError(f"{path} cannot be written: {error}") from error


class TraceFile(Trace):
    """A trace in a file, of which only what is asked for is read.

    Raises OSError if the file is not there, and ValueError if it is not a trace. Each message names the file.
    """

    def __init__(self, path: str | PathLike[str]) -> None:
        self.path = Path(path)
        require_file(self.path, "a trace, one safetensors file")
        with open(self.path, "rb") as start:
            length = int.from_bytes(start.read(8), "little")
        if MOST_HEADER < length <= self.path.stat().st_size:
            raise ValueError(f"{path}: its header has {length} bytes, and a trace's has {MOST_HEADER} at most")
        self.header = read_header(self.path)
        with safe_open(self.path, framework="pt") as file:
            metadata = file.metadata() or {}
        config = read_metadata(str(path), metadata)
        _check_header(str(path), self.header, config)
        super().__init__({}, config, dict(metadata), str(path))
        self.inputs()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(entry["shape"]) for name, entry in self.header.items()}

    def read(self, name: str) -> Tensor:
        # The file is opened anew each time: until it is closed, the pages read so far count as memory of this process.
        with safe_open(self.path, framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        if not self.header[name]["shape"]:
            return self.read(name)
        with safe_open(self.path, framework="pt") as file:
            tensor: Tensor = file.get_slice(name)[start:stop]
        return tensor


def read_metadata(path: str, metadata: dict[str, str]) -> BertConfig:
    """The configuration in a trace's metadata. Raises ValueError if the metadata are not those of a trace."""
    if metadata.get("format") != FORMAT:
        raise ValueError(
            f"{path}: its metadata give the format {metadata.get('format')!r}, and a trace gives {FORMAT!r}. Write one "
            f"with `minibert trace`; {HOW_TO_WRITE}"
        )
    if metadata.get("version") != VERSION:
        raise ValueError(f"{path}: a trace of version {metadata.get('version')!r}; this minibert reads {VERSION!r}")
    if absent := [key for key in ("config", "dtype") if key not in metadata]:
        raise ValueError(f"{path}: there is no {absent[0]} in its metadata; {HOW_TO_WRITE}")
    try:
        config = BertConfig.from_dict(_json_object(metadata["config"]))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: the config in its metadata: {error}") from error
    known = [dtype_name(dtype) for dtype in DTYPES.values()]
    if metadata["dtype"] not in known:
        raise ValueError(f"{path}: dtype in its metadata is {metadata['dtype']!r}, and must be {', '.join(known)}")
    if config.num_hidden_layers > MOST_LAYERS:
        raise ValueError(f"{path}: num_hidden_layers {config.num_hidden_layers}, and a trace has {MOST_LAYERS} at most")
    return config


def _check_header(path: str, header: dict[str, dict[str, Any]], config: BertConfig) -> None:
    """Raise ValueError for tensors of a kind or a size that cannot be compared."""
    for name, entry in header.items():
        if row_of(name) not in MEANINGS:
            continue  # it is not read, and `diff` says so
        wanted = ("I64", "I32", "I16", "I8", "U8", "BOOL") if name in INPUTS else tuple(DTYPES)
        if entry["dtype"] not in wanted:
            raise ValueError(f"{path}: {name} is {entry['dtype']}, and must be one of {', '.join(wanted)}")
        if 0 in entry["shape"]:
            raise ValueError(f"{path}: {name} is empty, {tuple(entry['shape'])}: there is nothing to compare")
    shape = tuple(header["input_ids"]["shape"]) if "input_ids" in header else ()
    for name in [name for name, _, _ in TABLE[:-1]] if len(shape) == 2 else []:
        size = expected_shape(name, config, shape)
        if prod(size) > MOST_NUMBERS or prod(size[1:]) > MOST_IN_A_ROW:
            raise ValueError(
                f"{path}: with this config and {shape[0]} × {shape[1]} tokens {name} has the shape {size}: at most "
                f"{MOST_NUMBERS:,} numbers are compared, {MOST_IN_A_ROW:,} of a row. Trace fewer or shorter rows"
            )


def require_file(path: Path, what: str) -> None:
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder, and should be {what}")
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file; it should be {what}")


def _json_object(text: str) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"expected a JSON object, found {type(values).__name__}")
    return values
