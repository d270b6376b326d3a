"""View 3: which words the answer depends on. Two experiments with ordinary passes: no gradient, nothing approximate.

Both are needed. In "Paris is the [MASK] of France" no single word is missed much, because the others stand in for it;
one word alone shows what it can do.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minibert.masked_lm import BertForMaskedLM
from minibert.packing import PackedBatch
from minibert.study.vocabulary import Vocabulary

MOST_TOKENS = 8192  # of all the copies of the text in one experiment; above it, neighbouring words go together
TOKENS_AT_ONCE = 2048


@dataclass(frozen=True)
class Change:
    """log p of the answer in this experiment, minus log p of it in the experiment's starting point, in nats. `winner`
    is the best word in the experiment.
    """

    nats: float
    winner: str


@dataclass(frozen=True)
class Influence:
    """One word, or a group of neighbours: the places of its pieces, and for each asked place what it does there."""

    places: list[int]
    hidden: list[Change]
    alone: list[Change]


def neighbours(groups: Sequence[list[int]], length: int) -> list[list[int]]:
    """The groups themselves while one copy of the text for each stays within MOST_TOKENS, else runs of neighbours."""
    size = -(-len(groups) // max(1, MOST_TOKENS // length))
    return [[place for group in groups[i : i + size] for place in group] for i in range(0, len(groups), size or 1)]


def influence(
    model: BertForMaskedLM,
    ids: Sequence[int],
    segments: Sequence[int],
    groups: Sequence[list[int]],
    positions: Sequence[int],
    answers: Sequence[int],
    mask_id: int,
    vocabulary: Vocabulary,
    watch: Callable[[list[list[int]]], Sequence[list[int]]] = lambda batches: batches,
) -> list[Influence]:
    """For each group of places, and for the answer at each position (M of both):

        hidden = log p(answer | the text without the group) − log p(answer | the text)
        alone  = log p(answer | the group alone) − log p(answer | no word at all)

    "Without" and "no word" mean: the mask token stands there. Added tokens always stay. A word that helps has a
    negative `hidden` and a positive `alone`. `watch` goes through the batches, and may show how far they are.
    """
    hideable = {place for group in groups for place in group}
    nothing = [mask_id if place in hideable else token for place, token in enumerate(ids)]
    rows = [list(ids), nothing]
    for group in groups:
        rows.append([mask_id if place in group else token for place, token in enumerate(ids)])
        rows.append([token if place in group else nothing[place] for place, token in enumerate(ids)])
    size = max(1, TOKENS_AT_ONCE // max(len(ids), 8 * len(positions)))
    values, winners = [], []
    for batch in watch([list(range(len(rows)))[i : i + size] for i in range(0, len(rows), size)]):
        value, winner = _answers(model, [rows[number] for number in batch], segments, positions, answers, vocabulary)
        values.append(value)
        winners += winner.tolist()
    log_p = torch.cat(values)  # (rows, M)
    change = log_p[2:] - log_p[:2].repeat(len(groups), 1)  # to the whole text, and to no word, in turn
    changes = [
        [Change(nats, vocabulary.name(token)) for nats, token in zip(one, best, strict=True)]
        for one, best in zip(change.tolist(), winners[2:], strict=True)
    ]
    return [Influence(group, changes[2 * n], changes[2 * n + 1]) for n, group in enumerate(groups)]


def _answers(
    model: BertForMaskedLM,
    rows: list[list[int]],
    segments: Sequence[int],
    positions: Sequence[int],
    answers: Sequence[int],
    vocabulary: Vocabulary,
) -> tuple[Tensor, Tensor]:
    """log p of the answers, and the best word, at each position of each row: both (R, M)."""
    device = model.embeddings.word.weight.device
    batch = PackedBatch.from_lists(rows, [list(segments)] * len(rows), device=device)
    starts = torch.arange(len(rows), device=device)[:, None] * len(segments)
    places = starts + torch.tensor(positions, device=device)  # (R, M)
    with torch.inference_mode():
        log_p = model.predict(batch, places.flatten()).float().log_softmax(-1).unflatten(0, places.shape)  # (R, M, V)
    wanted = torch.tensor(answers, device=device).expand(len(rows), -1)[..., None]  # (R, M, 1)
    return log_p.gather(-1, wanted)[..., 0].cpu(), vocabulary.only_words(log_p, -torch.inf).argmax(-1).cpu()
