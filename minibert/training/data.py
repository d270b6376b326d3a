"""Token files to training examples: an epoch is cut, shuffled into steps, and masked; and each rank gets its share.

An epoch goes through each text as often as its weight says. Each pass cuts the text at other places, so that a word is
seen with other neighbours. Most of the text becomes rows that run on over the ends of lines. Some of it becomes rows of
one line each, as a user's text will be. Every token of a pass is in exactly one row.

The rows follow from the token files, the seed and the epoch; a mask from the seed, the epoch and the number of the
example. Nothing else is remembered. So any process can make any example, in any order, and it is the same one.
"""

import math
import os
import signal
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from itertools import count, islice
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from tokenizers import Tokenizer
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from minibert.checks import find_device
from minibert.masking import example_generator, mask_packed
from minibert.packing import PackedBatch
from minibert.tokenizer import count_ids, require_id, special_ids
from minibert.training.processes import end_with_parent
from minibert.training.settings import Settings
from minibert.training.tokens import Lines, TokenFile

REGION = 1000  # tokens: neighbouring lines that on one pass all stand alone, or all run on


@dataclass(frozen=True)
class Example:
    """Rows to learn from."""

    batch: PackedBatch  # what the model sees, some tokens masked
    positions: Tensor  # (M,): of the tokens that it is asked about, counted from 0 to T − 1
    targets: Tensor  # (M,): the ids that were there

    def to(self, device: torch.device) -> "Example":
        """The same on another device. CUDA fetches it by itself, from pinned memory, and nobody waits."""

        def move(x: Tensor) -> Tensor:
            return (x.pin_memory() if device.type == "cuda" and x.is_cpu else x).to(device, non_blocking=True)

        parts: dict[str, Any] = {one.name: getattr(self.batch, one.name) for one in fields(self.batch)}
        parts |= {name: move(x) for name, x in parts.items() if isinstance(x, Tensor)}
        return Example(PackedBatch(**parts), move(self.positions), move(self.targets))


class Cuts(NamedTuple):
    """Where the E examples of an epoch are in the token files."""

    file: Tensor  # (E,) int32: number of the file
    start: Tensor  # (E,) int64: its first token there
    length: Tensor  # (E,) int32: how many tokens, without [CLS] and [SEP]


@dataclass
class Corpus:
    """The examples of every epoch. A row has at most `max_length` tokens, [CLS] and [SEP] included. About the share
    `short_fraction` of the rows are one line alone, or a part of one that is longer than a row.

    With weight 2.5, an epoch goes through a text twice, and once more through half of its rows.
    """

    files: Sequence[TokenFile]
    tokenizer: Tokenizer
    max_length: int
    short_fraction: float
    tokens_per_step: int
    seed: int
    _latest: tuple[int, Cuts] | None = field(default=None, init=False, repr=False)

    def steps(self, epoch: int) -> Iterator[list[int]]:
        """The numbers of the examples of each step. All examples of the epoch come, in random order. Each step has
        about tokens_per_step tokens, the last one too.
        """
        order = torch.randperm(len(self._cuts(epoch).length), generator=example_generator(self.seed, epoch, -1))
        lengths = self._cuts(epoch).length[order] + 2
        before = lengths.cumsum(0).sub_(lengths)
        total = int(lengths.sum())
        steps = math.ceil(total / self.tokens_per_step)
        sizes = before.mul_(steps).floor_divide_(total).bincount(minlength=steps).tolist()
        del lengths, before  # an epoch may have many examples
        for numbers in order.split([size for size in sizes if size]):
            yield numbers.tolist()

    def lengths(self, epoch: int, numbers: Sequence[int]) -> list[int]:
        """How many tokens each example has, [CLS] and [SEP] included."""
        return (self._cuts(epoch).length[torch.tensor(numbers, dtype=torch.int64)] + 2).tolist()

    def examples(self, epoch: int, numbers: Sequence[int]) -> Example:
        """The examples with these numbers as one packed batch, masked by BERT's recipe."""
        which = torch.tensor(numbers, dtype=torch.int64)
        places = zip(*(column[which].tolist() for column in self._cuts(epoch)), strict=True)
        rows = [self.files[file].tokens[start : start + length] for file, start, length in places]
        return masked_rows(rows, [example_generator(self.seed, epoch, number) for number in numbers], self.tokenizer)

    def _cuts(self, epoch: int) -> Cuts:
        if self._latest is None or self._latest[0] != epoch:
            self._latest = epoch, self._cut(epoch)
        return self._latest[1]

    def _cut(self, epoch: int) -> Cuts:
        parts: list[Cuts] = []
        for number, file in enumerate(self.files):
            generator = example_generator(self.seed, epoch, -2 - number)  # examples count from 0, and −1 is their order
            whole, share = divmod(file.weight, 1)
            for again in range(int(whole) + (share > 0)):
                start, length = cut_into_rows(file, self.max_length - 2, self.short_fraction, generator)
                if again == int(whole):
                    rows = int(share * len(start) + torch.rand(1, generator=generator).item())  # right on average
                    some = torch.randperm(len(start), generator=generator)[:rows]
                    start, length = start[some], length[some]
                parts.append(Cuts(torch.full_like(length, number), start, length))
        cuts = Cuts(*(torch.cat(columns) for columns in zip(*parts, strict=True)))
        if not len(cuts.length):
            raise ValueError("an epoch of these weights has no row: give the texts larger weights")
        return cuts


