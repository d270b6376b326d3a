"""Where the tensors of a trace are: in a safetensors file, in a .npz file, or in a folder of .npy files. And in which
form.

Each store has a header (name → dtype and shape, as safetensors writes them), the metadata, and reads one tensor, or
some rows of it, at a time. No store opens a pickle.

Other forms of a tensor may mean the same: heads that are not split or not exchanged, no batch axis for one row, packed
tokens, logits only where a label asks for them, a loss with an axis, LayerNorm's older names, a port's own names. Each
is turned into the form of the table. What is none of these stays as it is, and is judged so.
"""

import difflib
import json
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, Protocol

import torch
from torch import Tensor

from minibert.checkpoint.files import parse_json, read_json, stamp
from minibert.checkpoint.reading import SafetensorsFile
from minibert.config import BertConfig
from minibert.loss import IGNORE
from minibert.trace.table import GRADIENT, INPUTS, SHAPES, expected_names, expected_shape, row_of

MOST_HEADER = 2**24  # bytes. A file may claim anything.
KINDS = {
    "f8": "F64",
    "f4": "F32",
    "f2": "F16",
    "i8": "I64",
    "i4": "I32",
    "i2": "I16",
    "i1": "I8",
    "u1": "U8",
    "b1": "BOOL",
}
METADATA = "metadata"  # the name of a .npz's entry, and of a folder's JSON file


class Store(Protocol):
    header: dict[str, dict[str, Any]]
    metadata: dict[str, str]

    def read(self, name: str, /) -> Tensor: ...

    def rows(self, name: str, start: int, stop: int) -> Tensor: ...


def open_store(path: Path) -> Store:
    """Raises OSError if nothing is there, ValueError if it is none of the three."""
    if path.is_dir():
        if not any(path.glob("*.npy")):
            raise IsADirectoryError(
                f"{path} is a folder without .npy files, and should be a trace: a safetensors or .npz file, or a "
                f"folder of .npy files with {METADATA}.json"
            )
        return Arrays(path)
    require_file(path, "a trace: a safetensors or .npz file, or a folder of .npy files")
    if path.suffix == ".npz" or zipfile.is_zipfile(path):
        return Arrays(path)
    return Safetensors(path)


def require_file(path: Path, what: str) -> None:
    """Raise OSError unless `path` is a regular file. A pipe can be read only once, and reading it might never end."""
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder, and should be {what}")
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file; it should be {what}")
    if not path.is_file():
        raise OSError(f"{path} is a pipe or a device, and should be {what}: write it to a file first")


class Safetensors(SafetensorsFile):
    def __init__(self, path: Path) -> None:
        with open(path, "rb") as start:
            length = int.from_bytes(start.read(8), "little")
        if MOST_HEADER < length <= path.stat().st_size:
            raise ValueError(f"{path}: its header has {length} bytes, and a trace's has {MOST_HEADER} at most")
        super().__init__(path)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        return self.read(name, range(self.header[name]["shape"][0])[start:stop])


