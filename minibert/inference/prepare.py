"""`prepare_for_inference`: a loaded model as a PreparedBert, and the way in which its linear layers are computed."""

from collections.abc import Callable
from contextlib import suppress
from functools import cache, partial
from math import inf
from time import perf_counter

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minibert.inference.compiled import load_program
from minibert.inference.int8 import Int8Linear
from minibert.inference.onednn import FUSED, ConvolvedLinear, PrepackedLinear, has_bfloat16, has_int8
from minibert.inference.prepared import PreparedBert
from minibert.masked_lm import BertForMaskedLM, Layer
from minibert.model import ACTIVATIONS, Bert, EncoderLayer, FeedForward, MLMHead, SelfAttention

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int8)


def prepare_for_inference(
    model: BertForMaskedLM, dtype: torch.dtype | None = None, *, linear: str = "auto"
) -> PreparedBert:
    """The fastest form of `model` for inference on its device. It holds a copy of every tensor, so what happens to
    `model` afterwards does not reach it. A model that is prepared already is returned.

    dtype: of the weights and the arithmetic; None is the model's own on the CPU, bfloat16 on CUDA. torch.int8, on the
    CPU: the weights and what they are multiplied with have 8 bits, the rest float32 or bfloat16.
    linear: how linear layers are computed. "torch": as torch has them. "product" and "convolution": the two ways of
    oneDNN, on the CPU. "auto": the fastest, which is measured once in a process. "compiled": up to 128 tokens at once
    go through one compiled program, and more of them the fastest of these ways. It needs a C++ compiler and takes a
    minute or two, once on a machine (compiled.py); where that was done, "auto" takes it too. Two ways round differently
    in the last digits, so name one where results must be the same in each run; `prepared.linear` is what was taken.

    Raises ValueError for a dtype or a way that this device does not have, for a prepared model if another dtype or way
    is asked for, for a model with forward hooks, which would not be called, and if there is no compiler.
    """
    if dtype not in (None, *DTYPES):
        raise ValueError(f"dtype must be torch.int8 or a floating-point type such as torch.bfloat16, not {dtype!r}")
    if isinstance(model, PreparedBert):
        had = model.dtype
        if dtype in (None, had) and linear in ("auto", model.linear):
            return model
        raise ValueError(
            f"this model is prepared already, in {had} with linear={model.linear!r}: for {dtype or had} with "
            f"linear={linear!r}, prepare the one it was made from"
        )
    if hooked := [name for name, part in model.named_modules() if part._forward_hooks or part._forward_pre_hooks]:
        raise ValueError(
            f"{hooked[0] or 'the model'} has a forward hook, and a prepared model would not call it: remove the hook, "
            "or use the model as it is"
        )
    _require_unchanged(model)
    device = model.device
    if dtype is None:
        dtype = torch.bfloat16 if device.type == "cuda" else model.dtype
    _require_dtype(dtype, device)
    with torch.inference_mode(False):  # tensors that are made in inference mode could not be used outside it
        way, program = _choose_way(linear, dtype, device), None
        if device.type == "cpu" and dtype in COMPILED and linear in ("auto", "compiled"):
            program = load_program(model, dtype, compile_it=linear == "compiled")
        return PreparedBert(model, dtype, way if program is None else "compiled", linear_layer(way, dtype), program)


def _require_dtype(dtype: torch.dtype, device: torch.device) -> None:
    if device.type == "cpu" and dtype == torch.bfloat16 and not has_bfloat16():
        raise ValueError("this CPU has no instructions for bfloat16: leave dtype out, or use torch.float32")
    if dtype != torch.int8:
        return
    if device.type != "cpu":
        raise ValueError(f"torch.int8 is for CPUs, and the model is on {device.type}: use torch.bfloat16 there")
    if not has_int8_products():
        raise ValueError("this CPU, or this torch, cannot multiply 8-bit numbers: leave dtype out, or use float32")


