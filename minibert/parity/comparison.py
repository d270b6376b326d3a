"""Comparing two traces, tensor by tensor in order of execution, up to the first that is wrong: how far apart they are,
which is wrong, and what there is to say about it.

One tensor of each is read at a time, and a model computes beside them layer by layer. So memory is bounded by the
largest tensor and by the model, not by the traces.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import combinations

import torch
from torch import Tensor

from minibert.checkpoint.names import some
from minibert.masked_lm import BertForMaskedLM
from minibert.parity.appearance import Wrong, appearance
from minibert.parity.diagnosis import hidden_faults
from minibert.parity.fewer_bits import hint, lower_precision
from minibert.parity.report import Line, Report
from minibert.parity.yardstick import (
    Error,
    Measure,
    Yardstick,
    converted,
    error_of,
    is_half,
    largest,
    require_same_size,
)
from minibert.trace.recorder import trace
from minibert.trace.table import (
    GRADIENT,
    INPUTS,
    Inputs,
    between,
    count,
    covered,
    dtype_name,
    exchanged_axes,
    expected_names,
    expected_shape,
    hide_padding,
    shown,
)
from minibert.trace.tracefile import Trace

# Without a model there is no truth to measure from. Then two right traces differ by at most so many eps of the coarser
# dtype: the first number, and the second for every layer, which hands the errors on (twice, for gradients). In half
# precision it is fewer eps, because there more of the error is that of single roundings.
FLOAT, HALF = (64, 64), (16, 8)


def diff(a: Trace, b: Trace, model: BertForMaskedLM | None = None, *, everything: bool = False) -> Report:
    """Compare two traces up to the first tensor that differs, or all of them with `everything`.

    With the `model` that both are traces of, each is measured from the same computation in float64
    (yardstick.py) and the report says which is wrong; without, from each other. Raises ValueError if one has no
    usable inputs, is of another model's size, or was asked something else than the other.
    """
    report, inputs = Report((a.title, b.title), notes=list(_config_notes(a, b))), _same_inputs(a, b)
    names, notes = _in_both(a, b)
    report.notes += notes
    judge = Judge(a, b, inputs, model, grad=any(name.startswith(GRADIENT) for name in names))
    last_good = "the inputs"
    for name in names:
        row = judge.row(name)
        report.rows.append(row)
        if report.ok and row.ok:
            last_good = name
        elif report.ok:
            report.ok, report.first_wrong = False, name
            report.summary += [f"first wrong: {name}. The last good one is {last_good}", *judge.accuse(row, last_good)]
            if model is not None:
                report.summary += _fewer_bits(a, b, row, model)
        if not report.ok and not everything:
            break
    report.notes += [f"note: {said}" for side in (a, b) if (said := side.layouts())]
    if report.ok:
        report.summary += judge.acquit(report.rows)
    return report


def own_trace(model: BertForMaskedLM, given: Trace) -> Trace:
    """What `model` computes from the inputs of a trace, in its dtype, with gradients if the trace has some."""
    require_same_size(model, given)
    inputs, _ = given.inputs()
    grad = inputs.labels is not None and any(name.startswith(GRADIENT) for name in given.shapes())
    result = trace(converted(model, given.dtype), *inputs, grad=grad)
    result.name = "--model"
    return result


@dataclass(frozen=True)
class Compared(Line):
    """One tensor in both traces.

    relative: max_abs, divided by the tensor's scale. first: the first index where the two differ by more than the
    tolerance. errors: the distance of A and of B from float64, if there is a model; allowed: what their dtypes may do.
    verdict: "ok", or what is wrong. Numbers are None where the shapes do not fit.
    """

    shape: tuple[int, ...]
    verdict: str
    max_abs: float | None = None
    relative: float | None = None
    cosine: float | None = None
    first: tuple[int, ...] | None = None
    errors: tuple[Error, ...] | None = None
    allowed: tuple[Error, ...] | None = None

    @property
    def ok(self) -> bool:
        return self.verdict == "ok"

    def cells(self) -> dict[str, str]:
        result = {"tensor": self.name, "shape": _words(self.shape), "max abs": "-", "relative": "-", "cosine": "-"}
        if self.max_abs is not None:
            result |= {"max abs": f"{self.max_abs:.1e}", "relative": f"{self.relative:.1e}"}
            result["cosine"] = f"{self.cosine:.6f}"
        if self.errors and self.allowed:
            numbers = (*self.errors, max(self.allowed))
            names = ("A to f64", "B to f64", "allowed")
            result |= {name: f"{error.largest:.1e}" for name, error in zip(names, numbers, strict=True)}
        where = f", first at {self.first}" if self.first is not None else ""
        return {**result, "verdict": f"{self.verdict}{where}"}

    def to_dict(self) -> dict[str, object]:
        values = super().to_dict()
        for key, pair in (("errors", self.errors), ("allowed", self.allowed)):
            values[key] = pair and {side: each._asdict() for side, each in zip("AB", pair, strict=True)}
        return values


class Judge:
    """Compares the tensors of two traces. It must be asked for them in order of execution."""

    def __init__(self, a: Trace, b: Trace, inputs: Inputs, model: BertForMaskedLM | None, grad: bool) -> None:
        self.a, self.b, self.inputs, self.model = a, b, inputs, model
        self.shapes = a.shapes(), b.shapes()
        self.coarser = max((a.dtype, b.dtype), key=lambda dtype: torch.finfo(dtype).eps)
        self.loudest = 0.0  # of the gradients so far
        sides = (a,) if a.dtype == b.dtype else (a, b)  # one yardstick for both, if it is the same
        self.yardsticks = [] if model is None else [Yardstick(model, side, grad=grad) for side in sides]
        self.running = [each.measures() for each in self.yardsticks]
        self.measured: list[dict[str, Measure]] = [{} for _ in self.yardsticks]  # without the truth
        self.sticks: list[Measure] = []  # of A and of B, for the tensor that is looked at; none without a model

    def row(self, name: str) -> Compared:
        self._measure(name)
        shape, other = (shapes[name] for shapes in self.shapes)
        wanted = self._wanted(name)
        if shape != wanted or other != wanted:
            return Compared(name, shape, self._transposed(name) or _wrong_shapes(shape, other, wanted))
        x, y = self._both(name)
        apart, scale = error_of(x, y).largest, max(largest(x), largest(y))
        if name.startswith(GRADIENT):
            scale = self.loudest = max(self.loudest, scale)
        scale = scale or 1.0
        limit = self._tolerance(name) * scale
        right = [apart <= limit] * 2
        errors = allowed = None
        if self.sticks:
            pairs = list(zip((x, y), self.sticks, strict=True))
            errors = tuple(stick.error(each) for each, stick in pairs)
            if not all(stick.accepts(error) for error, stick in zip(errors, self.sticks, strict=True)):
                self.sticks = [self.yardsticks[place].shaken(self.sticks[place]) for place in (0, -1)]
            right = [stick.accepts(error) for error, stick in zip(errors, self.sticks, strict=True)]
            allowed = tuple(stick.allowed for stick in self.sticks)
            limit = max(each.largest for each in allowed) * self.sticks[0].scale
        verdict = self._verdict(name, [bool(each.isfinite().all()) for each in (x, y)], right)
        first = None
        if verdict != "ok" and x.dim():
            found = (~((x - y).abs() <= limit)).nonzero()
            first = tuple(found[0].tolist()) if len(found) else None
        return Compared(name, shape, verdict, apart, apart / scale, _cosine(x, y), first, errors, allowed)

    def _measure(self, name: str) -> None:
        """Take the yardsticks on to this tensor."""
        found = [next(measure for measure in each if measure.name == name) for each in self.running]
        for measured, measure in zip(self.measured, found, strict=True):
            measured[name] = measure._replace(truth=torch.empty(0))
        if found:
            sides = ((self.a, found[0]), (self.b, found[-1]))
            for side, stick in sides:
                side.settle(name, stick.truth)
            self.sticks = [
                stick.stored_in(side.stored_dtype(name), side.dtype)._replace(
                    truth=hide_padding(name, stick.truth.cpu(), self._compared(name))
                )
                for side, stick in sides
            ]

    def _both(self, name: str) -> list[Tensor]:
        """The tensor of A and of B, with zeros where nothing is compared."""
        if not self.sticks:
            self.b.settle(name, self.a.read(name))
        mask = self._compared(name)
        found = [hide_padding(name, side.read(name), mask) for side in (self.a, self.b)]
        return [x if x.dtype == torch.float64 else x.float() for x in found]

    def _compared(self, name: str) -> Tensor:
        """(B, S): where both traces have this tensor."""
        return self.b.compared(name, self.a.compared(name, self.inputs.attention_mask.bool()))

    def _wanted(self, name: str) -> tuple[int, ...]:
        return expected_shape(name, self.a.config, tuple(self.inputs.input_ids.shape))

    def _verdict(self, name: str, finite: list[bool], right: list[bool]) -> str:
        if not all(finite):
            return f"NaN or infinity in {' and '.join(side for side, ok in zip('AB', finite, strict=True) if not ok)}"
        if all(right):
            return "ok"
        said = "differs"
        if self.sticks:
            said = "both wrong" if not any(right) else f"{'AB'[right.index(False)]} is wrong"
        return self._transposed(name) or said

    def _transposed(self, name: str) -> str | None:
        """What to say if one tensor is the other with two axes exchanged; None if it is not."""
        shape, other = (shapes[name] for shapes in self.shapes)
        if sorted(shape) != sorted(other):
            return None
        one, two = self.a.read(name).double(), self.b.read(name).double()
        wanted = self._wanted(name)
        # At a large tolerance, as of bfloat16, all sorts of tensors are each other's transpose.
        limit = min(self._tolerance(name), 0.02) * (largest(one) or 1.0)
        for i, j in combinations(range(one.dim()), 2):
            # The padding is known in the layout of the table only: turn the one that has another.
            pair = [one, two.transpose(i, j)] if shape == wanted else [one.transpose(i, j), two]
            if all(x.shape == wanted for x in pair):
                first, second = (hide_padding(name, x, self._compared(name)) for x in pair)
                if error_of(first, second).largest <= limit:
                    return f"B is A transposed: axes {i} and {j} are exchanged"
        return None

    def _tolerance(self, name: str) -> float:
        """How far two right traces may be apart without a model, relative to the tensor's scale."""
        layer = int(name.split(".")[1]) if name.startswith("layers.") else 0
        if name.startswith(("head.", "logits", "loss", GRADIENT)):
            layer = self.a.config.num_hidden_layers * (2 if name.startswith(GRADIENT) else 1)
        first, each = HALF if is_half(self.coarser) else FLOAT
        return (first + each * layer) * torch.finfo(self.coarser).eps

    def accuse(self, row: Compared, last_good: str) -> Iterator[str]:
        """What there is to say about the first wrong tensor."""
        forward = [name for name in expected_names(self.a.config) if not name.startswith((GRADIENT, *INPUTS, "loss"))]
        absent = [side for side, shapes in zip("AB", self.shapes, strict=True) if set(forward) - shapes.keys()]
        shared = self.shapes[0].keys() & self.shapes[1].keys()
        yield from between(self.a.config, last_good, row.name, shared, " and ".join(absent) or "B")
        if row.max_abs is not None and "exchanged" not in row.verdict:
            yield from self._described(row)
        if not self.sticks:
            yield f"which of the two is wrong, only a model can tell (--model); {self._without_model(row.name)}"
            return
        sides = list(zip("AB", (self.a, self.b), row.errors or (), self.sticks, strict=False))
        for side, given, error, stick in sides:
            kind = stick.kind(error)
            if not error.largest < float("inf"):
                said = f"has NaN or infinity from {row.name} on, where float64 has numbers"
            elif stick.accepts(error):
                said = f"is right up to here: {error.largest:.1e} from float64, allowed {stick.allowed.largest:.1e}"
            else:
                said = (
                    f"is {stick.times(error):,.0f} times worse than {dtype_name(given.dtype)} explains, from "
                    f"{row.name} on: {getattr(error, kind):.1e} from float64, where rounding makes "
                    f"{getattr(stick.explained, kind):.1e}{' (root mean square)' if kind == 'rms' else ''}"
                )
            yield f"{side} {said} ({given.title})"
        both_wrong = sides and not any(stick.accepts(error) for _, _, error, stick in sides)
        if both_wrong and row.relative is not None and row.relative <= self._tolerance(row.name):
            yield "but A and B agree with each other: are these the weights of --model?"

    def _described(self, row: Compared) -> Iterator[str]:
        """What the error looks like. Without a model, the difference of B from A."""
        name, mask, (x, y) = row.name, self._compared(row.name), self._both(row.name)
        if not self.sticks:
            limit = self._tolerance(name) * (largest(x) or 1.0)
            for said in appearance(Wrong(self.b, name, y, x, Error(limit, limit / 3), mask)):
                yield f"B beside A: {said}"
        sides = zip("AB", (self.a, self.b), (x, y), row.errors or (), self.sticks, strict=False)
        for side, given, each, error, stick in sides:
            if not stick.accepts(error):
                for said in appearance(Wrong(given, name, each, stick.truth, stick.limits, mask, self.model)):
                    yield f"{side}: {said}"

    def acquit(self, rows: list[Compared]) -> Iterator[str]:
        forward = [row for row in rows if not row.name.startswith(GRADIENT)]
        last = next((row for row in rows if row.name == "logits"), (forward or rows)[-1])
        if last.errors is None:
            yield f"no difference in {count(len(rows))}; {self._without_model(last.name)}"
        else:
            dtypes = " and ".join(dict.fromkeys((dtype_name(self.a.dtype), dtype_name(self.b.dtype))))
            yield (
                f"{last.name}: A {last.errors[0].largest:.1e}, B {last.errors[1].largest:.1e} from float64: both right "
                f"for {dtypes} ({count(len(rows))})"
            )
        yield covered(self.inputs, self.a.config)
        for side, measured in zip(self.yardsticks, self.measured, strict=True):
            yield from hidden_faults(side, measured)

    def _without_model(self, name: str) -> str:
        tolerance = self._tolerance(name)
        roundings = tolerance / torch.finfo(self.coarser).eps
        said = f"the tolerance was {roundings:.0f} roundings of {dtype_name(self.coarser)}, {tolerance:.1e}"
        if tolerance >= 1:
            return (
                f"{said}: so deep in a model, two right traces in this dtype may have nothing in common. Give --model"
            )
        if tolerance < 0.01:
            return said
        return f"{said}, which hides small faults: --model, or traces in float32, show more"


