"""View 4: where each attention head looks, and what it really takes from there.

A weight α says where a head looks. What it takes from a token is α times the vector that the token has to give. Many
heads rest their weight on a token with next to nothing to give, and only the second number shows it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minibert.study.reading import Reading

NAMED_FROM = 0.4  # a habit is given as the head's name when this share of the weight goes there


@dataclass(frozen=True)
class Head:
    """name: the strongest habit if it has NAMED_FROM of the weight, else "". spread: over how many tokens the weight
    is spread. Everything is about one text, and about its ordinary tokens.
    """

    layer: int
    head: int
    name: str
    spread: float
    habits: dict[str, float]


def written(value: Tensor, output: Tensor) -> Tensor:
    """f(x): what each token has to give in each head, (H, S, D). value: (H, S, K). output: the weight of the output
    projection, (D, D). The attention output of token i is Σ over heads and tokens j of αᵢⱼ f(xⱼ), plus the bias.

    Source: Kobayashi et al. 2020, "Attention is Not Only a Weight", https://arxiv.org/abs/2004.10102, section 3.
    """
    heads, _, size = value.shape
    return torch.einsum("hsk,dhk->hsd", value, output.unflatten(-1, (heads, size)))


def taken(probabilities: Tensor, lengths: Tensor) -> Tensor:
    """αᵢⱼ ‖f(xⱼ)‖ as shares of each row, (…, S, S). lengths: ‖f(x)‖, (…, S). Source: as `written`."""
    weighted = probabilities * lengths[..., None, :]
    return weighted / weighted.sum(-1, keepdim=True).clamp(min=torch.finfo(weighted.dtype).tiny)


def spread(weights: Tensor) -> Tensor:
    """e^entropy of each row: 1 if all weight is on one token, n if it is even over n. (…, S, S) → (…, S)"""
    return torch.special.entr(weights).sum(-1).exp()


def targets(reading: Reading) -> dict[str, Tensor]:
    """The habits: for each the pairs (reading token, read token) that belong to it, (S, S) bool."""
    size = len(reading.ids)
    place = torch.arange(size)
    ids = torch.tensor(reading.ids)
    itself = place[:, None] == place
    habits = {
        "the previous token": place[:, None] - 1 == place,
        "the next token": place[:, None] + 1 == place,
        "itself": itself,
    }
    added = [place for place in range(size) if reading.added[place]]
    for piece in dict.fromkeys(reading.pieces[place] for place in added):  # as the tokenizer names them
        named = [place for place in added if reading.pieces[place] == piece]
        habits[piece] = torch.isin(place, torch.tensor(named)).expand(size, size)
    marks = torch.tensor([reading.is_punctuation(place) for place in range(size)])
    habits["punctuation"] = marks.expand(size, size)
    habits["the same word"] = (ids[:, None] == ids) & ~itself
    return habits


def habits(weights: Tensor, reading: Reading, layer: int) -> list[Head]:
    """What the heads of one layer do, from their weights (H, S, S): for each habit the weight that goes to it, mean
    over the ordinary tokens.
    """
    ordinary = torch.tensor([not added for added in reading.added])  # (S,)
    rows = weights[:, ordinary]  # (H, tokens, S)
    pairs = targets(reading)
    chosen = torch.stack([of_habit[ordinary] for of_habit in pairs.values()]).float()  # (habits, tokens, S)
    sums = chosen.flatten(1) @ rows.flatten(1).T / len(rows[0])  # (habits, H)
    shares = dict(zip(pairs, sums.tolist(), strict=True))
    wide = spread(rows).mean(-1).tolist()
    return [
        _head(layer, head, {name: values[head] for name, values in shares.items()}, wide[head])
        for head in range(len(wide))
    ]


def _head(layer: int, head: int, shares: dict[str, float], wide: float) -> Head:
    best = max(shares, key=lambda name: shares[name])
    return Head(layer + 1, head + 1, best if shares[best] >= NAMED_FROM else "", wide, shares)


def with_habit(heads: Sequence[Head], name: str) -> list[Head]:
    """The heads that are named so, the strongest first."""
    return sorted((head for head in heads if head.name == name), key=lambda head: -head.habits[name])
