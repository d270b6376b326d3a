"""Locks: what one process does in a folder, no other does there at the same time."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

_held: set[IO[Any]] = set()  # the lock files of this process


@contextmanager
def locked(path: Path, *, wait: bool) -> Iterator[None]:
    """Hold the lock that the file `path` stands for. It ends with the block, and with this process, however that ends.

    Where another process holds it: wait for it, or raise BlockingIOError. Raises OSError where the system has no such
    locks.
    """
    try:
        import fcntl
    except ImportError as error:
        raise OSError(
            "training needs the locks of Linux or macOS (Python's module fcntl), and this system has none: on Windows, "
            "use WSL"
        ) from error
    with open(path, "w") as file:
        # Not lockf: its lock would end as soon as this process opened the file again and closed it.
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        _held.add(file)
        try:
            yield
        finally:
            _held.discard(file)


def _let_go() -> None:
    """A forked process shares the locks, and would go on holding them after its parent was killed."""
    for file in _held:
        file.close()
    _held.clear()


if hasattr(os, "register_at_fork"):  # Windows does not fork
    os.register_at_fork(after_in_child=_let_go)
