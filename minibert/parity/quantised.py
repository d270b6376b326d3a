"""A quantised port: which of its steps are wrong by more than 8 bits explain.

Rounding errors are handed on, so a tensor's distance from the truth says little about the step that gave it. Here each
step is computed again from what the trace itself has of the steps before it, so that what is left is the step's own
error. It is measured by what 8 bits do to that step: the weights, what it reads and what it gives are rounded to 8
bits, with one scale for a whole tensor, which is the coarsest that ports do. A step without weights that is further off
is no quantisation, but a fault.
"""

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from minibert.masked_lm import BertForMaskedLM
from minibert.parity.faults import CATALOGUE
from minibert.parity.report import Report
from minibert.parity.steps import Steps
from minibert.parity.yardstick import Error, Gap, Yardstick, largest
from minibert.trace.table import GRADIENT, SHAPES, Inputs, covered, explain, hide_padding, row_of
from minibert.trace.tracefile import Trace

PRODUCTS = ("sum", "query", "key", "value", "attention_output", "intermediate", "feed_forward", "dense", "logits")
ALLOWED = 4.0  # times what 8 bits do: kernels sum in other orders, and some round to 7 bits (torch's on AVX2)
NAMED = 0.5  # a fault is named if with it the wrong step's own error is at most this part of what it is without
LEVELS = 256  # so many different numbers has a tensor of 8 bits
MARGIN = 0.1  # of the positions, on top of what 8 bits tip over and of three standard deviations


class FromTrace(Steps):
    """Every step reads what the trace has. own: by name, what it gives; whoever runs the steps takes it out."""

    def __init__(self, model: BertForMaskedLM, inputs: Inputs, given: Trace) -> None:
        super().__init__(model, inputs, given)
        self.own: dict[str, Tensor] = {}
        self.there = given.shapes()

    def made(self, name: str, x: Tensor) -> Tensor:
        self.own[name] = x = super().made(name, x)
        if self.there.get(name) != tuple(x.shape):
            return x
        self.given.settle(name, x)
        return torch.where(self.compared(name, x), self.given.read(name).to(x), x)

    def compared(self, name: str, x: Tensor) -> Tensor:
        return hide_padding(row_of(name), torch.ones_like(x), self.given.compared(name, self.seen)).bool()


class EightBits(FromTrace):
    """The same with 8 bits. The model's weights are rounded already."""

    def made(self, name: str, x: Tensor) -> Tensor:
        read = super().made(name, x)
        compared = self.compared(name, x)
        # An activation acts on each number alone; so its input is rounded for each token, unless the trace's is coarser
        own = self.own[name]
        self.fine = torch.where(compared, _rounded(torch.where(compared, read, 0.0), -1), read)
        axis = -1 if name.endswith("activation") and not self.coarse(name) else None
        self.own[name] = torch.where(compared, _rounded(torch.where(compared, own, 0.0), axis), own)
        return torch.where(compared, _rounded(torch.where(compared, read, 0.0)), read)

    def activation(self, x: Tensor) -> Tensor:
        return super().activation(x if self.coarse(self.section + "activation") else self.fine)

    def coarse(self, name: str) -> bool:
        return name not in self.there or self.given.read(name).unique().numel() <= LEVELS


def _rounded(x: Tensor, axis: int | None = None) -> Tensor:
    """To 8 bits with one scale for all, or for each token."""
    size = x.abs().amax() if axis is None else x.abs().amax(axis, keepdim=True)
    step = size.nan_to_num(0.0, 0.0, 0.0).clamp(min=1e-30) / 127
    return (x / step).round() * step


