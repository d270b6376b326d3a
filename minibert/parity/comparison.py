"""Comparing two traces, tensor by tensor in order of execution, up to the first that is wrong: how far apart they are,
which is wrong, and what there is to say about it.

Files are read in pieces of some rows, and a model computes beside them layer by layer. So memory is bounded by the
largest tensor and by the model, not by the traces.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from itertools import combinations
from math import prod

import torch
from torch import Tensor

from minibert.checkpoint.names import some
from minibert.masked_lm import BertForMaskedLM
from minibert.parity import yardstick
from minibert.parity.appearance import Wrong, appearance
from minibert.parity.diagnosis import hidden_faults
from minibert.parity.fewer_bits import hint, lower_precision
from minibert.parity.report import Line, Report, between, count, shape_words
from minibert.parity.yardstick import (
    Error,
    Gap,
    Measure,
    Yardstick,
    converted,
    error_of,
    is_half,
    largest,
    require_same_size,
    span,
)
from minibert.trace.recorder import trace
from minibert.trace.stores import shown
from minibert.trace.table import (
    GRADIENT,
    INPUTS,
    covered,
    dtype_name,
    exchanged_axes,
    expected_names,
    expected_shape,
    hide_padding,
)
from minibert.trace.tracefile import Trace

# Without a model there is no truth to measure from. Then two right traces differ by at most so many eps of the coarser
# dtype: the first number, and the second for every layer, which hands the errors on (twice, for gradients). In half
# precision it is fewer eps, because there more of the error is that of single roundings. tests/parity/calibrate.py
# measures how far right traces are apart.
FLOAT, HALF = (64, 64), (16, 8)


def diff(a: Trace, b: Trace, model: BertForMaskedLM | None = None, *, everything: bool = False) -> Report:
    """Compare two traces up to the first tensor that differs, or all of them with `everything`.

    With the `model` that both are traces of, each is measured from the same computation in float64
    (yardstick.py) and the report says which is wrong; without, from each other. Raises ValueError if one has no
    usable inputs, is of another model's size, or was asked something else than the other.
    """
    report = Report((a.title, b.title), notes=list(_config_notes(a, b)))
    (inputs, _), (others, _) = a.inputs(), b.inputs()
    for name, mine, other in zip(INPUTS, inputs, others, strict=True):
        if (said := _different_inputs(name, mine, other)) is not None:
            raise ValueError(
                f"the two models were asked different things: {said} (A is {a.name}, B is {b.name}). "
                "Trace both on the same inputs"
            )
    shapes = a.shapes(), b.shapes()
    report.notes += _absent(a, *shapes)
    names = [name for name in expected_names(a.config) if all(name in each for each in shapes) and name not in INPUTS]
    unlabelled = [side for side, given in zip("AB", (inputs, others), strict=True) if given.labels is None]
    if unlabelled:
        without = [name for name in names if name != "loss" and not name.startswith(GRADIENT)]
        if len(unlabelled) == 1 or without != names:
            report.notes.append(f"note: no labels in {' and '.join(unlabelled)}: loss and gradients are not compared")
        names = without
    if not names:
        raise ValueError(
            f"{a.name} and {b.name} have no tensor in common but their inputs: there is nothing to compare"
        )
    judge = Judge(a, b, inputs.attention_mask.bool(), model, any(name.startswith(GRADIENT) for name in names))
    last_good = "the inputs"
    for name in names:
        row = judge.row(name)
        report.rows.append(row)
        if row.ok and report.ok:
            last_good = name
        elif not row.ok and report.ok:
            report.ok, report.first_wrong = False, name
            report.summary += judge.accuse(row, last_good)
        if not report.ok and not everything:
            break
    report.notes += [f"note: {said}" for side in (a, b) if (said := side.layouts())]
    if report.ok:
        report.summary += judge.acquit(report.rows)
    elif model is not None:
        report.summary += _fewer_bits(a, b, next(row for row in report.rows if not row.ok), model)
    return report


def _fewer_bits(a: Trace, b: Trace, first: "Compared", model: BertForMaskedLM) -> Iterator[str]:
    """Whether the trace that is further off at the first wrong tensor was computed with fewer bits than it says."""
    for given, error in zip((a, b), first.errors or (), strict=False):
        if error == max(first.errors or ()):
            own = Yardstick(model, given, grad=False)
            if (lowered := lower_precision(own, first.name)) is not None:
                yield from lowered.lines
            elif said := hint(own, first.name):
                yield said


def own_trace(model: BertForMaskedLM, given: Trace) -> Trace:
    """What `model` computes from the inputs of a trace, in its dtype, with gradients if the trace has some."""
    require_same_size(model, given)
    inputs, _ = given.inputs()
    asked = {name: x for name, x in zip(INPUTS, inputs, strict=True) if x is not None}
    grad = "labels" in asked and any(name.startswith(GRADIENT) for name in given.shapes())
    result = trace(converted(model, given.dtype), **asked, grad=grad)
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
    max_abs: float | None
    relative: float | None
    cosine: float | None
    first: tuple[int, ...] | None
    verdict: str
    errors: tuple[Error, ...] | None = None
    allowed: tuple[Error, ...] | None = None

    @property
    def ok(self) -> bool:
        return self.verdict == "ok"

    def cells(self) -> dict[str, str]:
        result = {"tensor": self.name, "shape": shape_words(self.shape), "max abs": "-", "relative": "-", "cosine": "-"}
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

    def __init__(self, a: Trace, b: Trace, mask: Tensor, model: BertForMaskedLM | None, grad: bool) -> None:
        self.a, self.b, self.mask, self.model = a, b, mask, model
        self.shapes = a.shapes(), b.shapes()
        self.coarser = max((a.dtype, b.dtype), key=lambda dtype: torch.finfo(dtype).eps)
        self.loudest = 0.0  # of the gradients so far
        sides = (a,) if a.dtype == b.dtype else (a, b)  # one yardstick for both, if it is the same
        self.yardsticks = [] if model is None else [Yardstick(model, side, grad=grad) for side in sides]
        self.running = [each.measures() for each in self.yardsticks]
        self.measured: list[dict[str, Measure]] = [{} for _ in self.yardsticks]  # without the truth
        self.sticks: list[Measure] = []  # of A and of B, for the tensor that is looked at; none without a model

    def row(self, name: str) -> Compared:
        self.measure(name)
        shape, other = (shapes[name] for shapes in self.shapes)
        wanted = expected_shape(name, self.a.config, tuple(self.mask.shape))
        if shape != wanted or other != wanted:
            said = self.transposed(name) or _wrong_shapes(shape, other, wanted)
            return Compared(name, shape, None, None, None, None, said)
        if not self.sticks:
            self.b.settle(name, self.a.read(name))
        sums = self.sums(name)
        scale = sums.scale
        if name.startswith(GRADIENT):
            scale = self.loudest = max(self.loudest, scale)
        scale = scale or 1.0
        row = Compared(name, shape, sums.max_abs, sums.max_abs / scale, sums.cosine, None, "ok")
        tolerance = self.tolerance(name)
        wrong = ["A", "B"] if sums.max_abs / scale > tolerance else []
        if self.sticks:
            errors = [gap.relative(stick.scale) for gap, stick in zip(sums.gaps, self.sticks, strict=True)]
            if not all(stick.accepts(error) for error, stick in zip(errors, self.sticks, strict=True)):
                self.sticks = [self.yardsticks[place].shaken(self.sticks[place]) for place in (0, -1)]
            compared = zip("AB", errors, self.sticks, strict=True)
            wrong = [side for side, error, stick in compared if not stick.accepts(error)]
            row = replace(row, errors=tuple(errors), allowed=tuple(stick.allowed for stick in self.sticks))
            tolerance, scale = max(stick.allowed.largest for stick in self.sticks), self.sticks[0].scale
        if not all(sums.finite):
            without = " and ".join(side for side, ok in zip("AB", sums.finite, strict=True) if not ok)
            wrong, row = wrong or ["A", "B"], replace(row, verdict=f"NaN or infinity in {without}")
        elif wrong:
            verdict = "differs"
            if self.sticks:
                verdict = "both wrong" if len(wrong) == 2 else f"{wrong[0]} is wrong"
            row = replace(row, verdict=self.transposed(name) or verdict)
        return replace(row, first=self.first(name, tolerance * scale)) if wrong else row

    def measure(self, name: str) -> None:
        """Take the yardsticks on to this tensor."""
        found = [next(measure for measure in each if measure.name == name) for each in self.running]
        for measured, measure in zip(self.measured, found, strict=True):
            measured[name] = measure._replace(truth=torch.empty(0))
        if found:
            sides = ((self.a, found[0]), (self.b, found[-1]))
            self.sticks = [stick.stored_in(side.stored_dtype(name), side.dtype) for side, stick in sides]
            for side, stick in sides:
                side.settle(name, stick.truth)

    def pieces(self, name: str) -> Iterator[tuple[int, Tensor, Tensor, list[Tensor]]]:
        """(first row, A's rows, B's rows, [each one's truth]), zeros in the padding."""
        shape = self.shapes[0][name]
        rows = shape[0] if shape else 1
        step = max(1, yardstick.PIECE // prod(shape[1:]))
        batched = len(shape) > 1 and shape[0] == self.mask.shape[0] and not name.startswith(GRADIENT)
        for start in range(0, rows, step):
            found = [side.rows(name, start, start + step) for side in (self.a, self.b)]
            found += [(stick.truth[start : start + step] if shape else stick.truth).cpu() for stick in self.sticks]
            if batched:
                mask = self.compared(name)[start : start + step]
                found = [hide_padding(name, x, mask) for x in found]
            one, two = (x if x.dtype == torch.float64 else x.float() for x in found[:2])
            yield start, one, two, found[2:]

    def compared(self, name: str) -> Tensor:
        """(B, S): where both traces have this tensor."""
        return self.b.compared(name, self.a.compared(name, self.mask))

    def sums(self, name: str) -> "_Sums":
        """The two tensors compared, piece by piece."""
        result = _Sums()
        for _, one, two, truths in self.pieces(name):
            result.add(one, two, truths)
        return result

    def first(self, name: str, tolerance: float) -> tuple[int, ...] | None:
        """The first index, in row-major order, where the two are further apart than `tolerance`, or not numbers."""
        for start, one, two, _ in self.pieces(name):
            apart = ~((one - two).abs() <= tolerance)
            if apart.dim() and bool(apart.any()):
                index = apart.nonzero()[0].tolist()
                return (start + index[0], *index[1:])
        return None

    def transposed(self, name: str) -> str | None:
        """What to say if one tensor is the other with two axes exchanged; None if it is not."""
        shape, other = (shapes[name] for shapes in self.shapes)
        if sorted(shape) != sorted(other):
            return None
        one, two = self.a.read(name).double(), self.b.read(name).double()
        wanted = expected_shape(name, self.a.config, tuple(self.mask.shape))
        # At a large tolerance, as of bfloat16, all sorts of tensors are each other's transpose.
        limit = min(self.tolerance(name), 0.02) * (largest(one) or 1.0)
        for i, j in combinations(range(one.dim()), 2):
            # The padding is known in the layout of the table only: turn the one that has another.
            pair = [one, two.transpose(i, j)] if shape == wanted else [one.transpose(i, j), two]
            if any(x.shape != wanted for x in pair):
                continue
            first, second = (hide_padding(name, x, self.compared(name)) for x in pair)
            if error_of(first, second).largest <= limit:
                return f"B is A transposed: axes {i} and {j} are exchanged"
        return None

    def tolerance(self, name: str) -> float:
        """How far two right traces may be apart without a model, relative to the tensor's scale."""
        layer = int(name.split(".")[1]) if name.startswith("layers.") else 0
        if name.startswith(("head.", "logits", "loss", GRADIENT)):
            layer = self.a.config.num_hidden_layers * (2 if name.startswith(GRADIENT) else 1)
        first, each = HALF if is_half(self.coarser) else FLOAT
        return (first + each * layer) * torch.finfo(self.coarser).eps

    def accuse(self, row: Compared, last_good: str) -> Iterator[str]:
        yield f"first wrong: {row.name}. The last good one is {last_good}"
        forward = [name for name in expected_names(self.a.config) if not name.startswith((GRADIENT, *INPUTS, "loss"))]
        absent = [side for side, shapes in zip("AB", self.shapes, strict=True) if set(forward) - shapes.keys()]
        shared = self.shapes[0].keys() & self.shapes[1].keys()
        yield from between(self.a.config, last_good, row.name, shared, " and ".join(absent) or "B")
        yield from self.described(row)
        if not self.sticks:
            yield f"which of the two is wrong, only a model can tell (--model); {self.without_model(row.name)}"
            return
        right = []
        for side, given, error, stick in zip("AB", (self.a, self.b), row.errors or (), self.sticks, strict=False):
            kind = "largest" if error.largest / stick.allowed.largest > error.rms / stick.allowed.rms else "rms"
            right += [side] if stick.accepts(error) else []
            if not error.largest < float("inf"):
                yield f"{side} has NaN or infinity from {row.name} on, where float64 has numbers ({given.title})"
            elif side in right:
                yield (
                    f"{side} is right up to here: {error.largest:.1e} from float64, allowed "
                    f"{stick.allowed.largest:.1e} ({given.title})"
                )
            else:
                yield (
                    f"{side} is {stick.times(error):,.0f} times worse than {dtype_name(given.dtype)} explains, from "
                    f"{row.name} on: {getattr(error, kind):.1e} from float64, where rounding makes "
                    f"{getattr(stick.explained, kind):.1e}{' (root mean square)' if kind == 'rms' else ''} "
                    f"({given.title})"
                )
        if row.errors and not right and row.relative is not None and row.relative <= self.tolerance(row.name):
            yield "but A and B agree with each other: are these the weights of --model?"

    def described(self, row: Compared) -> Iterator[str]:
        """What the error looks like. Without a model, the difference of B from A."""
        if row.max_abs is None or "exchanged" in row.verdict:
            return
        name, mask = row.name, self.compared(row.name)
        one, two = (hide_padding(name, side.read(name), mask) for side in (self.a, self.b))
        if not self.sticks:
            limit = self.tolerance(name) * (largest(one) or 1.0)
            for said in appearance(Wrong(self.b, name, two, one, Error(limit, limit / 3), mask)):
                yield f"B beside A: {said}"
        sides = zip("AB", (self.a, self.b), (one, two), row.errors or (), self.sticks, strict=False)
        for side, given, x, error, stick in sides:
            if not stick.accepts(error):
                limits = Error(*(each * stick.scale for each in stick.allowed))
                for said in appearance(Wrong(given, name, x, stick.truth.cpu(), limits, mask, self.model)):
                    yield f"{side}: {said}"

    def acquit(self, rows: list[Compared]) -> Iterator[str]:
        forward = [row for row in rows if not row.name.startswith(GRADIENT)]
        last = next((row for row in rows if row.name == "logits"), (forward or rows)[-1])
        if last.errors is None:
            yield f"no difference in {count(len(rows))}; {self.without_model(last.name)}"
        else:
            dtypes = " and ".join(dict.fromkeys((dtype_name(self.a.dtype), dtype_name(self.b.dtype))))
            yield (
                f"{last.name}: A {last.errors[0].largest:.1e}, B {last.errors[1].largest:.1e} from float64: both right "
                f"for {dtypes} ({count(len(rows))})"
            )
        yield covered(self.a.inputs()[0], self.a.config)
        for side, measured in zip(self.yardsticks, self.measured, strict=True):
            yield from hidden_faults(side, measured)

    def without_model(self, name: str) -> str:
        tolerance = self.tolerance(name)
        roundings = tolerance / torch.finfo(self.coarser).eps
        said = f"the tolerance was {roundings:.0f} roundings of {dtype_name(self.coarser)}, {tolerance:.1e}"
        if tolerance >= 1:
            return (
                f"{said}: so deep in a model, two right traces in this dtype may have nothing in common. Give --model"
            )
        if tolerance < 0.01:
            return said
        return f"{said}, which hides small faults: --model, or traces in float32, show more"


@dataclass
class _Sums:
    """What is added up while two tensors are compared piece by piece. gaps and finite: of A and of B."""

    max_abs: float = 0.0
    scale: float = 0.0
    dot: float = 0.0
    squares: tuple[float, float] = (0.0, 0.0)
    gaps: tuple[Gap, Gap] = field(default_factory=lambda: (Gap(), Gap()))
    finite: list[bool] = field(default_factory=lambda: [True, True])

    def add(self, one: Tensor, two: Tensor, truths: list[Tensor]) -> None:
        sizes = [span(one), span(two)]
        self.finite = [ok and size < float("inf") for ok, size in zip(self.finite, sizes, strict=True)]
        self.scale = max(self.scale, *(sizes if all(self.finite) else (largest(one), largest(two))))
        self.max_abs = max(self.max_abs, error_of(one, two).largest)
        flat_a, flat_b = one.reshape(-1).double(), two.reshape(-1).double()
        self.dot += flat_a.dot(flat_b).item()
        self.squares = (self.squares[0] + flat_a.dot(flat_a).item(), self.squares[1] + flat_b.dot(flat_b).item())
        for gap, x, truth in zip(self.gaps, (one, two), truths, strict=False):
            gap.add(x, truth)

    @property
    def cosine(self) -> float:
        a, b = self.squares
        return self.dot / (a**0.5 * b**0.5) if a and b else float(a == b)


def _wrong_shapes(shape: tuple[int, ...], other: tuple[int, ...], wanted: tuple[int, ...]) -> str:
    said = f"the shape is {shape_words(shape)} in A and {shape_words(other)} in B, and should be {shape_words(wanted)}"
    for side, stored in (("A", shape), ("B", other)):
        if axes := exchanged_axes(stored, wanted):
            said += f": exchange axes {axes[0]} and {axes[1]} of {side}"
    return said


def _config_notes(a: Trace, b: Trace) -> Iterator[str]:
    mine, others = asdict(a.config), asdict(b.config)
    for key, value in mine.items():
        if value != others[key]:
            yield f"note: {key} is {value!r} in A's config and {others[key]!r} in B's"


def _different_inputs(name: str, mine: Tensor | None, other: Tensor | None) -> str | None:
    if mine is None or other is None:  # labels: nothing before the loss depends on them
        return None
    if mine.shape != other.shape:
        return f"{name} is {tuple(mine.shape)} in A and {tuple(other.shape)} in B"
    apart = (mine != other).nonzero()
    if not len(apart):
        return None
    place = tuple(apart[0].tolist())
    return f"{name} at {place} is {int(mine[place])} in A and {int(other[place])} in B"


def _absent(a: Trace, shapes_a: dict[str, tuple[int, ...]], shapes_b: dict[str, tuple[int, ...]]) -> Iterator[str]:
    known = set(expected_names(a.config))
    for title, mine, others in (("A", shapes_a, shapes_b), ("B", shapes_b, shapes_a)):
        if lost := sorted(known & others.keys() - mine.keys() - set(INPUTS)):
            yield f"note: {title} does not have {some(lost)}"
        if extra := sorted(mine.keys() - known):
            yield f"note: {title} has {shown(some(extra))}, which no trace of this model has; not compared"
