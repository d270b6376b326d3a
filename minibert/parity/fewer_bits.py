"""A port that computes with fewer bits than it says: products in TF32 or half precision, weights that once went through
a half-precision file, or 8 bits on purpose.

Rounding errors are handed on from tensor to tensor, and soon have nothing in common with another port's. So lower
precision is recognised at the first wrong tensor: our model computes it in float64 from operands that are rounded
likewise, and from there on the errors are only compared in size.

Of a quantised port, each step is computed again from what the trace itself has of the steps before it, so that what is
left is the step's own error. It is measured by what 8 bits do to that step: the weights, what it reads and what it
gives are rounded to 8 bits, with one scale for a whole tensor, which is the coarsest that ports do. A step without
weights that is further off is no quantisation, but a fault.
"""

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from minibert.masked_lm import BertForMaskedLM
from minibert.parity.faults import CATALOGUE
from minibert.parity.report import Line, Report
from minibert.parity.steps import Steps
from minibert.parity.yardstick import Yardstick, converted, error_of, largest, measures, rms
from minibert.trace.table import GRADIENT, INPUTS, SHAPES, covered, explain, hide_padding, row_of, shown
from minibert.trace.tracefile import Trace

# ----------------------------------------------------------------------------- lower precision inside a float32 trace

LARGEST = 0.1  # of the tensor's scale: what rounding to half precision may do to one product, and some more
LEFT = 0.4  # of the error at the first wrong tensor, at most this part may be left: another precision leaves most of it
REMEDY = (
    'switch it off while you hunt bugs: torch.set_float32_matmul_precision("highest"), '
    'jax.default_matmul_precision("highest"), NVIDIA_TF32_OVERRIDE=0, no autocast'
)
Rounding = Callable[[Tensor], Tensor]


def tf32(x: Tensor, whole: Rounding = torch.round) -> Tensor:
    """x with the 11 bits of a significand that TF32 keeps."""
    significand, exponent = torch.frexp(x)
    return torch.ldexp(whole(significand * 2.0**11), exponent - 11)


def through(dtype: torch.dtype) -> Rounding:
    return lambda x: x.to(dtype).to(x.dtype)


class Precision(NamedTuple):
    """How the operands and the results of products are rounded; or the weights alone, once."""

    title: str
    operands: Rounding = lambda x: x
    results: Rounding = lambda x: x
    weights: torch.dtype | None = None


ELEVEN_BITS = "the products were in TF32 (or of float16 operands, which keep as many bits)"
HALF, BRAIN = through(torch.float16), through(torch.bfloat16)
PRECISIONS = (
    Precision(ELEVEN_BITS, tf32),
    Precision(ELEVEN_BITS, partial(tf32, whole=torch.trunc)),
    Precision(ELEVEN_BITS, HALF),
    Precision("the products were in float16", HALF, HALF),
    Precision("the products were in bfloat16", BRAIN),
    Precision("the products were in bfloat16", BRAIN, BRAIN),
    Precision("the weights had been rounded to bfloat16", weights=torch.bfloat16),
    Precision("the weights had been rounded to float16", weights=torch.float16),
)


class Lowered(Steps):
    """The model in float64 with products of lower precision behind the tensor `last_right`; None: everywhere."""

    def __init__(self, yardstick: Yardstick, precision: Precision, last_right: str | None) -> None:
        model = yardstick.exact
        if precision.weights is not None:
            model = converted(converted(model, precision.weights), torch.float64)
        super().__init__(model, yardstick.inputs, yardstick.given)
        self.precision, self.last_right, self.exact = precision, last_right, last_right is not None

    def made(self, name: str, x: Tensor) -> Tensor:
        self.exact = self.exact and name != self.last_right
        return x

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.exact:
            return super().linear(x, weight, bias)
        operands = self.precision.operands
        return self.precision.results(super().linear(operands(x), operands(weight), bias))

    def product(self, x: Tensor, y: Tensor) -> Tensor:
        if self.exact:
            return super().product(x, y)
        return self.precision.results(super().product(self.precision.operands(x), self.precision.operands(y)))


class Found(NamedTuple):
    """The precision that explains a trace, and what to say about it."""

    title: str
    lines: list[str]


