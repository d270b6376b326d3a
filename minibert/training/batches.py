"""The batches of a run: which rows belong to which step, and who computes which of them."""

import math
import signal
from collections.abc import Iterator, Mapping, Sequence
from itertools import count, islice
from typing import Any, NamedTuple

from torch.utils.data import DataLoader, Dataset

from minibert.training.data import Corpus, Example
from minibert.training.ranks import Ranks
from minibert.training.saving import Progress
from minibert.training.settings import Settings
from minibert.training.workers import end_with_parent


class Share(NamedTuple):
    """What one rank computes of one step."""

    epoch: int
    step_in_epoch: int
    tokens: int  # in all passes
    passes: list[Example]


class Shares(Dataset["Share | Exception"]):
    """Makes the share of one rank: shares[epoch, step_in_epoch, the numbers of the step's rows]. Rows of like length
    come together, which wastes least on a GPU.
    """

    def __init__(self, corpus: Corpus, ranks: Ranks, micro_tokens: int | None) -> None:
        self.corpus = corpus
        self.rank, self.size = ranks.rank, ranks.size
        self.micro_tokens = micro_tokens

    def __getitem__(self, step: tuple[int, int, list[int]]) -> "Share | Exception":
        """An error is returned, not raised: DataLoader would wrap a worker's error in the text of its traceback."""
        try:
            return self.share(*step)
        except Exception as error:
            return error

    def share(self, epoch: int, step_in_epoch: int, numbers: list[int]) -> Share:
        length = dict(zip(numbers, self.corpus.lengths(epoch, numbers), strict=True))
        mine = sorted(numbers, key=lambda number: -length[number])[self.rank :: self.size]
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


def shares(corpus: Corpus, settings: Settings, progress: Progress, ranks: Ranks) -> Iterator[Share]:
    """This rank's shares of all the steps from `progress` on."""

    def steps(begin: tuple[int, int]) -> Iterator[tuple[int, int, list[int]]]:
        for epoch in count(begin[0]):
            for step_in_epoch, numbers in enumerate(corpus.steps(epoch)):
                if (epoch, step_in_epoch) >= begin:
                    yield epoch, step_in_epoch, numbers

    loader: DataLoader[Share | Exception] = DataLoader(
        Shares(corpus, ranks, settings.micro_tokens),
        batch_size=None,
        sampler=islice(steps((progress.epoch, progress.step_in_epoch)), settings.steps - progress.step),
        num_workers=settings.workers,
        multiprocessing_context="fork" if settings.workers else None,  # the token files stay mapped, and are not copied
        collate_fn=_as_it_is,
        worker_init_fn=_start_worker,
    )
    for share in loader:
        if isinstance(share, Exception):
            raise share
        yield share


def _as_it_is(share: Any) -> Any:
    return share


def _start_worker(_: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then ends its workers
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    end_with_parent()