class Arrays:
    """numpy's .npz, or a folder of .npy files. The metadata are one JSON object of strings: the entry `metadata` of a
    .npz (numpy.savez(…, metadata=json.dumps(…))), or metadata.json in the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.stamps: dict[Path, tuple[int, ...]] = {}  # what was there when it was opened, and must still be
        with _damaged(path):
            names = self._names()
        self.header = {}
        for name in names:
            with self._open(name) as file:
                self.header[name] = _npy_header(file)
        with _damaged(path / f"{METADATA}.json" if path.is_dir() else path):
            metadata = parse_json(self._metadata())
        self.metadata = {key: value if isinstance(value, str) else str(value) for key, value in metadata.items()}

    def _names(self) -> list[str]:
        if self.path.is_dir():
            return sorted(file.stem for file in self.path.glob("*.npy"))
        with zipfile.ZipFile(self.path) as archive:
            names = [name.removesuffix(".npy") for name in archive.namelist()]
        if len(names) != len(set(names)):
            raise ValueError("a name stands there twice")
        return [name for name in names if name != METADATA]

    @contextmanager
    def _open(self, name: str) -> Iterator[IO[bytes]]:
        """The .npy file of a tensor. An error within the block names it."""
        path = self.path / f"{name}.npy" if self.path.is_dir() else self.path
        with _damaged(path):
            if self.stamps.setdefault(path, stamp(path)) != stamp(path):
                raise ValueError("it has changed since it was opened")
            if self.path.is_dir():
                with open(path, "rb") as file:
                    yield file
            else:
                with zipfile.ZipFile(path) as archive, archive.open(f"{name}.npy") as entry:
                    yield entry

    def _metadata(self) -> bytes:
        """The JSON of the metadata; an empty object if there is none."""
        if self.path.is_dir():
            file = self.path / f"{METADATA}.json"
            return file.read_bytes() if file.is_file() else b"{}"
        with zipfile.ZipFile(self.path) as archive:
            if f"{METADATA}.npy" not in archive.namelist():
                return b"{}"
        return str(self._load(METADATA)).encode()

    def _load(self, name: str) -> Any:
        import numpy

        with self._open(name) as file:
            return numpy.lib.format.read_array(file, allow_pickle=False)

    def read(self, name: str) -> Tensor:
        return torch.from_numpy(self._load(name))

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        import numpy

        if not self.path.is_dir():  # packed: there is no way to a row but through those before it
            return self.read(name)[start:stop]
        with self._open(name):
            mapped = numpy.load(self.path / f"{name}.npy", mmap_mode="r", allow_pickle=False)
            return torch.from_numpy(mapped[start:stop].copy())


@contextmanager
def _damaged(path: Path) -> Iterator[None]:
    """Whatever the libraries say of damaged bytes is a ValueError that names the file."""
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) and error.filename:  # nothing there, or not to be read
            raise
        raise ValueError(f"{path}: not a whole set of numpy arrays and metadata: {error}") from error


def _npy_header(file: IO[bytes]) -> dict[str, Any]:
    """The dtype and the shape of a .npy file, of which only the start is read. Raises ValueError for anything else."""
    from numpy.lib import format as npy

    version = npy.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"an array of the format {version}, which only arrays with named fields need")
    shape, _, dtype = (npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0)(file)
    if dtype.str[1:] not in KINDS or dtype.str[0] == ">":
        raise ValueError(f"an array of the dtype {dtype.str!r}: make it a float32 or int64 array of this byte order")
    return {"dtype": KINDS[dtype.str[1:]], "shape": [int(size) for size in shape]}


PACKED = "cu_seqlens"  # where each sequence starts in packed tokens, and the end: (B + 1,)
MOST_PADDED = 2**20  # places that packed tokens may take when they are padded
NUMBER = "{N}"  # stands for a layer's number in a port's names
EXTRA = "extra."  # Tensors whose names begin so belong to the port alone.
OLD_NAMES = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}


@dataclass(frozen=True)
class Form:
    """How a stored tensor becomes a tensor of the table. shape: then. rowwise: whether rows can be turned alone.
    layout: how the stored one is read, where its shape allows two ways.
    """

    stored: str
    shape: tuple[int, ...]
    turn: Callable[[Tensor], Tensor] = lambda x: x
    rowwise: bool = True
    layout: str = ""


class Forms:
    """The form of every tensor in a store. Raises ValueError for names that are not in the table.

    mask: (B, S), where there are tokens. packed: the same, if the inputs are packed. asked: (B, S), where the logits
    are, or None if they are everywhere. others: by name, a second form that the stored shape allows too, where two
    sizes are equal: only the numbers can tell which it is.
    """

    def __init__(self, store: Store, config: BertConfig) -> None:
        self.config = config
        self.shapes = {name: tuple(entry["shape"]) for name, entry in store.header.items()}
        self.names, unknown = _known_names(store.header, config)
        self.asked: Tensor | None = None
        self.packed: Tensor | None = None
        self.mask = self._mask(store)
        self.labels: Tensor | None = None
        self.forms = {name: self._form(name, stored) for name, stored in self.names.items() if name in INPUTS}
        if "labels" in self.forms:
            self.labels = self.forms["labels"].turn(store.read(self.names["labels"]))
        self.forms |= {name: self._form(name, stored) for name, stored in self.names.items() if name not in INPUTS}
        if unknown:
            raise ValueError(_unknown(unknown, config) + self._offer(unknown, store))
        self.others: dict[str, Form] = {}
        for name, form in list(self.forms.items()):
            self._two_layouts(name, form)

    def _mask(self, store: Store) -> Tensor:
        """(B, S), true for tokens; as far as the shape of input_ids says what B and S are."""
        shape = self.shapes.get("input_ids", (1, 1))
        if len(shape) == 1 and PACKED in self.shapes:
            starts = store.read(PACKED).long().flatten()
            lengths = starts.diff()
            if len(starts) < 2 or int(starts[0]) != 0 or int(starts[-1]) != shape[0] or bool((lengths < 1).any()):
                raise ValueError(
                    f"{PACKED} is {starts.tolist()[:9]} for {shape[0]} packed tokens: it must grow from 0 to {shape[0]}"
                )
            if len(lengths) * int(lengths.max()) > MOST_PADDED:
                raise ValueError(
                    f"{PACKED}: {len(lengths)} sequences, the longest of {int(lengths.max())}: trace fewer"
                )
            self.packed = torch.arange(int(lengths.max())) < lengths[:, None]
            return self.packed
        if len(shape) == 1:
            shape = (1, shape[0])
        if len(shape) == 2 and self.shapes.get("attention_mask", ()) in (shape, shape[1:]):
            given = store.read(self.names["attention_mask"])
            if bool(((given == 0) | (given == 1)).all()):  # otherwise a sentence of its own follows
                return given.bool().reshape(shape)
        return torch.ones(shape if len(shape) == 2 else (1, 1), dtype=torch.bool)

    def _form(self, name: str, stored: str) -> Form:
        shape, size = self.shapes[stored], tuple(self.mask.shape)
        wanted = expected_shape(name, self.config, size)
        letters = "" if name.startswith(GRADIENT) else " ".join(SHAPES[row_of(name)])
        heads, head_size = self.config.num_attention_heads, self.config.head_size
        tokens = int(self.mask.sum())
        if shape == wanted:
            return Form(stored, shape)
        if name == "loss" and shape in ((1,), (1, 1)):
            return Form(stored, (), lambda x: x.reshape(()), rowwise=False)
        if letters == "B H S K":
            split = (*size, heads, head_size)
            if shape in (split, (*size, heads * head_size)):
                return Form(stored, wanted, lambda x: x.reshape(len(x), *split[1:]).transpose(1, 2))
            if size[0] == 1 and shape in (split[1:], (size[1], heads * head_size)):
                return Form(stored, wanted, lambda x: x.reshape(split).transpose(1, 2), rowwise=False)
            if shape in ((tokens, heads, head_size), (tokens, heads * head_size)):
                return Form(
                    stored, wanted, lambda x: self._unpack(x.reshape(tokens, *split[2:])).transpose(1, 2), False
                )
        if letters.startswith("B") and size[0] == 1 and shape == wanted[1:]:
            return Form(stored, wanted, lambda x: x[None], rowwise=False)
        if letters.startswith("B S") and shape == (tokens, *wanted[2:]):
            return Form(stored, wanted, lambda x: self._unpack(x, IGNORE if name == "labels" else 0), rowwise=False)
        if name == "logits" and self.labels is not None and self.labels.shape == self.mask.shape:
            asked = (self.labels != IGNORE) & self.mask
            if shape == (int(asked.sum()), *wanted[2:]):
                self.asked = asked
                return Form(stored, wanted, lambda x: self._place(x, asked, 0), rowwise=False)
        return Form(stored, shape)

    def _two_layouts(self, name: str, form: Form) -> None:
        """With as many heads as positions, B H S K and B S H K (or H S K and S H K) are one shape."""
        heads, length = self.config.num_attention_heads, self.mask.shape[1]
        stored = self.shapes[form.stored]
        if SHAPES.get(row_of(name)) != ["B", "H", "S", "K"] or heads != length or len(stored) == 2 or heads == 1:
            return
        if stored == form.shape:
            self.forms[name] = replace(form, layout="B H S K")
            self.others[name] = replace(form, layout="B S H K", turn=lambda x: x.transpose(1, 2))
        elif stored == form.shape[1:]:
            self.forms[name] = replace(form, layout="S H K")
            self.others[name] = replace(form, layout="H S K", turn=lambda x: x[None])

    def _offer(self, unknown: list[str], store: Store) -> str:
        """The end of a sentence: which names of the table the unknown ones may stand for, by shape, likeness and order.
        "" if no shape fits.
        """
        order = sorted(unknown, key=lambda name: store.header[name].get("data_offsets", [0]))
        first: dict[str, str] = {}  # rule → the first name that it stands for
        for name in order:
            first.setdefault(re.sub(r"\d+", NUMBER, name, count=1), name)
        absent = [name for name in expected_names(self.config) if name not in self.names]
        rows = list(dict.fromkeys(row_of(name) for name in absent if not name.startswith(GRADIENT)))
        scores = {}
        for place, (rule, stored) in enumerate(first.items()):
            for number, row in enumerate(rows):
                name = row.replace(".N.", ".0.")
                wanted = expected_shape(name, self.config, tuple(self.mask.shape))
                whole = not store.header[stored]["dtype"].startswith(("F", "BF"))
                if (NUMBER in rule) != (".N." in row) or whole != (row in INPUTS) or not self.shapes[stored]:
                    continue
                if ("input_ids" not in self.names and row in INPUTS) or self._form(name, stored).shape == wanted:
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

    def _unpack(self, x: Tensor, filler: int = 0) -> Tensor:
        return self._place(x, self.mask, filler)

    def _place(self, x: Tensor, where: Tensor, filler: int) -> Tensor:
        result = x.new_full((*where.shape, *x.shape[1:]), filler)
        result[where] = x
        return result


def _known_names(header: Iterable[str], config: BertConfig) -> tuple[dict[str, str], list[str]]:
    """Name in the table → name in the store, and the names in the store that are no trace's. Raises ValueError if two
    are one tensor's.
    """
    known = set(expected_names(config))
    result: dict[str, str] = {}
    unknown = []
    for stored in header:
        name = stored
        if stored.startswith(GRADIENT):
            for old, new in OLD_NAMES.items():
                name = name.replace(old, new)
        if name in result:
            raise ValueError(f"{shown(stored)} and {shown(result[name])} are the same tensor: leave one out")
        if name in known:
            result[name] = stored
        elif stored != PACKED and not stored.startswith(EXTRA):
            unknown.append(stored)
    return result, unknown


def _unknown(names: list[str], config: BertConfig) -> str:
    known = expected_names(config)
    listed = ", ".join(_with_guess(name, known) for name in sorted(names)[:12])
    more = f" and {len(names) - 12} more" if len(names) > 12 else ""
    return (
        f"no trace of this model has {listed}{more}. minibert/parity/README.md lists the names; a tensor of your own "
        f"may be called {EXTRA}…, and is then not compared; --names FILE says what the names of a port stand for"
    )


def _with_guess(name: str, known: Iterable[str]) -> str:
    guesses = difflib.get_close_matches(name, known, 1, 0.8)
    return f"{shown(name)} (is it {guesses[0]}?)" if guesses else shown(name)


def shown(text: Any) -> str:
    """A text from a file, with what is not printable escaped: a line feed could look like a verdict of ours."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in str(text))


