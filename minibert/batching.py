"""Many texts: those of like length are computed together, and the answers come in the order of the texts."""

from collections.abc import Iterator, Sequence

BATCH_TOKENS = 4096  # that are computed together, at most


def batches_by_length(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """The numbers of rows of these lengths, the short ones first, in groups of at most `batch_tokens` tokens. A row
    that is longer than that is a group of its own.
    """
    group: list[int] = []
    tokens = 0
    for number in sorted(range(len(lengths)), key=lambda number: lengths[number]):
        if group and tokens + lengths[number] > batch_tokens:
            yield group
            group, tokens = [], 0
        group.append(number)
        tokens += lengths[number]
    if group:
        yield group