@dataclass(frozen=True)
class Measured:
    """One tensor. error: its root-mean-square distance from float64, divided by the truth's root mean square; times:
    that divided by the rounding of the trace's dtype. own: the error that its step makes by itself, likewise relative;
    share: the same, as a part of what 8 bits may do: above 1 it is wrong. everywhere: whether it is in every token.
    """

    name: str
    error: float
    times: float
    own: float
    share: float
    everywhere: bool

    @property
    def ok(self) -> bool:
        return self.share <= 1

    def cells(self) -> dict[str, str]:
        numbers = {"error": f"{self.error:.1e}", "its step's own": f"{self.own:.1e}"}
        of = {"of what 8 bits may do": f"{self.share:.2f}"}
        return {"tensor": self.name, **numbers, **of, "verdict": "ok" if self.ok else "wrong"}

    def to_dict(self) -> dict[str, object]:
        return {**asdict(self), "ok": self.ok}


class Quantised:
    """Measures the steps of one trace. Raises ValueError if it is of a model of another size, or has only inputs."""

    def __init__(self, given: Trace, model: BertForMaskedLM) -> None:
        self.given, self.shapes = given, given.shapes()
        self.yardstick = Yardstick(model, given, grad=False)
        self.inputs = self.yardstick.inputs
        self.mask = self.inputs.attention_mask.bool()
        self.exact = self.yardstick.exact
        self.eight = deepcopy(self.exact)
        with torch.no_grad():
            for parameter in self.eight.parameters():
                if parameter.dim() == 2:
                    parameter.copy_(_rounded(parameter))

    def there(self, name: str) -> Tensor:
        return self.hidden(name, self.given.read(name).to(self.mask.device)).double()

    def hidden(self, name: str, x: Tensor) -> Tensor:
        return hide_padding(row_of(name), x, self.given.compared(name, self.mask))

    def own_errors(self, kind: type[Steps] = Steps) -> Iterator[tuple[str, float, float, bool]]:
        """(name, own error, share, everywhere), as Measured has them. kind: a fault that the steps shall have."""
        exact, eight = (
            type(each.__name__, (each, kind) if kind is not Steps else (each,), {})(model, self.inputs, self.given)
            for each, model in ((FromTrace, self.exact), (EightBits, self.eight))
        )
        for (name, one), (_, two) in zip(exact.run(), eight.run(), strict=True):
            truth, own = exact.own.pop(name, one), eight.own.pop(name, two)
            if name not in self.shapes:
                continue
            truth, own, x = self.hidden(name, truth), self.hidden(name, own), self.there(name)
            scale = largest(truth) or 1.0
            error, explained = _error(x, truth, scale), _error(own, truth, scale)
            eps = torch.finfo(self.given.dtype).eps
            allowed = [max(ALLOWED * each, 8 * eps) for each in explained]
            shares = [each / most for each, most in zip(error, allowed, strict=True)]
            share = float("inf") if not bool(x.isfinite().all()) else max(shares)
            rms = (truth.square().mean().sqrt().item() or 1.0) / scale
            yield name, error.rms / rms, share, self._everywhere(name, x - truth, 8 * eps * scale)

    def _everywhere(self, name: str, gap: Tensor, limit: float) -> bool:
        """Whether nine of ten tokens are off by more than rounding."""
        if gap.dim() < 3:
            return True
        tokens = gap.transpose(1, 2) if SHAPES[row_of(name)][1] == "H" else gap
        off = tokens[self.given.compared(name, self.mask)].flatten(1).abs().amax(1) > limit
        return off.double().mean().item() >= 0.9


def _error(x: Tensor, truth: Tensor, scale: float) -> Error:
    gap = Gap()
    gap.add(x, truth)
    return gap.relative(scale)


