"""Files and folders that appear whole or not at all.

They are written under a name that nobody reads, brought to the disk, and renamed, which the file system does in one
step. Whatever goes wrong before that (a full disk, an exception, SIGKILL), what was there before stays as it was.
"""

import os
import secrets
import shutil
import signal
import stat
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

SCRATCH = ".new-"  # how the names of unfinished files and folders begin


class NotOnDisk(OSError):
    """What was to be written is in its place, but a power cut might still take it back."""


def writable_place(path: str | os.PathLike[str]) -> Path:
    """Where a file of this name is written: if it is a symbolic link, at its target. To be asked before any work.

    Raises OSError for what must not be replaced (a folder, a pipe, a device), and for a file in no folder.
    """
    given, place = Path(path), Path(os.path.realpath(path))
    if not os.fspath(path).strip() or given.is_dir():
        what = "is a folder" if os.fspath(path).strip() else "is empty"
        raise IsADirectoryError(f"{os.fspath(path)!r} {what}: it needs the name of a file")
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
