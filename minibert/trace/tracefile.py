"""Traces in memory and in files: every named tensor of one pass through BERT.

A trace is a safetensors file, so a port in any language can write one; numpy's files will do too (stores.py). table.py
says which tensors it holds. Only `input_ids` has to be there: what else is missing is reported, and the rest is
compared.

The file's metadata are strings. `format`, `version`, `config` (the keys of config.json, as JSON) and `dtype` (of the
weights: float32, …) are required; `backend`, `device`, `torch` and `settings` are for people.

Other forms of a tensor may mean the same: heads that are not split or not exchanged, no batch axis for one row, packed
tokens, logits only where a label asks for them, a loss with an axis, LayerNorm's older names. Each is turned into the
form of the table. What is none of these stays as it is, and is judged so.
"""

import difflib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from os import PathLike
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from minibert.checkpoint.files import naming, parse_json, whole_file
from minibert.checkpoint.names import some
from minibert.checkpoint.reading import DTYPES
from minibert.config import BertConfig
from minibert.loss import IGNORE
from minibert.packing import PackedBatch
from minibert.trace.stores import EXTRA, NUMBER, Store, open_store, renamed, with_guess
from minibert.trace.table import (
    GRADIENT,
    INPUTS,
    SHAPES,
    TABLE,
    Inputs,
    check_inputs,
    dtype_name,
    expected_names,
    expected_shape,
    hide_padding,
    row_of,
    shown,
)