def lower_precision(yardstick: Yardstick, first: str) -> Found | None:
    """Which lower precision gives the numbers of a float32 trace, whose first wrong tensor is `first`, and whether it
    explains the rest. None if no lower precision does.
    """
    given = yardstick.given
    if first.startswith(GRADIENT) or torch.finfo(given.dtype).eps > 1e-6:
        return None
    before = given.names[: given.names.index(first)]
    last_right = before[-1] if before and before[-1] not in INPUTS else None

    def at_first(steps: Steps) -> Tensor:
        return yardstick.hidden(first, next(x for name, x in steps.run() if name == first))

    exact = Steps(yardstick.exact, yardstick.inputs, given)
    x, truth = yardstick.there(first).double(), at_first(exact)
    if x.shape != truth.shape or not bool(((x - truth).abs() <= LARGEST * truth.abs().max()).all()):
        return None

    def left(precision: Precision) -> float:
        y = at_first(Lowered(yardstick, precision, last_right))
        return ((x - y).square().sum() / (x - truth).square().sum()).sqrt().item()

    best, precision = min(((left(each), each) for each in PRECISIONS), key=lambda found: found[0])
    if not best <= LEFT:
        return None
    said = [f"{shown(given.name)}: {first} is as if {precision.title}", f"  {REMEDY}"]
    lowered, shapes = Lowered(yardstick, precision, last_right), given.shapes()
    pairs = (
        (name, yardstick.hidden(name, y), yardstick.hidden(name, own))
        for (name, y), (_, own) in zip(exact.run(), lowered.run(), strict=True)
    )
    for measure in measures(pairs, given.dtype):
        name = measure.name
        there = shapes.get(name) == tuple(measure.truth.shape)
        if there and not measure.accepts(measure.error(yardstick.there(name))):
            said.append(f"  it does not explain the error of {name}: look for a second cause there")
            return Found(precision.title, said)
    return Found(precision.title, [*said, "  it explains the size of every error in the forward pass"])


# ------------------------------------------------------------------------------------------------- 8 bits, on purpose

PRODUCTS = ("sum", "query", "key", "value", "attention_output", "intermediate", "feed_forward", "dense", "logits")
ALLOWED = 4.0  # times what 8 bits do: kernels sum in other orders, and some round to 7 bits (torch's on AVX2)
NAMED = 0.5  # a fault is named if with it the wrong step's own error is at most this part of what it is without
LEVELS = 256  # so many different numbers has a tensor of 8 bits
MARGIN = 0.1  # of the positions, on top of what 8 bits tip over and of three standard deviations


class FromTrace(Steps):
    """Every step reads what the trace has. own: what the step that is computing gives."""

    own: Tensor

    def made(self, name: str, x: Tensor) -> Tensor:
        self.own = x = super().made(name, x)
        if self.given.shapes().get(name) != tuple(x.shape):
            return x
        self.given.settle(name, x)
        return torch.where(self.compared(name, x), self.given.read(name).to(x), x)

    def compared(self, name: str, x: Tensor) -> Tensor:
        return hide_padding(name, torch.ones_like(x), self.given.compared(name, self.seen)).bool()


class EightBits(FromTrace):
    """The same with 8 bits. The model's weights are rounded already."""

    def made(self, name: str, x: Tensor) -> Tensor:
        read = super().made(name, x)
        compared = self.compared(name, x)

        def rounded(x: Tensor, axis: int | None = None) -> Tensor:
            return torch.where(compared, to_8_bits(torch.where(compared, x, 0.0), axis), x)

        # An activation acts on each number alone; so its input is rounded for each token, unless the trace's is coarser
        self.fine = rounded(read, -1)
        self.own = rounded(self.own, -1 if name.endswith("activation") and not self.coarse(name) else None)
        return rounded(read)

    def activation(self, x: Tensor) -> Tensor:
        return super().activation(x if self.coarse(self.section + "activation") else self.fine)

    def coarse(self, name: str) -> bool:
        return name not in self.given.shapes() or self.given.read(name).unique().numel() <= LEVELS


def to_8_bits(x: Tensor, axis: int | None = None) -> Tensor:
    """With one scale for all, or for each token."""
    size = x.abs().amax() if axis is None else x.abs().amax(axis, keepdim=True)
    step = size.nan_to_num(0.0, 0.0, 0.0).clamp(min=1e-30) / 127
    return (x / step).round() * step