def quantised(given: Trace, model: BertForMaskedLM) -> Report:
    """Measure a quantised port's trace. Raises ValueError if it is of a model of another size, or has only inputs.

    more: `worst`, the step that adds the most error; and if there are logits, `top1`, the share of `positions` whose
    likeliest word is the same, and `divergence`, how far the probabilities are from the right ones in the mean
    (Kullback-Leibler, in nats).
    """
    report = Report((given.title,))
    measured = Quantised(given, model)
    errors = _errors(measured)
    for name, own, share, everywhere in measured.own_errors():
        report.rows.append(Measured(name, *errors[name], own, share, everywhere))
    if not report.rows:
        raise ValueError(f"{given.name} has only inputs: there is nothing to measure")
    worst = max(report.rows, key=lambda row: row.own if row.own == row.own else float("inf"))
    report.more["worst"] = worst.name
    first = next((row for row in report.rows if not row.ok), None)
    if first is not None:
        report.ok, report.first_wrong = False, first.name
        report.summary += _accusation(measured, first)
    if "logits" in errors:
        report.summary += _answers(report, measured)
    if said := given.layouts():
        report.summary.append(said)
    if report.ok:
        report.summary += [
            f"no step is wrong by more than 8 bits explain. {worst.name} adds the most: {worst.own:.1e} of its size",
            "whether all that is too much, a task has to say",
            covered(measured.inputs, model.config),
        ]
    return report


def _errors(measured: Quantised) -> dict[str, tuple[float, float]]:
    """By name, a tensor's distance from float64, relative to its size, and in roundings of its dtype."""
    given, shapes, found = measured.given, measured.shapes, {}
    for measure in measured.yardstick.measures():
        name = measure.name
        if name not in shapes or name.startswith(GRADIENT):
            continue
        if shapes[name] != tuple(measure.truth.shape):
            raise ValueError(
                f"{given.name}: {name} is {shapes[name]}, and this model's is {tuple(measure.truth.shape)}: the shapes "
                "must agree first (`minibert diff` says how)"
            )
        given.settle(name, measure.truth)
        size = measure.truth.double().square().mean().sqrt().item() or 1.0
        x = measured.there(name)
        found[name] = (x - measure.truth).square().mean().sqrt().item() / size, measure.times(measure.error(x))
    return found


def _accusation(measured: Quantised, first: Measured) -> Iterator[str]:
    yield f"first wrong: {first.name} ({explain(first.name)})"
    x = measured.there(first.name)
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
        shares, own = [], first.own
        for name, error, share, _ in measured.own_errors(fault):
            shares.append(share)
            own = error if name == first.name else own
            if not share <= 1:
                break
        if shares and max(shares) <= 1 and own <= NAMED * first.own:
            tried.append((own, fault))
    best = min((own for own, _ in tried), default=0.0)
    for own, fault in tried:
        if own <= 1.5 * best:
            yield f"{fault.title}: with this fault, no step is further off than 8 bits explain"
            yield f"  {fault.remedy} (source: {fault.source})"


def _answers(report: Report, measured: Quantised) -> Iterator[str]:
    """What the error does to the words, and whether no task could accept that."""
    simulated = EightBits(measured.eight, measured.inputs, Trace({}, measured.given.config, measured.given.metadata))
    truth, eight = (
        next(x for name, x in steps.run() if name == "logits")
        for steps in (Steps(measured.exact, measured.inputs, measured.given), simulated)
    )
    x, there = measured.there("logits"), measured.given.compared("logits", measured.mask)
    same, expected = ((each.argmax(-1) == truth.argmax(-1)) for each in (x, eight))
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


def hint(given: Trace, model: BertForMaskedLM, first: str) -> str | None:
    """What to say of a wrong trace whose error looks like 8 bits: in every product of weights, at every token, and no
    more than 8 bits explain. first: its first wrong tensor.
    """
    if first.split(".")[-1] not in PRODUCTS:  # it does not begin with weights
        return None
    try:
        measured = Quantised(given, model)
        rows = [row for row in measured.own_errors() if row[0].split(".")[-1] in PRODUCTS[1:-1]]
    except ValueError:
        return None
    if len(rows) < 6 or not all(share <= 1 and everywhere for _, _, share, everywhere in rows):
        return None
    return (
        f"{given.name}: every product of weights is off by itself, everywhere, and by no more than 8 bits explain. If "
        "the port is quantised, use `minibert diff --quantised`, which measures each step by 8 bits"
    )
