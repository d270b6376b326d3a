"""Where the tensors of a trace are: in a safetensors file, in a .npz file, or in a folder of .npy files.

Each store has a header (name → dtype and shape, as safetensors writes them), the metadata, and reads one tensor, or
some rows of it, at a time. No store opens a pickle.
"""

import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Protocol

import torch
from torch import Tensor

from minibert.checkpoint.files import parse_json
from minibert.checkpoint.reading import SafetensorsFile, stamp

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
    except (ValueError, TypeError, zipfile.BadZipFile, zlib.error, EOFError, LookupError, NotImplementedError) as error:
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