FORMAT, VERSION = "minibert-trace", "1"
HOW_TO_WRITE = "minibert/parity/README.md shows how to write a trace from any language"
# A file may claim anything. What is read stays within these, which BERT-large on 32 rows of 512 tokens does.
MOST_LAYERS, MOST_NUMBERS = 1000, 2**30
PACKED = "cu_seqlens"  # where each sequence starts in packed tokens, and the end: (B + 1,)
OLD_NAMES = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
INTEGERS = ("I64", "I32", "I16", "I8", "U8", "BOOL")


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

    def settle(self, name: str, truth: Tensor) -> None:
        """Where the stored shape allows two layouts of a tensor, read it from now on in the one nearer to `truth`."""

    def layouts(self) -> str | None:
        """Which layout was taken where the stored shapes allow two, in words. None where they never do."""
        return None

    def inputs(self) -> tuple[Inputs, PackedBatch]:
        """What the model was asked. Raises ValueError, naming the trace, if no model could run on it."""
        found = self.shapes()
        if "input_ids" not in found:
            raise ValueError(
                f"{self.name}: there is no input_ids in it, so the same cannot be computed again. Write the inputs "
                "into the trace too"
            )
        try:
            inputs = {name: self.read(name).long() for name in INPUTS if name in found}
            if self.packed is not None:
                inputs.setdefault("attention_mask", self.packed.long())
            return check_inputs(self.config, **inputs)
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

    Tensors in another form that means the same are turned into the form of the table. Raises OSError if the file is not
    there, and ValueError if it is not a trace. Each message names the file. names: what the names in the file stand
    for, if they are a port's own; see `read_names`.
    """

    def __init__(self, path: str | PathLike[str], names: dict[str, str | None] | None = None) -> None:
        path = Path(path)
        self.store = open_store(path)
        with naming(path / "metadata.json" if path.is_dir() else path):
            config = read_metadata(self.store.metadata)
        with naming(path):
            found = Forms(self.store, config, renamed(self.store.header, names or {}))
        self.forms, self.others, self.mask = found.forms, found.others, found.mask
        super().__init__({}, config, self.store.metadata, str(path), found.asked, found.packed)
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
        if not found:
            return None
        read = "; ".join(f"{some(names)} as {layout}" for layout, names in found.items())
        return (
            f"{shown(self.name)}: with as many heads as positions, the shapes allow two layouts. Taken was the one "
            f"nearer to what is right: {read}"
        )


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


def _require_small(size: tuple[int, ...], config: BertConfig) -> None:
    """Raise ValueError if a tensor of the table is too large for inputs of this size, (B, S)."""
    for name, _, _ in TABLE[:-1]:
        shape = expected_shape(name, config, size)
        if prod(shape) > MOST_NUMBERS:
            raise ValueError(
                f"with this config and {size[0]} × {size[1]} tokens {name} has the shape {shape}: at most "
                f"{MOST_NUMBERS:,} numbers are compared. Trace fewer or shorter rows"
            )


Layout = tuple[tuple[int, ...], str, Callable[[Tensor], Tensor]]


class Form(NamedTuple):
    """How a stored tensor becomes a tensor of the table. shape: then. layout: how the stored one is read, where another
    layout may have the same shape.
    """

    stored: str
    shape: tuple[int, ...]
    turn: Callable[[Tensor], Tensor] = lambda x: x
    layout: str = ""


class Forms:
    """The form of every tensor in a store. Raises ValueError for names that are not in the table.

    mask: (B, S), where there are tokens. packed: the same, if the inputs are packed. asked: (B, S), where the logits
    are, or None if they are everywhere. others: by name, a second form that the stored shape allows too, where two
    sizes are equal: only the numbers can tell which it is.
    """

    def __init__(self, store: Store, config: BertConfig, names: dict[str, str]) -> None:
        self.store, self.config = store, config
        self.stored_shapes = {name: tuple(entry["shape"]) for name, entry in store.header.items()}
        self.names, unknown = _known_names(names, config)
        for name, stored in self.names.items():
            wanted, dtype = INTEGERS if name in INPUTS else tuple(DTYPES), store.header[stored]["dtype"]
            if dtype not in wanted:
                raise ValueError(f"{name} is {dtype}, and must be one of {', '.join(wanted)}")
            if 0 in self.stored_shapes[stored]:
                raise ValueError(f"{name} is empty, {self.stored_shapes[stored]}: there is nothing to compare")
        self.asked: Tensor | None = None
        self.packed: Tensor | None = None
        self.labels: Tensor | None = None
        self.mask = self._mask()
        self.forms: dict[str, Form] = {}
        self.others: dict[str, Form] = {}
        for name in sorted(self.names, key=lambda name: name not in INPUTS):
            stored = self.names[name]
            first, *others = self._forms(name, stored) or [Form(stored, self.stored_shapes[stored])]
            self.forms[name] = first
            if others and others[0].layout.endswith("K"):
                self.others[name] = others[0]
            if name == "labels":
                self.labels = first.turn(store.read(stored))
            if first.layout == "asked":
                self.asked = self._asked()
        if unknown:
            raise ValueError(_unknown(unknown, config) + self._offer(unknown))

    def _mask(self) -> Tensor:
        """(B, S), true for tokens; as far as the shape of input_ids says what B and S are."""
        shape = self.stored_shapes.get(self.names.get("input_ids", ""), (1, 1))
        if len(shape) == 1 and PACKED in self.stored_shapes:
            starts = self.store.read(PACKED).long().flatten()
            lengths = starts.diff()
            if len(starts) < 2 or int(starts[0]) != 0 or int(starts[-1]) != shape[0] or bool((lengths < 1).any()):
                raise ValueError(
                    f"{PACKED} is {starts.tolist()[:9]} for {shape[0]} packed tokens: it must grow from 0 to {shape[0]}"
                )
            longest = int(lengths.max())
            _require_small((len(lengths), longest), self.config)
            self.packed = torch.arange(longest) < lengths[:, None]
            return self.packed
        shape = (1, *shape) if len(shape) == 1 else shape if len(shape) == 2 else (1, 1)
        _require_small(shape, self.config)
        if (mask := self.names.get("attention_mask")) and self.stored_shapes[mask] in (shape, shape[shape[0] == 1 :]):
            given = self.store.read(mask)
            if bool(((given == 0) | (given == 1)).all()):  # otherwise a sentence of its own follows
                return given.bool().reshape(shape)
        return torch.ones(shape, dtype=torch.bool)

    def _asked(self) -> Tensor | None:
        """(B, S): where a label asks for something; None if there are no labels."""
        if self.labels is None or self.labels.shape != self.mask.shape:
            return None
        return (self.labels != IGNORE) & self.mask

    def _forms(self, name: str, stored: str) -> list[Form]:
        """The forms of the table's tensor that have the shape of the stored one, the likeliest first."""
        wanted = expected_shape(name, self.config, tuple(self.mask.shape))
        kind = self._in_heads if SHAPES[row_of(name)] == ["B", "H", "S", "K"] else self._as_it_is
        shape = self.stored_shapes[stored]
        return [Form(stored, wanted, turn, layout) for size, layout, turn in kind(name, wanted) if size == shape]

    def _as_it_is(self, name: str, wanted: tuple[int, ...]) -> Iterator[Layout]:
        """(shape, layout, how it is turned), of all tensors but queries, keys and values."""
        yield wanted, "", lambda x: x
        letters, mask = SHAPES[row_of(name)], self.mask
        if name == "loss":
            yield from (((1,) * axes, "", lambda x: x.reshape(())) for axes in (1, 2))
        if letters[:1] == ["B"] and len(mask) == 1:
            yield wanted[1:], "", lambda x: x[None]
        if letters[:2] == ["B", "S"]:
            filler = IGNORE if name == "labels" else 0
            yield (int(mask.sum()), *wanted[2:]), "", lambda x: _place(x, mask, filler)
        if name == "logits" and (asked := self._asked()) is not None:
            yield (int(asked.sum()), *wanted[2:]), "asked", lambda x: _place(x, asked)

    def _in_heads(self, name: str, wanted: tuple[int, ...]) -> Iterator[Layout]:
        """The same of queries, keys and values. With as many heads as positions, two layouts have the same shape."""
        (rows, length), (_, heads, _, head_size) = self.mask.shape, wanted
        tokens, mask = int(self.mask.sum()), self.mask
        split = (rows, length, heads, head_size)
        named = heads > 1
        yield wanted, "B H S K" * named, lambda x: x
        yield split, "B S H K" * named, lambda x: x.transpose(1, 2)
        yield (rows, length, heads * head_size), "", lambda x: x.reshape(split).transpose(1, 2)
        if rows == 1:
            yield split[1:], "S H K" * named, lambda x: x[None].transpose(1, 2)
            yield wanted[1:], "H S K" * named, lambda x: x[None]
        for size in ((tokens, heads, head_size), (tokens, heads * head_size)):
            yield size, "", lambda x: _place(x.reshape(tokens, heads, head_size), mask).transpose(1, 2)

    def _offer(self, unknown: list[str]) -> str:
        """The end of a sentence: which names of the table the unknown ones may stand for, by shape, likeness and order.
        "" if no shape fits.
        """
        header = self.store.header
        first: dict[str, str] = {}  # rule → the first name that it stands for
        for name in sorted(unknown, key=lambda name: header[name].get("data_offsets", [0])):
            first.setdefault(re.sub(r"\d+", NUMBER, name, count=1), name)
        absent = [name for name in expected_names(self.config) if name not in self.names]
        rows = list(dict.fromkeys(row_of(name) for name in absent if not name.startswith(GRADIENT)))
        scores = {}
        for place, (rule, stored) in enumerate(first.items()):
            for number, row in enumerate(rows):
                name = row.replace(".N.", ".0.")
                whole = not header[stored]["dtype"].startswith(("F", "BF"))
                if (NUMBER in rule) != (".N." in row) or whole != (row in INPUTS) or not self.stored_shapes[stored]:
                    continue
                if ("input_ids" not in self.names and row in INPUTS) or self._forms(name, stored):
                    apart = abs(place / len(first) - number / len(rows))
                    scores[rule, row] = _alike(rule, row) + (1 - apart) / 3
        found: dict[str, str] = {}
        for rule, row in sorted(scores, key=lambda pair: -scores[pair]):
            if rule not in found and row not in found.values():
                found[rule] = row
        if not found:
            return ""
        offered = json.dumps({shown(rule): found[rule] for rule in first if rule in found}, ensure_ascii=False)
        return f". A guess by shape and order, for you to check and correct in such a file: {offered}"