def _words(shape: tuple[int, ...]) -> str:
    return " ".join(str(length) for length in shape) or "-"


def _cosine(x: Tensor, y: Tensor) -> float:
    one, two = x.reshape(-1).double(), y.reshape(-1).double()
    a, b = one.norm().item(), two.norm().item()
    return one.dot(two).item() / (a * b) if a and b else float(a == b)


def _fewer_bits(a: Trace, b: Trace, first: Compared, model: BertForMaskedLM) -> Iterator[str]:
    """Whether the trace that is further off at the first wrong tensor was computed with fewer bits than it says."""
    for given, error in zip((a, b), first.errors or (), strict=False):
        if error == max(first.errors or ()):
            own = Yardstick(model, given, grad=False)
            if (lowered := lower_precision(own, first.name)) is not None:
                yield from lowered.lines
            elif said := hint(own, first.name):
                yield said


def _wrong_shapes(shape: tuple[int, ...], other: tuple[int, ...], wanted: tuple[int, ...]) -> str:
    said = f"the shape is {_words(shape)} in A and {_words(other)} in B, and should be {_words(wanted)}"
    for side, stored in (("A", shape), ("B", other)):
        if axes := exchanged_axes(stored, wanted):
            said += f": exchange axes {axes[0]} and {axes[1]} of {side}"
    return said