def eight_bit_weights(model: BertForMaskedLM) -> BertForMaskedLM:
    model = deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.copy_(to_8_bits(parameter))
    return model


@dataclass(frozen=True)
class Measured(Line):
    """One tensor. own: the error that its step makes by itself, as a root mean square, divided by that of the truth.
    share: the same, as a part of what 8 bits may do: above 1 it is wrong. everywhere: whether it is in nine of ten
    tokens. error: the whole distance from float64, relative like `own`.
    """

    own: float
    share: float
    everywhere: bool
    error: float = 0.0

    @property
    def ok(self) -> bool:
        return self.share <= 1

    def cells(self) -> dict[str, str]:
        return {
            "tensor": self.name,
            "error": f"{self.error:.1e}",
            "its step's own": f"{self.own:.1e}",
            "of what 8 bits may do": f"{self.share:.2f}",
            "verdict": "ok" if self.ok else "wrong",
        }


def own_errors(yardstick: Yardstick, eight: BertForMaskedLM, kind: type[Steps] = Steps) -> Iterator[Measured]:
    """The steps of a trace, each measured alone. eight: the model with `eight_bit_weights`. kind: a fault, if there is
    one.
    """
    given, eps = yardstick.given, torch.finfo(yardstick.given.dtype).eps
    exact, rounded = (
        type(each.__name__, (each, kind) if kind is not Steps else (each,), {})(model, yardstick.inputs, given)
        for each, model in ((FromTrace, yardstick.exact), (EightBits, eight))
    )
    for (name, _), _ in zip(exact.run(), rounded.run(), strict=True):
        if yardstick.shapes.get(name) != tuple(exact.own.shape):
            continue
        x = yardstick.there(name).double()
        truth, own = (yardstick.hidden(name, each.own) for each in (exact, rounded))
        scale = largest(truth) or 1.0
        error, explained = error_of(x, truth, scale), error_of(own, truth, scale)
        shares = [each / max(ALLOWED * most, 8 * eps) for each, most in zip(error, explained, strict=True)]
        share = max(shares) if bool(x.isfinite().all()) else float("inf")
        everywhere = _in_every_token(name, x - truth, given.compared(name, yardstick.mask), 8 * eps * scale)
        yield Measured(name, error.rms * scale / (rms(truth) or 1.0), share, everywhere)


def _in_every_token(name: str, gap: Tensor, mask: Tensor, limit: float) -> bool:
    """Whether nine of ten tokens are off by more than rounding."""
    if gap.dim() < 3:
        return True
    tokens = gap.transpose(1, 2) if SHAPES[row_of(name)][1] == "H" else gap
    off = tokens[mask].flatten(1).abs().amax(1) > limit
    return off.double().mean().item() >= 0.9


def quantised(given: Trace, model: BertForMaskedLM) -> Report:
    """Measure a quantised port's trace. Raises ValueError if it is of a model of another size, or has only inputs.

    more: `worst`, the step that adds the most error; and if there are logits, `top1`, the share of `positions` whose
    likeliest word is the same, and `divergence`, how far the probabilities are from the right ones in the mean
    (Kullback-Leibler, in nats).
    """
    yardstick, report = Yardstick(model, given, grad=False), Report((given.title,))
    eight = eight_bit_weights(yardstick.exact)
    errors = {
        measure.name: error.rms * measure.scale / (rms(measure.truth) or 1.0) for measure, error in yardstick.errors()
    }
    report.rows += [replace(row, error=errors[row.name]) for row in own_errors(yardstick, eight)]
    if not report.rows:
        raise ValueError(f"{given.name} has only inputs: there is nothing to measure")
    worst = max(report.rows, key=lambda row: row.own if row.own == row.own else float("inf"))
    report.more["worst"] = worst.name
    first = next((row for row in report.rows if not row.ok), None)
    if first is not None:
        report.ok, report.first_wrong = False, first.name
        report.summary += _accusation(yardstick, eight, first)
    if "logits" in errors:
        report.summary += _answers(report, yardstick, eight)
    if said := given.layouts():
        report.summary.append(said)
    if report.ok:
        report.summary += [
            f"no step is wrong by more than 8 bits explain. {worst.name} adds the most: {worst.own:.1e} of its size",
            "whether all that is too much, a task has to say",
            covered(yardstick.inputs, model.config),
        ]
    return report


