"""Files: what is in one, and how one is written: whole, or not at all. (Nothing here needs torch.)"""

import hashlib
import json
import os
import secrets
import shutil
import signal
import stat
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

SCRATCH = ".new-"  # how the names of unfinished files and folders begin

# ------------------------------------------------------------------------------------------------------------- reading


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


def stamp(file: Path | int) -> tuple[int, ...]:
    """What changes when a file, by its path or its descriptor, is another one or is written to; () if there is none."""
    try:
        status = os.stat(file)
    except FileNotFoundError:
        return ()
    return status.st_ino, status.st_size, status.st_mtime_ns


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


LONGEST_LINE = 10_000_000  # bytes: what is longer has no lines, and would have to be in memory as a whole


def read_lines(file: BinaryIO, name: str) -> Iterator[list[str]]:
    """The lines of a text in UTF-8, in constant memory: in lists, each of those that have come together, so that a line
    which somebody types is there at once. The end of a line, Windows' too, and a byte-order mark are no part of it.

    Raises ValueError, naming the file and the line, for what is not UTF-8, a NUL, or a line above LONGEST_LINE.
    """
    number, rest = 0, b""
    while chunk := getattr(file, "read1", file.read)(2**16):
        *lines, rest = (rest + chunk).split(b"\n")
        if lines:
            yield [as_line(line, f"{name}, line {number + place}") for place, line in enumerate(lines, start=1)]
        number += len(lines)
        if len(rest) > LONGEST_LINE:
            break
    if rest:
        yield [as_line(rest, f"{name}, line {number + 1}")]


def as_line(raw: bytes, where: str) -> str:
    """The text of one line, without what editors put around it. Raises ValueError, saying where, as `read_lines`."""
    if len(raw) > LONGEST_LINE:
        raise ValueError(
            f"{where} is longer than {LONGEST_LINE} bytes, and a text has one paragraph a line: `fold -s` makes lines"
        )
    try:
        text = raw.decode().removeprefix("\ufeff").rstrip("\r\n")
    except UnicodeDecodeError as error:
        shown = raw[max(0, error.start - 20) : error.start + 20].decode(errors="backslashreplace")
        raise ValueError(
            f"{where} is not UTF-8: '{shown}' has the byte {raw[error.start]:#04x}. If the text is in Latin-1: "
            "iconv -f latin1 -t utf-8"
        ) from error
    if "\0" in text:
        raise ValueError(f"{where} has a NUL character in it: save the text as UTF-8")
    return text


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


# ------------------------------------------------------------------------------------------------------------- writing
# Files and folders that appear whole or not at all. They are written under a name that nobody reads, brought to the
# disk, and renamed, which the file system does in one step. Whatever goes wrong before that (a full disk, an exception,
# SIGKILL), what was there before stays as it was.


class NotOnDisk(OSError):
    """What was to be written is in its place, but a power cut might still take it back."""


def writable_place(path: str | os.PathLike[str]) -> Path:
    """Where a file of this name is written: if it is a symbolic link, at its target. To be asked before any work.

    Raises OSError for what must not be replaced (a folder, a pipe, a device), and for a file in no folder.
    """
    given, place = Path(path), Path(os.path.realpath(path))
    if given.is_dir():  # also the empty name
        raise IsADirectoryError(f"{os.fspath(path)!r} is a folder: the name of a file is needed")
    if place.is_symlink() or (given.exists() and not given.is_file()):
        raise OSError(f"{given} is a pipe, a device or a link to itself, and not replaced: choose another name")
    if not place.parent.is_dir():
        folder = place.parent if given.is_symlink() else given.parent
        raise FileNotFoundError(f"{given}: there is no folder {folder}: make it first")
    return place


