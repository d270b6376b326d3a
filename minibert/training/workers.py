"""The processes that tokenize. They import this file and not torch, so that they start at once and stay small."""

import multiprocessing
import os
import signal
import threading
from array import array
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager

from tokenizers import Tokenizer


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


_tokenizer: Tokenizer | None = None  # the worker's


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
    parent = multiprocessing.parent_process()
    assert parent is not None
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
