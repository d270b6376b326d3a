"""Text files to token files: each line is tokenized once, and memory-mapped from then on.

A text is a file in UTF-8, or a .gz of one, with one paragraph a line. A line that occurs twice in it counts once. A
hundredth of the lines, chosen by their own content, is held out: it is never trained on, so the accuracy on it says
what the model has learnt and not what it remembers.

The token files of a text are in a folder named after it and its SHA-256, so that a text that has changed is a new one:

    train.tokens, held_out.tokens    the ids of all lines end to end, uint16 (uint32 if the vocabulary needs it)
    train.starts, held_out.starts    where each line begins, and the end, int64
    about.json                       the text, the tokenizer, the counts, and the SHA-256 of each file

A folder gets its name when all of it is on the disk (checkpoint/files.py). So what is there is complete, and a run that
is killed loses only the text that it was at.
"""

import glob
import gzip
import hashlib
import json
import math
import os
import shutil
import warnings
import zlib
from array import array
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import BinaryIO

import torch
from tokenizers import Tokenizer
from torch import Tensor
from tqdm import tqdm

from minibert.checkpoint.files import SCRATCH, read_lines, sha256, stamp, whole_folder
from minibert.tokenizer import as_tokenizer
from minibert.training.processes import encode, locked, tokenizing

FORMAT = "minibert-tokens 1"
KINDS = ("train", "held_out")
FILES = tuple(f"{kind}.{what}" for kind in KINDS for what in ("tokens", "starts"))
CHUNK = 200_000  # characters that a worker gets at a time
LARGEST_EPOCH = 10_000_000_000  # tokens: its rows are in memory, some 8 GB of them where a row has up to 128 tokens
WORTH_A_WORKER = 4_000_000  # bytes of text: with less, starting a process takes longer than it saves


@dataclass(frozen=True)
class Lines:
    """Tokenized lines, memory-mapped."""

    tokens: Tensor  # (N,) uint16 or uint32: all lines end to end, without [CLS] and [SEP]
    starts: Tensor  # (lines + 1,) int64: where each line begins, and N

    def __len__(self) -> int:
        return len(self.starts) - 1

    def line(self, number: int) -> Tensor:
        """The token ids of one line."""
        return self.tokens[self.starts[number] : self.starts[number + 1]]


@dataclass(frozen=True)
class TokenFile(Lines):
    """The lines of one text to train on, and those held out."""

    name: str
    weight: float  # how often the text comes up in an epoch
    held_out: Lines
    sha256: str  # of the text


@dataclass(frozen=True)
class Text:
    """A text file to train on."""

    name: str  # which no other text of the run has
    path: Path
    weight: float


