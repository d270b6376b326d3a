"""View 4: where each attention head looks, and what it really takes from there.

A weight α says where a head looks. What it takes from a token is α times the vector that the token has to give. Many
heads rest their weight on a token with next to nothing to give, and only the second number shows it.

Below: the maps of all heads in few bytes, for a page that a friend can be sent. A weight p is kept as round(255 √p),
deflated, in base64. The root is there because most weights are small: 8 linear bits lose 65 % of the weights at 128
tokens, and these keep the sum of a row within 1 %.
"""

import base64
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from math import isqrt

import torch
import torch.nn.functional as F
from torch import Tensor

from minibert.study.reading import Reading

NAMED_FROM = 0.4  # a habit is given as the head's name when this share of the weight goes there


@dataclass(frozen=True)
class Head:
    """layer and head count from 1. name: the strongest habit if it has NAMED_FROM of the weight, else "". spread: over
    how many tokens the weight is spread. Everything is about one text, and about its ordinary tokens.
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
    found = []
    for head, (of_head, wide) in enumerate(zip(sums.T.tolist(), spread(rows).mean(-1).tolist(), strict=True)):
        shares = dict(zip(pairs, of_head, strict=True))
        best = max(shares, key=lambda name: shares[name])
        found.append(Head(layer + 1, head + 1, best if shares[best] >= NAMED_FROM else "", wide, shares))
    return found


def with_habit(heads: Sequence[Head], name: str) -> list[Head]:
    """The heads that are named so, the strongest first."""
    return sorted((head for head in heads if head.name == name), key=lambda head: -head.habits[name])


MOST_WEIGHTS = 2_500_000  # of whole maps
MOST_TEXT = 2_300_000  # characters of whole maps: a page of 3 MB has room for the rest
MOST_FOLDED = 1_500_000  # weights of folded maps and exact rows
LARGEST_SIDE = 64  # of a folded map


@dataclass(frozen=True)
class Maps:
    """The weights of all heads, (L, H, S, S). Where they are too many, the maxima of blocks, (L, H, side, side), with
    the same for what is taken, and in `rows` the exact weights of the reading tokens `row_places`, (L, H, number of
    rows, S). `lengths`: ‖f(x)‖, (L, H, S), as 16-bit shares of `longest`; empty without a model.
    """

    side: int
    weights: str
    taken: str
    row_places: list[int]
    rows: str
    lengths: str
    longest: list[list[float]]


def pack(p: Tensor) -> str:
    """Weights between 0 and 1, as text. Their order is that of the tensor."""
    return _text((p.sqrt() * 255).round().to(torch.uint8))


def maps(weights: Sequence[Tensor], takes: Sequence[Tensor], lengths: Sequence[Tensor], asked: Sequence[int]) -> Maps:
    """weights: of each layer, (H, S, S). takes: `heads.taken` of it; lengths: (H, S); both may be empty. asked: the
    places whose rows come first when not all can be kept.
    """
    whole = torch.stack(list(weights))  # (L, H, S, S)
    heads, size = whole.shape[0] * whole.shape[1], whole.shape[-1]
    tops = [of_layer.amax(-1) for of_layer in lengths]
    shares = [of_layer / most.clamp(min=1e-30)[:, None] for of_layer, most in zip(lengths, tops, strict=True)]
    coded = _text((torch.stack(shares) * 65535).round().to(torch.int32).to(torch.uint16)) if shares else ""
    longest = [most.tolist() for most in tops]
    if whole.numel() <= MOST_WEIGHTS and len(text := pack(whole)) + len(coded) <= MOST_TEXT:
        return Maps(size, text, "", [], "", coded, longest)
    budget = MOST_FOLDED * 4 // 5 // (2 * heads)  # a fifth, and what is left, is for the exact rows
    side = max(1, min(LARGEST_SIDE, size, isqrt(budget)))
    places = list(asked[: max(0, (MOST_FOLDED // heads - 2 * side * side) // size)])
    folded_takes = pack(fold(torch.stack(list(takes)), side)) if takes else ""
    return Maps(side, pack(fold(whole, side)), folded_takes, places, pack(whole[:, :, places]), coded, longest)


def fold(x: Tensor, side: int) -> Tensor:
    """The maxima of side × side blocks of a map, (…, S, S) → (…, side, side). The blocks cover the map, and may share a
    token at their edges.
    """
    return F.adaptive_max_pool2d(x.flatten(0, -3)[None], side)[0].unflatten(0, x.shape[:-2])


def _text(x: Tensor) -> str:
    data = x.contiguous().view(torch.uint8).flatten().tolist()
    return base64.b64encode(zlib.compress(bytes(data), 9)).decode()