def _require_unchanged(model: BertForMaskedLM) -> None:
    """Raise ValueError for a model that computes something other than its configuration says: it would be lost."""
    config = model.config

    def as_configured(part: nn.Module) -> bool:
        if isinstance(part, nn.LayerNorm):
            return part.eps == config.layer_norm_eps
        if isinstance(part, SelfAttention):
            return part.num_heads == config.num_attention_heads
        if isinstance(part, FeedForward | MLMHead):
            return _same_function(part.activation, ACTIVATIONS[config.hidden_act])
        if isinstance(part, Bert):
            return (type(part).encode, type(part).predict) == (Bert.encode, Bert.predict)
        return not isinstance(part, EncoderLayer) or type(part) in (EncoderLayer, Layer)

    for name, part in model.named_modules():
        if not as_configured(part):
            raise ValueError(
                f"{name or type(model).__name__} is not as the configuration has it, but a prepared model would be: "
                "use the model as it is"
            )


def _same_function(one: object, other: object) -> bool:
    if isinstance(one, partial) and isinstance(other, partial):  # a copy of a model has a copy of it
        return (one.func, one.args, one.keywords) == (other.func, other.args, other.keywords)
    return one is other


# ---------------------------------------------------------------------------------- how linear layers are computed

WAYS: dict[str, type[PrepackedLinear] | None] = {
    "torch": None,
    "product": PrepackedLinear,
    "convolution": ConvolvedLinear,
}
COMPILED = (torch.float32, torch.bfloat16, torch.int8)  # of which there is also a compiled program for few tokens
POSSIBLE = {torch.float32: tuple(WAYS), torch.bfloat16: ("torch", "product"), torch.int8: ("product",)}
# Of results of order 1. float32: the sums are added up in another order. bfloat16: a rounding or two to 2^-8. int8: the
# roundings of 768 pairs add up to 0.015, and the largest of 200,000 of these sums to five times that.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.int8: 0.15}


def _choose_way(linear: str, dtype: torch.dtype, device: torch.device) -> str:
    """One of WAYS; with "compiled", the one for more tokens than the compiled program takes."""
    if linear not in ("auto", *WAYS, "compiled"):
        raise ValueError(f"linear must be one of auto, {', '.join(WAYS)}, compiled, not {linear!r}")
    there: tuple[str, ...] = ("torch",)
    if device.type == "cpu":
        there = (*working_ways(dtype), *(["compiled"] if dtype in COMPILED else []))
    elif linear == "auto":
        return "torch"
    if linear not in ("auto", *there):
        raise ValueError(
            f"linear={linear!r} cannot be had in {dtype} on this {device.type}: choose one of auto, {', '.join(there)}"
        )
    linear = "auto" if linear == "compiled" else linear
    return fastest_way(dtype) if linear == "auto" else linear


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
    """The fastest of them for a linear layer of BERT-base's size with GELU, with few tokens and with many: measured
    once in a process, in a fifth of a second.

    "torch" must win by a tenth: this layer fits into the cache. A whole model does not, and there the ordered weights
    gain more.
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
    return min(trials, key=lambda way: fastest[way, 0] * fastest[way, 1] * (1.1**2 if way == "torch" else 1))


def _trials(dtype: torch.dtype) -> dict[str, Callable[[Tensor], Tensor]]:
    """The working ways, each as a function that computes one and the same layer."""
    weight, bias, few, many = _sample(dtype)

    def plain(x: Tensor) -> Tensor:
        return F.gelu(F.linear(x, weight, bias))

    trials: dict[str, Callable[[Tensor], Tensor]] = {}
    for way in POSSIBLE.get(dtype, ("torch",)):
        linear, near = linear_layer(way, dtype), TOLERANCE.get(dtype, 0.0)
        if linear is None:
            trials[way] = plain
            continue
        with suppress(AttributeError, RuntimeError, NotImplementedError), torch.inference_mode():  # no such operator
            packed = linear(weight, bias, FUSED["gelu"])
            if all(torch.allclose(packed(x), plain(x), rtol=near, atol=near) for x in (few, many)):
                trials[way] = packed
    return trials


def _sample(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """weight and bias of a layer, few tokens and many. The results are of order 1."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(torch.float32 if dtype == torch.int8 else dtype)

    return normal(1536, 768) / 768**0.5, normal(1536), normal(16, 768), normal(128, 768)
