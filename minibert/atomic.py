"""Files and folders that appear whole or not at all.

They are written under a name that nobody reads, brought to the disk, and renamed, which the file system does in one
step. Whatever goes wrong before that (a full disk, an exception, SIGKILL), what was there before stays as it was.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SCRATCH = ".new-"  # how the names of unfinished files and folders begin


@contextmanager
def scratch_folder(parent: Path) -> Iterator[Path]:
    """An empty folder in `parent`, for this block alone. It is removed at the end, however the block ends."""
    folder = Path(tempfile.mkdtemp(prefix=SCRATCH, dir=parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def whole_file(target: Path) -> Iterator[Path]:
    """A path to write a file to. When the block ends without an error, the file takes the place of `target`."""
    with scratch_folder(target.parent) as scratch:
        yield scratch / target.name
        to_disk(scratch)
        os.replace(scratch / target.name, target)
    to_disk(target.parent, files=False)


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A folder to fill. When the block ends without an error, it becomes `target`, which must not exist yet."""
    with scratch_folder(target.parent) as scratch:
        folder = scratch / target.name
        folder.mkdir()
        yield folder
        to_disk(folder)
        os.rename(folder, target)
    to_disk(target.parent, files=False)


def to_disk(folder: Path, *, files: bool = True) -> None:
    """Wait until the files of a folder, and their names, would survive a power cut. files=False: the names alone."""
    for path in folder.iterdir() if files else ():
        if path.is_file():
            with open(path, "rb+") as file:
                os.fsync(file.fileno())
    if os.name == "posix":  # Windows opens no folders
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
