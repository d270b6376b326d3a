"""Comparing two traces, tensor by tensor in order of execution, up to the first that is wrong.

Files are read in pieces of some rows, and a model computes beside them layer by layer: memory is bounded by the
largest tensor (and by the model), not by the traces.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor

from minibert.masked_lm import BertForMaskedLM
from minibert.parity import yardstick
from minibert.parity.trace import (
    GRADIENT,
    INPUTS,
    Trace,
    exchanged_axes,
    expected_names,
    expected_shape,
    explain,
    hide_padding,
    row_of,
)
from minibert.parity.yardstick import Measure, Yardstick, distance, largest, span

# Without a model there is no truth to measure from. Two right traces then differ by at most this many eps of the
# coarser dtype. Over 450 small random models, ours against transformers', it was 7.2 at most, and 11.5 in gradients
# (whose scale is the largest gradient so far, since small ones inherit its errors); deeper models hand on more.
ROUNDINGS = 64.0


@dataclass(frozen=True)
class Row:
    """One tensor in both traces. relative: max_abs by the tensor's scale. first: the first index where they differ by
    more than the tolerance. errors: of either trace from float64, relative to the scale, if there is a model;
    allowed: the same for what their dtypes may do. verdict: "ok", or what is wrong. Numbers are None where the shapes
    do not fit.
    """

    name: str
    shape: tuple[int, ...]
    max_abs: float | None
    relative: float | None
    cosine: float | None
    first: tuple[int, ...] | None
    verdict: str
    errors: tuple[float, float] | None = None
    allowed: tuple[float, float] | None = None

    @property
    def ok(self) -> bool:
        return self.verdict == "ok"


@dataclass
class Report:
    """What `diff` found. notes: what could not be compared, and other things to know. summary: the answer."""

    titles: tuple[str, str]
    notes: list[str] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    summary: list[str] = field(default_factory=list)
    ok: bool = True

    def to_dict(self) -> dict[str, object]:
        return asdict(self)

    def lines(self) -> Iterator[str]:
        yield f"A  {self.titles[0]}"
        yield f"B  {self.titles[1]}"
        yield from self.notes
        if self.rows:
            measured = self.rows[0].errors is not None
            width = max(len(row.name) for row in self.rows)
            shape_width = max(len(_shape(row.shape)) for row in self.rows)
            header = f"{'max abs':>8} {'relative':>8} {'cosine':>9}"
            extra = f" {'A to f64':>8} {'B to f64':>8} {'allowed':>8}" if measured else ""
            yield f"{'tensor':<{width}}  {'shape':<{shape_width}} {header}{extra}  verdict"
            for row in self.rows:
                extra = ""
                if row.errors and row.allowed:
                    extra = f" {row.errors[0]:>8.1e} {row.errors[1]:>8.1e} {max(row.allowed):>8.1e}"
                numbers = f"{'-':>8} {'-':>8} {'-':>9}"
                if row.max_abs is not None:
                    numbers = f"{row.max_abs:>8.1e} {row.relative:>8.1e} {row.cosine:>9.6f}"
                where = f", first at {row.first}" if row.first is not None else ""
                yield (
                    f"{row.name:<{width}}  {_shape(row.shape):<{shape_width}} {numbers}{extra}  {row.verdict}{where}"
                )
        yield from self.summary


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
    shapes_a, shapes_b = a.shapes(), b.shapes()
    report.notes += _absent(a, shapes_a, shapes_b)
    names = [name for name in expected_names(a.config) if name in shapes_a and name in shapes_b and name not in INPUTS]
    if inputs.labels is None or others.labels is None:
        of_labels = [name for name in names if name == "loss" or name.startswith(GRADIENT)]
        names = [name for name in names if name not in of_labels]
        lost = [side for side, given in zip("AB", (inputs, others), strict=True) if given.labels is None]
        if len(lost) == 1 or of_labels:
            report.notes.append(f"note: no labels in {' and '.join(lost)}: loss and gradients are not compared")
    if not names:
        raise ValueError(
            f"{a.name} and {b.name} have no tensor in common but their inputs: there is nothing to compare"
        )
    judge = _Judge(a, b, inputs.attention_mask.bool(), model, names)
    last_good = "the inputs"
    for name in names:
        row = judge.row(name)
        report.rows.append(row)
        if row.ok:
            last_good = name if report.ok else last_good
            continue
        if report.ok:
            report.ok = False
            report.summary += judge.accuse(row, last_good)
        if not everything:
            break
    if report.ok:
        report.summary += judge.acquit(report.rows)
    return report


class _Judge:
    """Asked for one tensor after the other, in order of execution."""

    def __init__(self, a: Trace, b: Trace, mask: Tensor, model: BertForMaskedLM | None, names: list[str]) -> None:
        self.a, self.b, self.mask = a, b, mask
        self.shapes = a.shapes(), b.shapes()
        self.coarser = max((a.dtype, b.dtype), key=lambda dtype: torch.finfo(dtype).eps)
        self.loudest = 0.0  # of the gradients so far
        self.running: list[Iterator[Measure]] = []  # one for A, and one for B if its dtype is another
        self.sticks: tuple[Measure, Measure] | None = None  # of the tensor that is looked at
        if model is not None:
            grad = any(name.startswith(GRADIENT) for name in names)
            sides = (a,) if a.dtype == b.dtype else (a, b)
            self.running = [Yardstick(model, side, grad=grad).measures() for side in sides]

    def pieces(self, name: str) -> Iterator[tuple[int, Tensor, Tensor, list[Tensor]]]:
        """(first row, A's rows, B's rows, [each one's truth]), zeros in the padding."""
        shape = self.shapes[0][name]
        rows = shape[0] if shape else 1
        size = 1
        for length in shape[1:]:
            size *= length
        step = max(1, yardstick.PIECE // size)
        row = row_of(name)
        batched = len(shape) > 1 and shape[0] == self.mask.shape[0] and not name.startswith(GRADIENT)
        for start in range(0, rows, step):
            found = [side.rows(name, start, start + step) for side in (self.a, self.b)]
            if batched:
                found = [hide_padding(row, x, self.mask[start : start + step]) for x in found]
            truths = [stick.truth[start : start + step] if shape else stick.truth for stick in self.sticks or ()]
            one, two = (x if x.dtype == torch.float64 else x.float() for x in found)
            yield start, one, two, [truth.cpu() for truth in truths]

    def row(self, name: str) -> Row:
        shape, other = (shapes[name] for shapes in self.shapes)
        if self.running:
            found = [next(measure for measure in side if measure.name == name) for side in self.running]
            self.sticks = (found[0], found[-1])
        wanted = expected_shape(name, self.a.config, tuple(self.mask.shape))
        if shape != wanted or other != wanted:
            said = self.transposed(name)
            if said is None:
                said = f"the shape is {_shape(shape)} in A and {_shape(other)} in B, and should be {_shape(wanted)}"
                for side, stored in (("A", shape), ("B", other)):
                    if axes := exchanged_axes(stored, wanted):
                        said += f": exchange axes {axes[0]} and {axes[1]} of {side}"
            return Row(name, shape, None, None, None, None, said)
        max_abs = scale = dot = norm_a = norm_b = 0.0
        errors = [0.0, 0.0]
        finite = [True, True]
        for _, one, two, truths in self.pieces(name):
            sizes = [span(one), span(two)]
            finite = [ok and size < float("inf") for ok, size in zip(finite, sizes, strict=True)]
            scale = max(scale, *sizes) if all(finite) else max(scale, largest(one), largest(two))
            max_abs = max(max_abs, distance(one, two))
            flat_a, flat_b = one.reshape(-1), two.reshape(-1).to(one.dtype)
            dot += flat_a.dot(flat_b).item()
            norm_a += flat_a.dot(flat_a).item()
            norm_b += flat_b.dot(flat_b).item()
            errors = [max(e, distance(x, y)) for e, x, y in zip(errors, (one, two), truths, strict=False)] or errors
        cosine = dot / (norm_a**0.5 * norm_b**0.5) if norm_a and norm_b else float(norm_a == norm_b)
        if name.startswith(GRADIENT):
            scale = self.loudest = max(self.loudest, scale)
        scale = scale or 1.0
        relative = max_abs / scale
        measured = allowed = None
        tolerance = ROUNDINGS * torch.finfo(self.coarser).eps
        wrong = ["A", "B"] if relative > tolerance else []
        if self.sticks:
            measured = (errors[0] / self.sticks[0].scale, errors[1] / self.sticks[1].scale)
            allowed = (self.sticks[0].allowed, self.sticks[1].allowed)
            wrong = [side for side, e, most in zip("AB", measured, allowed, strict=True) if not e <= most]
            tolerance, scale = max(allowed), self.sticks[0].scale
        verdict = "ok"
        if not all(finite):
            wrong = wrong or ["A", "B"]
            sides = " and ".join(side for side, ok in zip("AB", finite, strict=True) if not ok)
            verdict = f"NaN or infinity in {sides}"
        elif wrong:
            verdict = (
                "both wrong" if measured and len(wrong) == 2 else f"{wrong[0]} is wrong" if measured else "differs"
            )
            verdict = self.transposed(name) or verdict
        first = self.first(name, tolerance * scale) if wrong else None
        return Row(name, shape, max_abs, relative, cosine, first, verdict, measured, allowed)

    def first(self, name: str, tolerance: float) -> tuple[int, ...] | None:
        """The first index, in row-major order, where the two are further apart than `tolerance`, or not numbers."""
        for start, one, two, _ in self.pieces(name):
            apart = ~((one - two).abs() <= tolerance)
            if bool(apart.any()):
                if not apart.dim():
                    return None
                index = apart.nonzero()[0].tolist()
                return (start + index[0], *index[1:])
        return None

    def transposed(self, name: str) -> str | None:
        """What to say if the one tensor is the other with two axes exchanged."""
        shape, other = (shapes[name] for shapes in self.shapes)
        if sorted(shape) != sorted(other):
            return None
        one, two = self.a.read(name).double(), self.b.read(name).double()
        wanted = expected_shape(name, self.a.config, tuple(self.mask.shape))
        limit = ROUNDINGS * torch.finfo(self.coarser).eps * (largest(one) or 1.0)
        for i in range(one.dim()):
            for j in range(i + 1, one.dim()):
                # The padding is known in the layout of the table only: turn the one that has another.
                pair = [one, two.transpose(i, j)] if shape == wanted else [one.transpose(i, j), two]
                if any(x.shape != wanted for x in pair):
                    continue
                if distance(*(hide_padding(row_of(name), x, self.mask) for x in pair)) <= limit:
                    return f"B is A transposed: axes {i} and {j} are exchanged"
        return None

    def accuse(self, row: Row, last_good: str) -> Iterator[str]:
        yield f"first wrong: {row.name}. The last good one is {last_good}"
        yield f"between them: {explain(row.name)}"
        if not row.errors or not self.sticks:
            if not self.sticks:
                yield f"which of the two is wrong, only a model can tell (--model); {_without_model(self.coarser)}"
            return
        for side, given, error, stick in zip("AB", (self.a, self.b), row.errors, self.sticks, strict=True):
            if not error < float("inf"):
                yield f"{side} has NaN or infinity from {row.name} on, where float64 has numbers ({given.title})"
            elif not error <= stick.allowed:
                yield (
                    f"{side} is {error / stick.explained:,.0f} times worse than {_name(given.dtype)} explains, "
                    f"from {row.name} on: {error:.1e} from float64, where rounding makes {stick.explained:.1e} "
                    f"({given.title})"
                )
            else:
                yield (
                    f"{side} is right up to here: {error:.1e} from float64, allowed {stick.allowed:.1e} ({given.title})"
                )
        tolerance = ROUNDINGS * torch.finfo(self.coarser).eps
        both = all(not error <= stick.allowed for error, stick in zip(row.errors, self.sticks, strict=True))
        if both and row.relative is not None and row.relative <= tolerance:
            yield "but A and B agree with each other: are these the weights of --model?"

    def acquit(self, rows: list[Row]) -> Iterator[str]:
        forward = [row for row in rows if not row.name.startswith(GRADIENT)]
        last = next((row for row in rows if row.name == "logits"), (forward or rows)[-1])
        if last.errors is None:
            yield f"no difference in {count(len(rows))}; {_without_model(self.coarser)}"
            return
        dtypes = " and ".join(dict.fromkeys((_name(self.a.dtype), _name(self.b.dtype))))
        yield (
            f"{last.name}: A {last.errors[0]:.1e}, B {last.errors[1]:.1e} from float64: both right for {dtypes} "
            f"({count(len(rows))})"
        )


def _without_model(dtype: torch.dtype) -> str:
    tolerance = ROUNDINGS * torch.finfo(dtype).eps
    said = f"the tolerance was {ROUNDINGS:.0f} roundings of {_name(dtype)}, {tolerance:.1e}"
    return said if tolerance < 0.01 else f"{said}, which hides small faults: --model, or traces in float32, show more"


def count(tensors: int) -> str:
    return f"{tensors} tensor{'s' * (tensors != 1)}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _shape(shape: tuple[int, ...]) -> str:
    return " ".join(str(length) for length in shape) or "-"


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
            yield f"note: {title} does not have {_some(lost)}"
        if extra := sorted(mine.keys() - known):
            yield f"note: {title} has {_some(extra)}, which no trace of this model has; not compared"


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
