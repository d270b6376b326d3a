"""What a run asks of the system: processes that tokenize, locks on folders, and memory that is kept.

Without torch: the processes that tokenize import this file, so that they start at once and stay small.
"""

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
from array import array
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from tokenizers import Tokenizer

_tokenizer: Tokenizer | None = None  # of a process, or a thread, that tokenizes


@contextmanager
def tokenizing(tokenizer_json: str, workers: int) -> Iterator[Executor]:
    """`workers` processes, or for one worker a thread, in which `encode` uses this tokenizer."""
    if workers == 1:
        pool: Executor = ThreadPoolExecutor(1, initializer=_set_tokenizer, initargs=(tokenizer_json,))
    else:  # spawn: a fork would take the threads of torch and of the tokenizer along
        spawn = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(workers, spawn, initializer=_start_process, initargs=(tokenizer_json,))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _set_tokenizer(tokenizer_json: str) -> None:
    global _tokenizer
    _tokenizer = Tokenizer.from_str(tokenizer_json)


def _start_process(tokenizer_json: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then ends its workers
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there is a process for each core already
    end_with_parent()
    _set_tokenizer(tokenizer_json)


def end_with_parent() -> None:
    """End this process as soon as the one that started it has ended. If that was killed, nobody else would do it."""
    threading.Thread(target=_wait_for_parent, daemon=True).start()


def _wait_for_parent() -> None:
    if parent := multiprocessing.parent_process():
        parent.join()
        os._exit(1)


def encode(lines: list[str], typecode: str) -> tuple["array[int]", "array[int]"]:
    """The ids of the lines end to end, and the length of each. A line without a token is no line.

    Raises ValueError if the tokenizer cannot encode them.
    """
    assert _tokenizer is not None
    ids, lengths = array(typecode), array("q")
    try:
        encodings = _tokenizer.encode_batch_fast(lines, add_special_tokens=False)
    except Exception as error:  # the library raises nothing more special
        raise ValueError(f"the tokenizer fails on the text: {error}") from error
    for encoding in encodings:
        if line := encoding.ids:
            ids.extend(line)
            lengths.append(len(line))
    return ids, lengths


# ---------------------------------------------------------------------------------------------------------------- locks


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
        raise OSError("training needs the locks of Linux or macOS (Python's fcntl): on Windows, use WSL") from error
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


# --------------------------------------------------------------------------------------------------------------- memory


MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1  # mallopt's numbers for M_MMAP_THRESHOLD and M_TRIM_THRESHOLD


def keep_freed_memory() -> None:
    """Let glibc keep freed memory for the next tensor. By default it gives large blocks back to Linux, and the first
    use of each new one costs page faults. Keeping them makes the peak somewhat higher.

    Nothing is changed if the user has set glibc's own variables, or where the C library is not glibc.
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    if "MALLOC_MMAP_THRESHOLD_" in os.environ or "MALLOC_TRIM_THRESHOLD_" in os.environ or "glibc.malloc." in tunables:
        return
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        # Blocks below the first threshold come from the heap, and the second keeps glibc from giving back its end.
        # glibc before 2.35 refuses more than 32 MB. Setting one threshold stops glibc from adapting the other, so the
        # second is set only where the first was accepted.
        if libc.mallopt(MMAP_THRESHOLD, 2**30) or libc.mallopt(MMAP_THRESHOLD, 2**25):
            libc.mallopt(TRIM_THRESHOLD, 2**31 - 1)
