"""Lower precision inside a float32 trace: products in TF32 or in half precision, which many accelerators take unless
they are told otherwise, and weights that once went through a half-precision file.

Our model computes in float64 with the same operands rounded. If that gives the numbers of the first wrong tensor, the
precision has a name. Further on the roundings soon have nothing in common with the port's own, so from there the errors
are only compared in size.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from minibert.masked_lm import BertForMaskedLM
from minibert.parity.steps import Steps
from minibert.parity.yardstick import Yardstick, converted, measures
from minibert.trace.stores import shown
from minibert.trace.table import GRADIENT, INPUTS, hide_padding, row_of
from minibert.trace.tracefile import Trace

LARGEST = 0.1  # of the tensor's scale: what rounding to half precision may do to one product, and some more
LEFT = (
    0.4  # Of the error at the first wrong tensor, at most this part may be left. Another precision leaves 0.7 or more.
)
REMEDY = (
    'switch it off while you hunt bugs: torch.set_float32_matmul_precision("highest"), '
    'jax.default_matmul_precision("highest"), NVIDIA_TF32_OVERRIDE=0, no autocast'
)


class Precision(NamedTuple):
    """How operands and results of products are rounded. bits: of TF32's significand, with truncation or without."""

    title: str
    dtype: torch.dtype | None = None
    truncated: bool = False
    results: bool = False
    weights: bool = False  # the weights alone, once

    def round(self, x: Tensor) -> Tensor:
        if self.dtype is not None:
            return x.to(self.dtype).to(x.dtype)
        significand, exponent = torch.frexp(x)
        whole = significand * 2.0**11  # TF32 keeps 11 bits
        return torch.ldexp(whole.trunc() if self.truncated else whole.round(), exponent - 11)


ELEVEN_BITS = "the products were in TF32 (or of float16 operands, which keep as many bits)"
PRECISIONS = (
    Precision(ELEVEN_BITS),
    Precision(ELEVEN_BITS, truncated=True),
    Precision(ELEVEN_BITS, torch.float16),
    Precision("the products were in float16", torch.float16, results=True),
    *(Precision("the products were in bfloat16", torch.bfloat16, results=results) for results in (False, True)),
    *(
        Precision(f"the weights had been rounded to {name}", dtype, weights=True)
        for name, dtype in (("bfloat16", torch.bfloat16), ("float16", torch.float16))
    ),
)


class Lowered(NamedTuple):
    """The precision that explains a trace, and what to say about it."""

    title: str
    lines: list[str]


class _Products(TorchFunctionMode):
    def __init__(self, precision: Precision) -> None:
        super().__init__()
        self.precision = precision

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") not in ("linear", "matmul", "__matmul__"):
            return func(*args, **(kwargs or {}))
        x = func(*(self.precision.round(each) for each in args[:2]), *args[2:], **(kwargs or {}))
        return self.precision.round(x) if self.precision.results else x


def lower_precision(given: Trace, model: BertForMaskedLM, first: str) -> Lowered | None:
    """Which lower precision gives the numbers of a float32 trace, whose first wrong tensor is `first`, and whether it
    explains the rest. None if no lower precision does.
    """
    if first.startswith(GRADIENT) or torch.finfo(given.dtype).eps > 1e-6:
        return None
    yardstick = Yardstick(model, given, grad=False)
    mask = yardstick.inputs.attention_mask.bool()

    before = given.names[: given.names.index(first)]
    last_right = before[-1] if before and before[-1] not in INPUTS else None

    def hidden(name: str, x: Tensor) -> Tensor:
        return hide_padding(row_of(name), x, given.compared(name, mask))

    def steps(precision: Precision | None) -> Iterator[tuple[str, Tensor]]:
        for name, x in _steps(yardstick, precision, last_right):
            yield name, hidden(name, x)

    x = hidden(first, given.read(first).to(mask.device)).double()
    truth = next(y for name, y in steps(None) if name == first)
    if x.shape != truth.shape or not bool(((x - truth).abs() <= LARGEST * truth.abs().max()).all()):
        return None

    def left(precision: Precision) -> float:
        y = next(y for name, y in steps(precision) if name == first)
        return ((x - y).square().sum() / (x - truth).square().sum()).sqrt().item()

    best, precision = min(((left(each), each) for each in PRECISIONS), key=lambda found: found[0])
    if not best <= LEFT:
        return None
    said = [f"{shown(given.name)}: {first} is as if {precision.title}", f"  {REMEDY}"]
    pairs = ((name, y, own) for (name, y), (_, own) in zip(steps(None), steps(precision), strict=True))
    for measure in measures(pairs, given.dtype):
        name = measure.name
        if given.shapes().get(name) != tuple(measure.truth.shape):
            continue
        if not measure.accepts(measure.error(hidden(name, given.read(name).to(mask.device)))):
            said.append(f"  it does not explain the error of {name}: look for a second cause there")
            return Lowered(precision.title, said)
    return Lowered(precision.title, [*said, "  it explains the size of every error in the forward pass"])


def _steps(yardstick: Yardstick, precision: Precision | None, after: str | None) -> Iterator[tuple[str, Tensor]]:
    """The model in float64, exact or with one lower precision. after: the tensor up to which products are exact."""
    model = yardstick.exact
    if precision is not None and precision.weights and precision.dtype is not None:
        model = converted(converted(model, precision.dtype), torch.float64)
        precision = None
    run, lowered = Steps(model, yardstick.inputs, yardstick.given).run(), after is None
    while True:
        # Only while it computes: what is done with the tensors stays exact.
        with nullcontext() if precision is None or not lowered else _Products(precision):
            found = next(run, None)
        if found is None:
            return
        yield found
        lowered = lowered or found[0] == after