def _accusation(yardstick: Yardstick, eight: BertForMaskedLM, first: Measured) -> Iterator[str]:
    yield f"first wrong: {first.name} ({explain(first.name)})"
    x = yardstick.there(first.name)
    if not bool(x.isfinite().all()):
        yield f"it has {int((~x.isfinite()).sum()):,} numbers that are NaN or infinite: no quantisation gives these"
        return
    product = first.name.split(".")[-1] in PRODUCTS
    yield (
        f"computed from what this trace has before it, it is {ALLOWED * first.share:.2g} times further off than 8 bits "
        f"explain{'' if product else '. It is a step without weights: this is no quantisation, but a fault'}"
    )
    tried = []
    for fault in CATALOGUE:
        own = first.own
        for row in own_errors(yardstick, eight, fault):
            own = row.own if row.name == first.name else own
            if not row.ok:
                break
        else:
            tried.append((own, fault))
    best = min((own for own, _ in tried), default=0.0)
    for own, fault in tried:
        if own <= min(1.5 * best, NAMED * first.own):
            yield f"{fault.title}: with this fault, no step is further off than 8 bits explain"
            yield f"  {fault.remedy} (source: {fault.source})"


def _answers(report: Report, yardstick: Yardstick, eight: BertForMaskedLM) -> Iterator[str]:
    """What the error does to the words, and whether no task could accept that."""
    given = yardstick.given
    nothing_given = Trace({}, given.config, given.metadata)
    both = Steps(yardstick.exact, yardstick.inputs, given), EightBits(eight, yardstick.inputs, nothing_given)
    truth, rounded = (next(x for name, x in steps.run() if name == "logits") for steps in both)
    x, there = yardstick.there("logits").double(), given.compared("logits", yardstick.mask)
    same, expected = ((each.argmax(-1) == truth.argmax(-1)) for each in (x, rounded))
    positions, top1 = int(there.sum()), same[there].double().mean().item()
    right, found = (each[there].log_softmax(-1) for each in (truth, x))
    divergence = torch.sum(right.exp() * (right - found), -1).mean().item()
    report.more |= {"top1": top1, "positions": positions, "divergence": divergence}
    yield (
        f"logits: the likeliest word is the same at {top1:.1%} of {positions} positions; the "
        f"probabilities are {divergence:.1e} nats apart in the mean (Kullback-Leibler)"
    )
    usual = expected[there].double().mean().item()
    chance = (usual * positions + 1) / (positions + 2)  # of few positions, none tipped over says little
    if top1 < usual - MARGIN - 3 * (chance * (1 - chance) / positions) ** 0.5:
        report.ok, report.first_wrong = False, report.first_wrong or "logits"
        yield f"8 bits everywhere leave it the same at {usual:.1%}: this port's loss is more than 8 bits explain"
    for row, (mine, usually, asked) in enumerate(zip(same, expected, there, strict=True)):
        if int(asked.sum()) > 2 and not bool(mine[asked].any()) and usually[asked].double().mean() >= 1 / 3:
            report.ok, report.first_wrong = False, report.first_wrong or "logits"
            yield f"row {row}: the likeliest word is nowhere the same"


def hint(yardstick: Yardstick, first: str) -> str | None:
    """What to say of a wrong trace whose error looks like 8 bits: in every product of weights, at every token, and no
    more than 8 bits explain. first: its first wrong tensor.
    """
    if first.split(".")[-1] not in PRODUCTS:  # it does not begin with weights
        return None
    found = own_errors(yardstick, eight_bit_weights(yardstick.exact))
    rows = [row for row in found if row.name.split(".")[-1] in PRODUCTS[1:-1]]
    if len(rows) < 6 or not all(row.ok and row.everywhere for row in rows):
        return None
    return (
        f"{yardstick.given.name}: every product of weights is off by itself, everywhere, and by no more than 8 bits "
        "explain. If the port is quantised, use `minibert diff --quantised`, which measures each step by 8 bits"
    )
