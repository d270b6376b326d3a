"""Which way of computing linear layers a prepared model takes on this CPU: what works, and of that the fastest."""

from collections.abc import Callable
from contextlib import suppress
from functools import cache
from math import inf
from time import perf_counter

import torch
import torch.nn.functional as F
from torch import Tensor

from minibert.inference.int8 import Int8Linear
from minibert.inference.onednn import FUSED, ConvolvedLinear, PrepackedLinear, has_int8

WAYS: dict[str, type[PrepackedLinear] | None] = {
    "torch": None,
    "product": PrepackedLinear,
    "convolution": ConvolvedLinear,
}
POSSIBLE = {torch.float32: tuple(WAYS), torch.bfloat16: ("torch", "product"), torch.int8: ("product",)}
# Of results of order 1. float32: the sums are added up in another order. bfloat16: a rounding or two to 2^-8. int8: the
# roundings of 768 pairs add up to 0.015, and the largest of 200,000 of these sums to five times that.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.int8: 0.15}


def linear_layer(way: str, dtype: torch.dtype) -> type[PrepackedLinear] | None:
    """The class that computes a linear layer in this way; None is torch's own."""
    return Int8Linear if dtype == torch.int8 else WAYS[way]


@cache
def working_ways(dtype: torch.dtype) -> tuple[str, ...]:
    """Those of WAYS that this torch and this CPU have for `dtype`, and that give what nn.Linear gives."""
    return tuple(_trials(dtype))


def has_int8_products() -> bool:
    """Whether this CPU and this torch multiply 8-bit numbers, and rightly."""
    return has_int8() and bool(working_ways(torch.int8))


@cache
def fastest_way(dtype: torch.dtype) -> str:
    """The fastest of them for a linear layer of BERT-base's size with GELU, with few tokens and with many. It is
    measured once in a process, in a fifth of a second. Where two are almost equal, the choice may differ from one
    process to the next.

    "torch" must win by a tenth: this layer fits into the cache and a whole model does not, and there the ordered
    weights gain more (on an AMD EPYC with AVX-512, 16 tokens: 1.6 times as fast here, 2.5 times in a whole model).
    """
    if len(working_ways(dtype)) == 1:
        return working_ways(dtype)[0]
    trials = _trials(dtype)
    _, _, *inputs = _sample(dtype)
    fastest = {(way, size): inf for way in trials for size in range(len(inputs))}
    with torch.inference_mode():
        for _ in range(20):  # in turn, so that whatever else the machine does disturbs all alike
            for way, size in fastest:
                began = perf_counter()
                trials[way](inputs[size])
                fastest[way, size] = min(fastest[way, size], perf_counter() - began)
    handicap = {"torch": 1.1**2}
    return min(trials, key=lambda way: fastest[way, 0] * fastest[way, 1] * handicap.get(way, 1.0))


def _trials(dtype: torch.dtype) -> dict[str, Callable[[Tensor], Tensor]]:
    """The working ways, each as a function that computes one and the same layer."""
    weight, bias, few, many = _sample(dtype)

    def plain(x: Tensor) -> Tensor:
        return F.gelu(F.linear(x, weight, bias))

    trials: dict[str, Callable[[Tensor], Tensor]] = {}
    for way in POSSIBLE.get(dtype, ("torch",)):
        linear = linear_layer(way, dtype)
        if linear is None:
            trials[way] = plain
            continue
        with suppress(AttributeError, RuntimeError, NotImplementedError), torch.inference_mode():  # no such operator
            packed = linear(weight, bias, FUSED["gelu"])
            near = TOLERANCE[dtype]
            if all(torch.allclose(packed(x), plain(x), rtol=near, atol=near) for x in (few, many)):
                trials[way] = packed
    return trials


def _sample(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """weight and bias of a layer, few tokens and many. The results are of order 1."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(torch.float32 if dtype == torch.int8 else dtype)

    return normal(1536, 768) / 768**0.5, normal(1536), normal(16, 768), normal(128, 768)
