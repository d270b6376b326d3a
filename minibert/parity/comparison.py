"""Comparing two traces, tensor by tensor in order of execution, up to the first that is wrong.

Files are read in pieces of some rows, and a model computes beside them layer by layer. So memory is bounded by the
largest tensor and by the model, not by the traces.
"""

from collections.abc import Iterator
from dataclasses import asdict

from torch import Tensor

from minibert.checkpoint.names import some
from minibert.masked_lm import BertForMaskedLM
from minibert.parity.judge import Judge
from minibert.parity.precision import lower_precision
from minibert.parity.quantised import hint
from minibert.parity.report import Report
from minibert.parity.yardstick import converted, require_same_size
from minibert.trace.files import Trace
from minibert.trace.forms import shown
from minibert.trace.recorder import trace
from minibert.trace.table import GRADIENT, INPUTS, expected_names


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
    judge = Judge(a, b, inputs.attention_mask.bool(), model, names)
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
    report.notes += [f"note: {said}" for side in (a, b) if (said := side.layouts())]
    if report.ok:
        report.summary += judge.acquit(report.rows)
    elif model is not None:
        first = next(row for row in report.rows if not row.ok)
        sides = [
            given for given, error in zip((a, b), first.errors or (), strict=False) if error == max(first.errors or ())
        ]
        for given in sides:
            if (lowered := lower_precision(given, model, first.name)) is not None:
                report.summary += lowered.lines
            elif said := hint(given, model, first.name):
                report.summary.append(said)
    return report


def own_trace(model: BertForMaskedLM, given: Trace) -> Trace:
    """What `model` computes from the inputs of a trace, in its dtype, with gradients if the trace has some."""
    require_same_size(model, given)
    inputs, _ = given.inputs()
    asked = {name: x for name, x in zip(INPUTS, inputs, strict=True) if x is not None}
    grad = "labels" in asked and any(name.startswith(GRADIENT) for name in given.shapes())
    result = trace(converted(model, given.dtype), **asked, grad=grad)
    result.name = "--model"
    return result


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
