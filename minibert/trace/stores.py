"""Where the tensors of a trace are: a safetensors file, a .npz file, or a folder of .npy files. And under which names,
if these are a port's own.

Each store has a header (name → dtype and shape, as safetensors writes them), the metadata, and reads one tensor at a
time. No store opens a pickle.
"""

import difflib
import re
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Protocol

import torch
from torch import Tensor

from minibert.checkpoint.files import parse_json, read_json, stamp
from minibert.checkpoint.reading import SafetensorsFile
from minibert.trace.table import SHAPES, row_of, shown

METADATA = "metadata"  # the name of a .npz's entry, and of a folder's JSON file
NUMPY_KINDS = {"f8": "F64", "f4": "F32", "f2": "F16", "i8": "I64", "i4": "I32", "i2": "I16"}
NUMPY_KINDS |= {"i1": "I8", "u1": "U8", "b1": "BOOL"}


class Store(Protocol):
    header: dict[str, dict[str, Any]]
    metadata: dict[str, str]

    def read(self, name: str, /) -> Tensor: ...


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
    return Arrays(path) if path.suffix == ".npz" or zipfile.is_zipfile(path) else SafetensorsFile(path)


def require_file(path: Path, what: str) -> None:
    """Raise OSError unless `path` is a regular file. A pipe can be read only once, and reading it might never end."""
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder, and should be {what}")
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file; it should be {what}")
    if not path.is_file():
        raise OSError(f"{path} is a pipe or a device, and should be {what}: write it to a file first")


class Arrays:
    """numpy's .npz, or a folder of .npy files. The metadata are one JSON object of strings: the entry `metadata` of a
    .npz (numpy.savez(…, metadata=json.dumps(…))), or metadata.json in the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.folder = path, path.is_dir()
        self.stamps: dict[Path, tuple[int, ...]] = {}  # what was there when it was opened, and must still be
        with _damaged(path):
            names = self._names()
        self.header = {name: self._header(name) for name in names if name != METADATA or self.folder}
        file = path / f"{METADATA}.json"
        with _damaged(file if self.folder else path):
            if self.folder:
                raw = file.read_bytes() if file.is_file() else b"{}"
            else:
                raw = str(self._load(METADATA)).encode() if METADATA in names else b"{}"
            self.metadata = {key: str(value) for key, value in parse_json(raw).items()}

    def _names(self) -> list[str]:
        if self.folder:
            return sorted(file.stem for file in self.path.glob("*.npy"))
        with zipfile.ZipFile(self.path) as archive:
            names = [name.removesuffix(".npy") for name in archive.namelist()]
        if len(names) != len(set(names)):
            raise ValueError("a name stands there twice")
        return names

    @contextmanager
    def _open(self, name: str) -> Iterator[IO[bytes]]:
        """The .npy file of a tensor. An error within the block names it."""
        path = self.path / f"{name}.npy" if self.folder else self.path
        with _damaged(path):
            if self.stamps.setdefault(path, stamp(path)) != stamp(path):
                raise ValueError("it has changed since it was opened")
            if self.folder:
                with open(path, "rb") as file:
                    yield file
            else:
                with zipfile.ZipFile(path) as archive, archive.open(f"{name}.npy") as entry:
                    yield entry

    def _header(self, name: str) -> dict[str, Any]:
        """The dtype and the shape of a tensor, of which only the start is read."""
        from numpy.lib import format as npy

        with self._open(name) as file:
            read = npy.read_array_header_1_0 if npy.read_magic(file) == (1, 0) else npy.read_array_header_2_0
            shape, _, dtype = read(file)
            if dtype.str[1:] not in NUMPY_KINDS or dtype.str[0] == ">":
                raise ValueError(
                    f"an array of the dtype {dtype.str!r}: make it a float32 or int64 array of this byte order"
                )
        return {"dtype": NUMPY_KINDS[dtype.str[1:]], "shape": [int(size) for size in shape]}

    def _load(self, name: str) -> Any:
        import numpy

        with self._open(name) as file:
            return numpy.lib.format.read_array(file, allow_pickle=False)

    def read(self, name: str) -> Tensor:
        return torch.from_numpy(self._load(name))


@contextmanager
def _damaged(path: Path) -> Iterator[None]:
    """Whatever the libraries say of damaged bytes is a ValueError that names the file."""
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) and error.filename:  # nothing there, or not to be read
            raise
        raise ValueError(f"{path}: not a whole set of numpy arrays and metadata: {error}") from error


# ------------------------------------------------------------------------------------------------ names of a port's own

NUMBER = "{N}"  # stands for a layer's number in a port's names
EXTRA = "extra."  # Tensors whose names begin so belong to the port alone.


def with_guess(name: str, known: Iterable[str]) -> str:
    guesses = difflib.get_close_matches(name, known, 1, 0.8)
    return f"{shown(name)} (is it {guesses[0]}?)" if guesses else shown(name)


def read_names(path: Path) -> dict[str, str | None]:
    """What the names of a port stand for, from a JSON object: its name → ours, or null for what is not compared. {N} is
    a layer's number. Raises OSError or ValueError, naming the file.
    """
    require_file(path, "a JSON object of names")
    names = read_json(path)
    rows = [name for name in SHAPES if name != "gradient.NAME"]
    for theirs, ours in names.items():
        if ours is None:
            continue
        if not isinstance(ours, str) or row_of(ours.replace(NUMBER, "N")) not in SHAPES:
            raise ValueError(f"{path}: {shown(theirs)} stands for {with_guess(str(ours), rows)}, which no trace has")
        if (NUMBER in theirs) != (".N." in ours or NUMBER in ours):
            raise ValueError(f"{path}: {shown(theirs)} and {shown(ours)}: both have {NUMBER} for a layer, or neither")
    return names


def renamed(stored: Iterable[str], names: dict[str, str | None]) -> dict[str, str]:
    """What each name in a store stands for. Raises ValueError if one of `names` stands for nothing in it."""
    rules = {theirs: re.compile(re.escape(theirs).replace(re.escape(NUMBER), r"(\d+)")) for theirs in names}
    result, unused = {name: name for name in stored}, set(names)
    for name in result:
        for theirs, rule in rules.items():
            if (match := rule.fullmatch(name)) is not None:
                unused.discard(theirs)
                ours = names[theirs] or EXTRA + name
                result[name] = re.sub(r"\{N\}|(?<=\.)N(?=\.)", match[1], ours) if match.groups() else ours
    if unused:
        raise ValueError(f"--names: there is no tensor {', '.join(map(shown, sorted(unused)))}")
    return result