def _alike(rule: str, row: str) -> float:
    """How much a port's name looks like one of ours, from 0 to 1."""
    ours = row.rpartition(".")[2]
    words = re.findall("[a-z]+", rule.lower())
    if ours in ("query", "key", "value") and ours[0] in words:
        return 1.0
    return max(difflib.SequenceMatcher(None, theirs, ours).ratio() for theirs in (*words, "_".join(words), ""))


def read_names(path: Path) -> dict[str, str | None]:
    """What the names of a port stand for, from a JSON object: its name → ours, or null for what is not compared. {N} is
    a layer's number. Raises OSError or ValueError, naming the file.
    """
    require_file(path, "a JSON object of names")
    names = read_json(path)
    for theirs, ours in names.items():
        rows = {name for name in SHAPES if name != "gradient.NAME"}
        if ours is not None and (not isinstance(ours, str) or row_of(ours.replace(NUMBER, "N")) not in SHAPES):
            raise ValueError(f"{path}: {shown(theirs)} stands for {_with_guess(str(ours), rows)}, which no trace has")
        if isinstance(ours, str) and (NUMBER in theirs) != (".N." in ours or NUMBER in ours):
            raise ValueError(f"{path}: {shown(theirs)} and {shown(ours)}: both have {NUMBER} for a layer, or neither")
    return names