def _place(x: Tensor, where: Tensor, filler: int = 0) -> Tensor:
    """(T, …) → (B, S, …): x where `where` is true, and `filler` elsewhere."""
    result = x.new_full((*where.shape, *x.shape[1:]), filler)
    result[where] = x
    return result


def _known_names(names: dict[str, str], config: BertConfig) -> tuple[dict[str, str], list[str]]:
    """Name in the table → name in the store, and the names in the store that are no trace's. names: what those in the
    store stand for. Raises ValueError if two are one tensor's.
    """
    known, unknown = set(expected_names(config)), []
    result: dict[str, str] = {}
    for stored, name in names.items():
        for old, new in OLD_NAMES.items() if name.startswith(GRADIENT) else ():
            name = name.replace(old, new)
        if name in result:
            raise ValueError(f"{shown(stored)} and {shown(result[name])} are both {shown(name)}: leave one out")
        if name in known:
            result[name] = stored
        elif stored != PACKED and not name.startswith(EXTRA):
            unknown.append(stored)
    return result, unknown


def _unknown(names: list[str], config: BertConfig) -> str:
    known = expected_names(config)
    listed = ", ".join(with_guess(name, known) for name in sorted(names)[:12])
    more = f" and {len(names) - 12} more" if len(names) > 12 else ""
    return (
        f"no trace of this model has {listed}{more}. minibert/parity/README.md lists the names; a tensor of your own "
        f"may be called {EXTRA}…, and is then not compared; --names FILE says what the names of a port stand for"
    )


def _alike(rule: str, row: str) -> float:
    """How much a port's name looks like one of ours, from 0 to 1."""
    ours = row.rpartition(".")[2]
    words = re.findall("[a-z]+", rule.lower())
    if ours in ("query", "key", "value") and ours[0] in words:
        return 1.0
    return max(difflib.SequenceMatcher(None, theirs, ours).ratio() for theirs in (*words, "_".join(words), ""))