def cut_into_rows(lines: Lines, room: int, short_fraction: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Cut lines into R rows of at most `room` tokens. Returns the first token (R,) int64 and the number of tokens (R,)
    int32 of each row. Every token is in exactly one row.
    """
    begin, end = lines.starts[:-1], lines.starts[1:]  # (L,)
    total = int(end[-1])
    # Of the text, the share whose rows are `short_fraction` of all rows: the rows of lone lines are shorter, and more.
    if_alone = short_fraction * total / room
    if_running = (1 - short_fraction) * int(((end - begin + room - 1) // room).sum())
    share = if_alone / (if_alone + if_running)
    regions = torch.rand(total // REGION + 2, generator=generator) < share
    alone = regions[(begin + torch.randint(REGION, (1,), generator=generator)) // REGION]  # (L,)

    # A span is a line that stands alone, or all lines from one of these to the next.
    new = alone.clone()
    new[0] = True
    new[1:] |= alone[:-1]
    first = begin[new]  # (spans,)
    stop = torch.cat([first[1:], end[-1:]])
    fresh = torch.randint(1, room + 1, first.shape, generator=generator)
    head = torch.where(alone[new], room, fresh).minimum(stop - first)  # its first row; the others have all the room

    rows = 1 + (stop - first - head + room - 1) // room
    span = torch.arange(len(rows)).repeat_interleave(rows)  # (R,)
    nth = torch.arange(len(span)) - (rows.cumsum(0) - rows)[span]
    row_stop = (first + head)[span] + nth * room
    row_start = torch.where(nth == 0, first[span], row_stop - room)
    return row_start, (row_stop.minimum(stop[span]) - row_start).int()


def masked_rows(rows: Sequence[Tensor], generators: Sequence[torch.Generator], tokenizer: Tokenizer) -> Example:
    """Rows of ids, each put between [CLS] and [SEP], as one packed batch, masked by BERT's recipe with the row's own
    generator. A random token is one of the tokenizer's: a model may have more rows than there are tokens.
    """
    cls, sep, mask = (torch.tensor([require_id(tokenizer, token)]) for token in ("[CLS]", "[SEP]", "[MASK]"))
    ids = torch.cat([part for row in rows for part in (cls, row.long(), sep)])  # (T,)
    lengths = [len(row) + 2 for row in rows]
    special = torch.isin(ids, torch.tensor(special_ids(tokenizer)))
    known = count_ids(tokenizer)
    masked = mask_packed(ids, special, lengths, generators, vocab_size=known, mask_token_id=int(mask))
    positions = (masked.labels >= 0).nonzero().flatten()  # (M,)
    return Example(PackedBatch.from_flat(masked.input_ids, lengths), positions, masked.labels[positions])


# ---------------------------------------------------------------------------------------------------- who computes what


@dataclass(frozen=True)
class Ranks:
    """The processes of a run, in torch's words its ranks: one alone, or several that torchrun started. Each holds a
    whole copy of the model and computes a share of every batch. The first one writes the files.
    """

    rank: int = 0  # number of this process, from 0
    size: int = 1
    device: str = "cpu"  # of this process

    @property
    def first(self) -> bool:
        return self.rank == 0

    def sum(self, *numbers: float) -> list[float]:
        """Each of the numbers, added up over all ranks, in float64."""
        if self.size == 1:
            return list(numbers)
        totals = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        dist.all_reduce(totals)
        return totals.tolist()

    def wait(self) -> None:
        """Wait until all ranks have come to this point."""
        self.sum(0.0)


ALONE = Ranks()


@contextmanager
def join(device: str = "auto") -> Iterator[Ranks]:
    """The ranks of this run, for as long as the block lasts, over nccl on GPUs and gloo on CPUs. device: as
    `checks.find_device` has it. Raises ValueError for a device that is not there.
    """
    size, local = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("LOCAL_RANK", "0"))
    where = find_device(device)
    if size == 1:
        yield Ranks(device=str(where))
        return
    if where.type == "cuda":
        if where.index is not None:
            raise ValueError(f"--device {device} names one GPU, and there are {size} processes: say --device cuda")
        if local >= torch.cuda.device_count():
            raise ValueError(f"process {local} of this machine has no GPU: there are {torch.cuda.device_count()}")
        where = torch.device("cuda", local)
        torch.cuda.set_device(where)
    dist.init_process_group("nccl" if where.type == "cuda" else "gloo")
    yield Ranks(dist.get_rank(), dist.get_world_size(), str(where))
    dist.destroy_process_group()  # not after an error: the others may be waiting for us, and would do so for ever
    # gloo's threads still hold the last tensors, and need Python to let go of them. Without a pause they may ask for it
    # when Python is shutting down already, which ends the process with SIGABRT.
    time.sleep(0.1)


class Share(NamedTuple):
    """What one rank computes of one step."""

    epoch: int
    step_in_epoch: int
    tokens: int  # in all passes
    passes: list[Example]


@dataclass(eq=False)
class Shares(Dataset["Share | Exception"]):
    """Makes the share of one rank: shares[epoch, step_in_epoch, the numbers of the step's rows]. Rows of like length
    come together, which wastes least on a GPU.
    """

    corpus: Corpus
    ranks: Ranks
    micro_tokens: int | None

    def __getitem__(self, step: tuple[int, int, list[int]]) -> "Share | Exception":
        try:
            return self._share(*step)
        except Exception as error:  # raised in a worker, DataLoader would wrap it in the text of its traceback
            return error

    def _share(self, epoch: int, step_in_epoch: int, numbers: list[int]) -> Share:
        length = dict(zip(numbers, self.corpus.lengths(epoch, numbers), strict=True))
        mine = sorted(numbers, key=lambda number: -length[number])[self.ranks.rank :: self.ranks.size]
        passes = [self.corpus.examples(epoch, some) for some in into_passes(mine, length, self.micro_tokens)]
        if not passes:  # fewer rows than ranks: take part all the same, with a row in which nothing is asked
            idle = self.corpus.examples(epoch, numbers[:1])
            passes = [Example(idle.batch, idle.positions[:0], idle.targets[:0])]
        return Share(epoch, step_in_epoch, sum(length[number] for number in mine), passes)


def into_passes(numbers: Sequence[int], length: Mapping[int, int], most: int | None) -> list[list[int]]:
    """The rows with these numbers, in their order, as passes of at most `most` tokens. None: one pass."""
    passes: list[list[int]] = []
    room = 0.0
    for number in numbers:
        if length[number] > room:
            passes.append([])
            room = math.inf if most is None else most
        passes[-1].append(number)
        room -= length[number]
    return passes


def shares(corpus: Corpus, settings: Settings, begin: tuple[int, int], left: int, ranks: Ranks) -> Iterator[Share]:
    """This rank's shares of `left` steps. begin: the epoch, and the step in it, of the first."""

    def steps() -> Iterator[tuple[int, int, list[int]]]:
        for epoch in count(begin[0]):
            for step_in_epoch, numbers in enumerate(corpus.steps(epoch)):
                if (epoch, step_in_epoch) >= begin:
                    yield epoch, step_in_epoch, numbers

    # On a GPU one process at least makes the next rows while the step is computed.
    workers = settings.workers or int(ranks.device.startswith("cuda"))
    loader: DataLoader[Share | Exception] = DataLoader(
        Shares(corpus, ranks, settings.micro_tokens),
        batch_size=None,
        sampler=islice(steps(), left),
        num_workers=workers,
        multiprocessing_context="fork" if workers else None,  # the token files stay mapped, and are not copied
        collate_fn=lambda share: share,
        worker_init_fn=_start_worker,
    )
    for share in loader:
        if isinstance(share, Exception):
            raise share
        yield share


def ahead(shares: Iterator[Share], device: torch.device) -> Iterator[Share]:
    """The shares on the device. Each is sent there before the one before it is computed."""
    if device.type == "cpu":
        yield from shares
        return
    sent: deque[Share] = deque()
    for share in shares:
        sent.append(share._replace(passes=[example.to(device) for example in share.passes]))
        if len(sent) == 2:
            yield sent.popleft()
    yield from sent


def _start_worker(_: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then ends its workers
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    end_with_parent()
