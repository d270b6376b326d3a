"""Attention maps in few bytes: for a page that a friend can be sent.

A weight p is kept as round(255 √p), deflated, in base64. The root is there because most weights are small: 8 linear
bits lose 65 % of the weights at 128 tokens, and these keep the sum of a row within 1 %.
"""

import base64
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from math import isqrt

import torch
import torch.nn.functional as F
from torch import Tensor

MOST_WEIGHTS = 2_500_000  # of whole maps
MOST_TEXT = 2_300_000  # characters of whole maps: a page of 3 MB has room for the rest
MOST_FOLDED = 1_500_000  # weights of folded maps and exact rows
LARGEST_SIDE = 64  # of a folded map


@dataclass(frozen=True)
class Maps:
    """The weights of all heads, (L, H, S, S). Either `full`, or, where they are too many, `folded`, the maxima of
    blocks, (L, H, side, side), with the same for what is taken, and `rows`, the weights of some reading tokens exactly,
    (L, H, number of rows, S). `lengths`: ‖f(x)‖, (L, H, S), as 16-bit shares of `longest`; absent without a model.
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


def unpack(text: str) -> Tensor:
    """The weights that `pack` was given, (n,), to 0.004."""
    return torch.frombuffer(bytearray(zlib.decompress(base64.b64decode(text))), dtype=torch.uint8).div(255).square()


def maps(weights: Sequence[Tensor], takes: Sequence[Tensor], lengths: Sequence[Tensor], asked: Sequence[int]) -> Maps:
    """weights: of each layer, (H, S, S). takes: `heads.taken` of it; lengths: (H, S); both may be empty. asked: the
    places whose rows come first when not all can be kept.
    """
    layers, (heads, size, _) = len(weights), weights[0].shape
    whole = torch.stack(list(weights))  # (L, H, S, S)
    longest = [of_layer.amax(-1) for of_layer in lengths]
    shares = [of_layer / most.clamp(min=1e-30)[:, None] for of_layer, most in zip(lengths, longest, strict=True)]
    coded = _text((torch.stack(shares) * 65535).round().to(torch.int32).to(torch.uint16)) if shares else ""
    tops = [most.tolist() for most in longest]
    if whole.numel() <= MOST_WEIGHTS and len(text := pack(whole)) + len(coded) <= MOST_TEXT:
        return Maps(size, text, "", [], "", coded, tops)
    budget = MOST_FOLDED * 4 // 5 // (layers * heads * 2)  # a fifth, and what is left, is for the exact rows
    side = max(1, min(LARGEST_SIDE, size, isqrt(budget)))
    room = (MOST_FOLDED - 2 * layers * heads * side * side) // (layers * heads * size)
    places = list(asked[: max(0, room)])
    folded_takes = pack(fold(torch.stack(list(takes)), side)) if takes else ""
    return Maps(side, pack(fold(whole, side)), folded_takes, places, pack(whole[:, :, places]), coded, tops)


def fold(x: Tensor, side: int) -> Tensor:
    """The maxima of side × side blocks of a map, (…, S, S) → (…, side, side). The blocks cover the map, and may share a
    token at their edges.
    """
    return F.adaptive_max_pool2d(x.flatten(0, -3)[None], side)[0].unflatten(0, x.shape[:-2])


def _text(x: Tensor) -> str:
    data = x.contiguous().view(torch.uint8).flatten().tolist()
    return base64.b64encode(zlib.compress(bytes(data), 9)).decode()
