"""View 2: what the model would answer if it stopped early. The head reads every state, not the last one alone.

The head was trained on the last layer. How it reads an earlier state is a view, not a measurement.
Source: nostalgebraist, "interpreting GPT: the logit lens", 2020.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minibert.study.vocabulary import Vocabulary


@dataclass(frozen=True)
class Guess:
    token: str
    id: int
    probability: float


@dataclass(frozen=True)
class Followed:
    """One word at one step: its probability, and its rank among all words (1 is the best)."""

    probability: float
    rank: int


@dataclass(frozen=True)
class Step:
    after: str  # "embeddings", "layer 3 attention", "layer 3 feed-forward"
    best: list[Guess]
    answer: Followed
    targets: list[Followed]


@dataclass(frozen=True)
class Guesses:
    """All steps at one place. The answer is the best word of the last step."""

    position: int
    answer: Guess
    steps: list[Step]

    @property
    def first(self) -> str:
        """The step from which on the answer is the best word, to the end."""
        ranks = [step.answer.rank for step in self.steps]
        behind = [number for number, rank in enumerate(ranks) if rank > 1]
        return self.steps[behind[-1] + 1 if behind else 0].after


def state_names(layers: int) -> dict[str, str]:
    """Each step, and the name that its states have in a trace."""
    names = {"embeddings": "embeddings.norm"}
    for number in range(layers):
        names[f"layer {number + 1} attention"] = f"layers.{number}.attention_norm"
        names[f"layer {number + 1} feed-forward"] = f"layers.{number}.feed_forward_norm"
    return names


def guesses(
    position: int,
    steps: Sequence[str],
    logits: Tensor,
    vocabulary: Vocabulary,
    top_k: int = 5,
    targets: Sequence[int] = (),
) -> Guesses:
    """The steps at one place, from the logits after each of them, (number of steps, V).

    rank of a word = 1 + the number of words with a higher logit
    """
    probabilities = logits.float().softmax(-1)  # (steps, V)
    logits = vocabulary.only_words(logits, -torch.inf)
    chosen = logits.topk(min(top_k, vocabulary.size)).indices  # (steps, top_k)
    best = probabilities.gather(-1, chosen)  # (steps, top_k)
    answer = int(chosen[-1, 0])
    followed = [answer, *targets]
    ranks = (1 + (logits[:, None, :] > logits[:, followed, None]).sum(-1)).tolist()  # (steps, 1 + targets)
    values = probabilities[:, followed].tolist()
    rows = []
    for after, ids, scores, words, places in zip(steps, chosen.tolist(), best.tolist(), values, ranks, strict=True):
        both = [Followed(value, rank) for value, rank in zip(words, places, strict=True)]
        top = [Guess(vocabulary.name(token), token, score) for token, score in zip(ids, scores, strict=True)]
        rows.append(Step(after, top, both[0], both[1:]))
    return Guesses(position, rows[-1].best[0], rows)
