"""What is in a file: a JSON object that says nothing twice, a SHA-256, or something that should not be there."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """A ValueError within this block says which file it is about."""
    try:
        yield
    except ValueError as error:
        message = str(error)
        raise ValueError(message if message.startswith(str(path)) else f"{path}: {message}") from error


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises ValueError, naming the file, if it is not one, or gives a key twice."""
    try:
        return parse_json(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: not a proper JSON file: {looks_like(path) or error}") from error


def parse_json(raw: bytes) -> dict[str, Any]:
    """A JSON object from its bytes. Raises ValueError if it is not one, or gives a key twice."""
    try:
        values = json.loads(raw.decode("utf-8-sig"), object_pairs_hook=_no_key_twice)
    except RecursionError as error:
        raise ValueError(str(error)) from error
    if not isinstance(values, dict):
        raise ValueError(f"expected a JSON object, found {type(values).__name__}")
    return values


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        key, count = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"the key {key!r} stands there {count} times")
    return values


def looks_like(path: Path) -> str:
    """What a file is that should have been something else; "" if it is nothing well known."""
    with open(path, "rb") as file:
        start = file.read(200).lstrip()
    if not start:
        return "it is empty"
    if start.startswith(b"version https://git-lfs"):
        return "it is a Git-LFS pointer, not the file itself: run `git lfs pull`"
    if start[:1] == b"<":
        return "it is an HTML page: the download was answered with an error or a log-in page"
    if start.startswith((b"PK\x03\x04", b"\x80")):
        return "it is a pickle under another name, which minibert does not open"
    return ""