class Renamed:
    """A store whose tensors have our names. Raises ValueError if a name stands for nothing in it, or two for one."""

    def __init__(self, store: Store, names: dict[str, str | None]) -> None:
        self.store, self.metadata = store, store.metadata
        self.stored: dict[str, str] = {}
        rules = {theirs: re.compile(re.escape(theirs).replace(re.escape(NUMBER), r"(\d+)")) for theirs in names}
        unused = set(names)
        for stored in store.header:
            name = stored
            for theirs, rule in rules.items():
                if (match := rule.fullmatch(stored)) is not None:
                    unused.discard(theirs)
                    ours = names[theirs] or EXTRA + stored
                    name = re.sub(r"\{N\}|(?<=\.)N(?=\.)", match[1], ours) if match.groups() else ours
            if name in self.stored:
                raise ValueError(f"--names: {shown(stored)} and {shown(self.stored[name])} are both {shown(name)}")
            self.stored[name] = stored
        if unused:
            raise ValueError(f"--names: there is no tensor {', '.join(map(shown, sorted(unused)))}")
        self.header = {name: store.header[stored] for name, stored in self.stored.items()}

    def read(self, name: str) -> Tensor:
        return self.store.read(self.stored[name])

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        return self.store.rows(self.stored[name], start, stop)