def _config_notes(a: Trace, b: Trace) -> Iterator[str]:
    mine, others = asdict(a.config), asdict(b.config)
    for key, value in mine.items():
        if value != others[key]:
            yield f"note: {key} is {value!r} in A's config and {others[key]!r} in B's"


def _same_inputs(a: Trace, b: Trace) -> Inputs:
    """A's inputs. Raises ValueError if the two were asked different things."""
    (inputs, _), (others, _) = a.inputs(), b.inputs()
    for name, mine, other in zip(INPUTS, inputs, others, strict=True):
        if mine is None or other is None:  # labels: nothing before the loss depends on them
            continue
        if mine.shape != other.shape:
            said = f"{name} is {tuple(mine.shape)} in A and {tuple(other.shape)} in B"
        elif bool((mine != other).any()):
            place = tuple((mine != other).nonzero()[0].tolist())
            said = f"{name} at {place} is {int(mine[place])} in A and {int(other[place])} in B"
        else:
            continue
        raise ValueError(
            f"the two models were asked different things: {said} (A is {a.name}, B is {b.name}). "
            "Trace both on the same inputs"
        )
    return inputs


def _in_both(a: Trace, b: Trace) -> tuple[list[str], list[str]]:
    """The tensors that can be compared, in order of execution, and notes on the others. Raises ValueError if there are
    none.
    """
    shapes, notes, known = {"A": a.shapes(), "B": b.shapes()}, [], expected_names(a.config)
    for side, other in ("AB", "BA"):
        if lost := sorted(shapes[other].keys() & set(known) - shapes[side].keys() - set(INPUTS)):
            notes.append(f"note: {side} does not have {some(lost)}")
        if extra := sorted(shapes[side].keys() - set(known)):
            notes.append(f"note: {side} has {shown(some(extra))}, which no trace of this model has; not compared")
    names = [name for name in known if name not in INPUTS and all(name in each for each in shapes.values())]
    unlabelled = [side for side in "AB" if "labels" not in shapes[side]]
    if unlabelled:
        without = [name for name in names if name != "loss" and not name.startswith(GRADIENT)]
        if len(unlabelled) == 1 or without != names:
            notes.append(f"note: no labels in {' and '.join(unlabelled)}: loss and gradients are not compared")
        names = without
    if not names:
        raise ValueError(
            f"{a.name} and {b.name} have no tensor in common but their inputs: there is nothing to compare"
        )
    return names, notes
