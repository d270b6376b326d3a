"""Where the tensors of a trace are: in a safetensors file, in a .npz file, or in a folder of .npy files.

Each store has a header (name → dtype and shape, as safetensors writes them), the metadata, and reads one tensor, or
some rows of it, at a time. No store opens a pickle.
"""

import ast
import zipfile
from pathlib import Path
from typing import IO, Any, Protocol

import torch
from torch import Tensor

from minibert.checkpoint import SafetensorsFile
from minibert.files import parse_json

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
        self.header = {}
        try:
            for name in self._names():
                with self._open(name) as file:
                    self.header[name] = _npy_header(file)
            raw = self._metadata()
        except (ValueError, zipfile.BadZipFile, EOFError, KeyError, SyntaxError) as error:
            raise ValueError(f"{path}: not a whole set of numpy arrays: {error}") from error
        metadata = parse_json(raw)
        self.metadata = {key: value if isinstance(value, str) else str(value) for key, value in metadata.items()}

    def _names(self) -> list[str]:
        if self.path.is_dir():
            return sorted(file.stem for file in self.path.glob("*.npy"))
        with zipfile.ZipFile(self.path) as archive:
            names = [name.removesuffix(".npy") for name in archive.namelist()]
        if len(names) != len(set(names)):
            raise ValueError("a name stands there twice")
        return [name for name in names if name != METADATA]

    def _open(self, name: str) -> IO[bytes]:
        if self.path.is_dir():
            return open(self.path / f"{name}.npy", "rb")
        return zipfile.ZipFile(self.path).open(f"{name}.npy")

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

        if self.path.is_dir():
            return numpy.load(self.path / f"{name}.npy", mmap_mode="r", allow_pickle=False)
        with numpy.load(self.path, allow_pickle=False) as arrays:
            return arrays[name]

    def read(self, name: str) -> Tensor:
        return torch.from_numpy(self._load(name).copy())

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        return torch.from_numpy(self._load(name)[start:stop].copy())


def _npy_header(file: IO[bytes]) -> dict[str, Any]:
    """The dtype and the shape of a .npy file, of which only the start is read. Raises ValueError for anything else.

    The format: https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html
    """
    start = file.read(8)
    if start[:6] != b"\x93NUMPY" or start[6] not in (1, 2, 3):
        raise ValueError(f"an array that starts with {start!r} is not numpy's")
    length = int.from_bytes(file.read(2 if start[6] == 1 else 4), "little")
    if length > MOST_HEADER:
        raise ValueError(f"the header of an array claims {length} bytes")
    found = ast.literal_eval(file.read(length).decode("utf-8"))
    kind = str(found["descr"])
    if kind[1:] not in KINDS or kind[0] == ">":
        raise ValueError(f"an array of the dtype {kind!r}: make it a float32 or an int64 array of this byte order")
    return {"dtype": KINDS[kind[1:]], "shape": [int(size) for size in found["shape"]]}