def token_files(
    specs: Sequence[str], tokenizer: Tokenizer, folder: Path, *, workers: int | None = None
) -> list[TokenFile]:
    """The token files under `folder` of the texts that `specs` name (see `find_texts`), in that order. Those that are
    not there yet are made, by `workers` processes (default: one a core, or fewer for little text).

    Texts and token files are read once to check that they have not changed. If another process is making token files
    in `folder`, this one waits.

    Raises FileNotFoundError or ValueError for a text that cannot be had or that has no line to train on, for a text
    named twice, for weights that are not above 0 or make an epoch too large, and for files of another tokenizer.
    """
    # Not the caller's own: it may be set to cut what is long.
    tokenizer = Tokenizer.from_str(as_tokenizer(tokenizer).to_str())
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer_json = tokenizer.to_str()
    maker = hashlib.sha256(tokenizer_json.encode()).hexdigest()
    dtype = "uint16" if max(tokenizer.get_vocab().values()) < 2**16 else "uint32"

    texts = find_texts(specs)
    stamps = [stamp(text.path) for text in texts]
    digests = [sha256(text.path) for text in texts]
    places = [folder / f"{_stem(text.path)[:40]}-{digest[:16]}" for text, digest in zip(texts, digests, strict=True)]
    missing = [number for number, place in enumerate(places) if not _is_complete(place, maker)]
    if missing:
        size = sum(texts[number].path.stat().st_size for number in missing)
        workers = workers or max(1, min(os.cpu_count() or 1, size // WORTH_A_WORKER))
        folder.mkdir(parents=True, exist_ok=True)
        with (
            locked(folder / "lock", wait=True),
            tokenizing(tokenizer_json, workers) as pool,
            tqdm(total=size, desc="tokenizing", unit="B", unit_scale=True, leave=False) as progress,
        ):
            for unfinished in folder.glob(f"{SCRATCH}*"):  # of a process that was killed
                shutil.rmtree(unfinished)
            for number in missing:
                text, place = texts[number], places[number]
                if not _is_complete(place, maker):  # another process may have made it while this one waited
                    about = {"format": FORMAT, "tokenizer": maker, "dtype": dtype}
                    about |= {"text": str(text.path.resolve()), "text_sha256": digests[number]}
                    chunks = _chunks(_read_lines(text.path, stamps[number], progress))
                    _write(text, place, about, _encoded(chunks, dtype, pool, 3 * workers))
    files = [_open(place, text) for place, text in zip(places, texts, strict=True)]
    tokens = sum(max(1, file.weight) * len(file.tokens) for file in files)  # all rows are cut, also for a share of them
    if tokens > LARGEST_EPOCH:
        raise ValueError(
            f"an epoch of these weights is {tokens:.3g} tokens, more than {LARGEST_EPOCH:.3g}, and its rows must fit "
            "in memory: make the weights smaller (only their proportions matter), or train on the texts in turn"
        )
    return files


# -------------------------------------------------------------------------------------------------------- finding texts


def find_texts(specs: Sequence[str]) -> list[Text]:
    """The texts that `specs` name. Each is PATH or PATH:WEIGHT, where PATH is a file, a folder (all .txt and .gz in it
    and below, but nothing hidden) or a glob (** goes below). The weight, 1 if there is none, is that of each text
    found. If there is a path that has the whole spec as its name, colon and number included, that path is meant.

    A text has the name of its file, without .txt and .gz; or its whole path, if two would have the same name.
    """
    found: dict[Path, tuple[Path, float, str]] = {}
    for spec in specs:
        where, weight = _split(spec)
        for path in _paths(where):
            if path.resolve() in found:
                raise ValueError(
                    f"{path} is named twice, by {found[path.resolve()][2]} and by {spec}: a weight makes it count more"
                )
            found[path.resolve()] = (path, weight, spec)
    called = Counter(["all", *(_stem(path) for path, _, _ in found.values())])  # "all": the figures over all texts
    return [
        Text(_stem(path) if called[_stem(path)] == 1 else str(path), path, weight) for path, weight, _ in found.values()
    ]


def _split(spec: str) -> tuple[str, float]:
    where, _, number = spec.rpartition(":")
    try:
        weight = float(number)
    except ValueError:  # there is no weight; if there is a colon, it is the path's own
        where, weight = spec, 1.0
    if Path(spec).exists():  # as "part:2"; with a weight, "part:2:1"
        where, weight = spec, 1.0
    if not where.strip():
        raise ValueError(f"{spec!r} is not PATH or PATH:WEIGHT")
    if not 0 < weight < math.inf:
        raise ValueError(f"{spec}: weight {number} is not a number above 0; to leave a text out, do not name it")
    return where, weight


def _paths(where: str) -> list[Path]:
    path = Path(where)
    if path.is_dir():
        names = [name for name in glob.glob("**/*", root_dir=path, recursive=True) if name.endswith((".txt", ".gz"))]
        paths = [path / name for name in sorted(names)]
    else:
        paths = [path] if path.exists() else [Path(name) for name in sorted(glob.glob(where, recursive=True))]
    if not (files := [path for path in paths if path.is_file()]):
        if path.is_dir():
            raise FileNotFoundError(f"{where}: there is no .txt or .gz file in this folder")
        if no_folders := [path for path in paths if not path.is_dir()]:
            raise ValueError(f"{no_folders[0]} is not a file, and a text is read twice: save what comes from it in one")
        raise FileNotFoundError(f"{where}: no such text file")
    return files


def _stem(path: Path) -> str:
    return path.name.removesuffix(".gz").removesuffix(".txt")


# -------------------------------------------------------------------------------------------------------------- reading


def is_held_out(line: str) -> bool:
    """Whether a line is for evaluation: md5 of its bytes, as a number, is a multiple of 100."""
    return int(hashlib.md5(line.encode()).hexdigest(), 16) % 100 == 0


def _read_lines(path: Path, before: tuple[int, ...], progress: tqdm) -> Iterator[str]:
    """The lines of a text that are not blank, each once. Raises ValueError if its stamp is not the one that it had
    `before`, when its SHA-256 was taken.
    """
    seen: set[bytes] = set()  # digests: about 100 bytes for each line of the text
    with open(path, "rb") as raw:
        binary: BinaryIO = gzip.GzipFile(fileobj=raw) if path.suffix == ".gz" else raw  # type: ignore[assignment]
        try:
            at = 0
            for lines in read_lines(binary, str(path)):
                for line in map(str.strip, lines):
                    digest = hashlib.blake2b(line.encode(), digest_size=16).digest()
                    if line and digest not in seen:
                        seen.add(digest)
                        yield line
                progress.update(raw.tell() - at)
                at = raw.tell()
                if at > before[1]:
                    break
            if stamp(path) != before:
                raise ValueError(f"{path} was changed while it was read: try again when it is complete")
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise ValueError(f"{path}: not a text file in UTF-8 (or gzip of one): {error}") from error


def _chunks(lines: Iterable[str]) -> Iterator[tuple[str, list[str]]]:
    """The lines to train on and those held out, each kind in its order, about CHUNK characters at a time."""
    waiting: dict[str, list[str]] = {kind: [] for kind in KINDS}
    size = dict.fromkeys(KINDS, 0)
    for line in lines:
        kind = "held_out" if is_held_out(line) else "train"
        waiting[kind].append(line)
        size[kind] += len(line)
        if size[kind] >= CHUNK:
            yield kind, waiting[kind]
            waiting[kind], size[kind] = [], 0
    yield from waiting.items()


def _encoded(
    chunks: Iterable[tuple[str, list[str]]], dtype: str, pool: Executor, ahead: int
) -> Iterator[tuple[str, "array[int]", "array[int]"]]:
    """Each chunk's kind, ids and lengths, in order. At most `ahead` chunks are under way: a text may be larger than the
    memory.
    """
    typecode = {"uint16": "H", "uint32": "I"}[dtype]
    waiting: deque[tuple[str, Future[tuple[array[int], array[int]]]]] = deque()
    for kind, lines in chunks:
        waiting.append((kind, pool.submit(encode, lines, typecode)))
        if len(waiting) == ahead:
            first, future = waiting.popleft()
            yield first, *future.result()
    for kind, future in waiting:
        yield kind, *future.result()


# ---------------------------------------------------------------------------------------------------------- on the disk


def _is_complete(place: Path, maker: str) -> bool:
    """Whether the token files of a text are there, and whole. If they are damaged, it says so with a warning.

    maker: the SHA-256 of the tokenizer. Raises ValueError if another one made them.
    """
    if not place.exists():
        return False
    try:
        about = json.loads((place / "about.json").read_text())
        digests, other = about["sha256"], about["tokenizer"]
        whole = about["format"] == FORMAT and about["dtype"] in ("uint16", "uint32")
        whole &= type(about["text_sha256"]) is str
        whole = whole and all(sha256(place / name) == digests[name] for name in FILES)
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        whole = False
    if not whole:
        warnings.warn(f"{place}: these token files are damaged, and are made again", stacklevel=3)
        return False
    if other != maker:
        digests = f"SHA-256 {str(other)[:12]}, and now {maker[:12]}"
        raise ValueError(f"{place} was made with another tokenizer ({digests}): give another --tokens, or delete it")
    return True


def _write(
    text: Text, place: Path, about: Mapping[str, object], encoded: Iterable[tuple[str, "array[int]", "array[int]"]]
) -> None:
    """The token files of one text. `place` appears when they are complete."""
    counts = {kind: {"lines": 0, "tokens": 0} for kind in KINDS}
    with whole_folder(place) as new:
        with ExitStack() as stack:
            files = {name: stack.enter_context(open(new / name, "wb")) for name in FILES}
            for kind in KINDS:
                files[f"{kind}.starts"].write(array("q", [0]))
            for kind, ids, lengths in encoded:
                ends = array("q", accumulate(lengths, initial=counts[kind]["tokens"]))[1:]
                files[f"{kind}.tokens"].write(ids)
                files[f"{kind}.starts"].write(ends)
                counts[kind]["lines"] += len(lengths)
                counts[kind]["tokens"] += len(ids)
        if not counts["train"]["lines"]:
            raise ValueError(f"{text.path}: there is no text to train on in it")
        about = {**about, **counts, "sha256": {name: sha256(new / name) for name in FILES}}
        (new / "about.json").write_text(json.dumps(about, indent=2) + "\n")
        if place.exists():
            shutil.rmtree(place)  # damaged


def _open(place: Path, text: Text) -> TokenFile:
    about = json.loads((place / "about.json").read_text())

    def mapped(name: str, dtype: torch.dtype) -> Tensor:
        size = (place / name).stat().st_size // dtype.itemsize
        return torch.from_file(str(place / name), size=size, dtype=dtype) if size else torch.empty(0, dtype=dtype)

    dtype = getattr(torch, about["dtype"])
    train, held_out = (Lines(mapped(f"{kind}.tokens", dtype), mapped(f"{kind}.starts", torch.int64)) for kind in KINDS)
    return TokenFile(train.tokens, train.starts, text.name, text.weight, held_out, about["text_sha256"])