@contextmanager
def scratch_folder(parent: Path) -> Iterator[Path]:
    """An empty folder in `parent`, for this block alone. It is removed at the end, however the block ends: by an error,
    by Ctrl-C, by SIGTERM; and after SIGKILL by the next such block in `parent`.
    """
    for leftover in parent.glob(f"{SCRATCH}minibert-*"):
        with suppress(OSError), locked(leftover, wait=False):  # only a process that lives holds its lock
            shutil.rmtree(leftover, ignore_errors=True)
    folder = parent / f"{SCRATCH}minibert-{secrets.token_hex(8)}"  # known before it is made: nothing comes between
    with ExitStack() as around:
        around.enter_context(_sigterm_cleans_up())
        around.callback(shutil.rmtree, folder, ignore_errors=True)
        while not folder.is_dir():  # again, if another process took it for a leftover before it was locked
            folder.mkdir(mode=0o700)
            with suppress(OSError):  # a file system without locks: then a leftover stays, too
                around.enter_context(locked(folder, wait=True))
        yield folder


@contextmanager
def locked(folder: Path, *, wait: bool) -> Iterator[None]:
    """Hold the lock of a folder. It ends with the block, and with this process, however that ends. Raises OSError if
    another one holds it and `wait` is not given, and where folders cannot be locked.
    """
    descriptor = os.open(folder, os.O_RDONLY)  # on Windows an OSError
    try:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield
    finally:
        os.close(descriptor)


@contextmanager
def _sigterm_cleans_up() -> Iterator[None]:
    """Within this block SIGTERM, if it would end the process at once, ends it as an exception does."""
    is_main = threading.current_thread() is threading.main_thread()  # Python gives signals to this thread alone
    if not is_main or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return

    def end(number: int, _: Any) -> None:
        signal.signal(number, signal.SIG_IGN)  # a second one does not stop the cleaning
        raise SystemExit(128 + number)  # the status that shells give to what a signal ended

    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextmanager
def whole_file(target: Path) -> Iterator[Path]:
    """A path to write a file to. When the block ends without an error, the file takes the place of `target`, with its
    mode and its owner. Raises OSError as `writable_place` does; NotOnDisk if the file is there, and may not stay.
    """
    target = writable_place(target)
    with scratch_folder(target.parent) as scratch:
        new = scratch / target.name
        yield new
        set_mode(new, target)
        to_disk(scratch)
        os.replace(new, target)
    with in_place(target):
        to_disk(target.parent, files=False)


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A folder to fill. When the block ends without an error, it becomes `target`, which must not exist yet."""
    with scratch_folder(target.parent) as scratch:
        folder = scratch / target.name
        folder.mkdir()
        yield folder
        for new in folder.iterdir():
            if new.is_file():
                set_mode(new, target / new.name)
        to_disk(folder)
        os.rename(folder, target)
    with in_place(target):
        to_disk(target.parent, files=False)


def set_mode(new: Path, target: Path) -> None:
    """A file that is replaced keeps its mode and its owner; a new one follows the umask, and not what the library that
    wrote it thinks right.
    """
    if target.exists():
        old = target.stat()
        with suppress(OSError, AttributeError):  # only root can give a file away; Windows knows no owners
            os.chown(new, old.st_uid, old.st_gid)
        new.chmod(stat.S_IMODE(old.st_mode))
    else:
        fresh = new.with_name(f"{SCRATCH}mode")
        fresh.touch()
        new.chmod(stat.S_IMODE(fresh.stat().st_mode))
        fresh.unlink()


def to_disk(folder: Path, *, files: bool = True) -> None:
    """Wait until the files of a folder, and their names, would survive a power cut. files=False: the names alone."""
    for path in folder.iterdir() if files else ():
        if path.is_file():
            with open(path, "rb+" if os.name == "nt" else "rb") as file:
                os.fsync(file.fileno())
    if os.name == "posix":  # Windows opens no folders
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def in_place(target: Path) -> Iterator[None]:
    """An error within this block comes after `target` has got its new content, and says so."""
    try:
        yield
    except OSError as error:
        raise NotOnDisk(f"{target}: it is written, but not known to be on the disk: {error}") from error
