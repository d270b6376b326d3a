"""A quantised port: how its error grows, without a verdict. Eight bits are meant to be wrong by more than rounding.

The reference is the model in float64, as for `diff`. Besides each tensor's error, the report says which products of
weights add the most error, and what it does to the answers: how often the likeliest word is the same, and how far the
probabilities are apart.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from minibert.masked_lm import BertForMaskedLM
from minibert.parity.report import in_columns, in_markdown
from minibert.parity.yardstick import Yardstick
from minibert.trace.files import Trace
from minibert.trace.inputs import hide_padding
from minibert.trace.table import GRADIENT, row_of

# The tensors that a product of weights gives. In a port with quantised weights the error comes from these.
QUANTISED = 4.0  # times rounding, in every product
PRODUCTS = ("query", "key", "value", "attention_output", "intermediate", "feed_forward", "dense", "logits")


class QuantisedRow(NamedTuple):
    """One tensor. error: the root-mean-square error, divided by the truth's own root mean square. times: the same,
    divided by the rounding of the trace's dtype. grown: by how much it is more than in the tensor before.
    """

    name: str
    error: float
    times: float
    grown: float


@dataclass
class QuantisedReport:
    """top1: the share of positions whose likeliest word is the same; divergence: the mean Kullback-Leibler divergence
    of the probabilities from the right ones, in nats. None without logits. worst: the product that adds the most.
    """

    title: str
    rows: list[QuantisedRow] = field(default_factory=list)
    worst: str | None = None
    top1: float | None = None
    divergence: float | None = None
    positions: int = 0

    def to_dict(self) -> dict[str, object]:
        return {**asdict(self), "rows": [row._asdict() for row in self.rows]}

    def cells(self) -> tuple[list[str], list[list[str]]]:
        rows = [[row.name, f"{row.error:.1e}", f"{row.times:.1f}", f"{row.grown:+.1e}"] for row in self.rows]
        return ["tensor", "error", "times rounding", "grown by"], rows

    def lines(self) -> list[str]:
        return [self.title, *in_columns(*self.cells()), *self.summary()]

    def markdown(self) -> list[str]:
        return [self.title, "", *in_markdown(*self.cells()), "", *self.summary()]

    def summary(self) -> Iterator[str]:
        if self.worst is not None:
            row = next(row for row in self.rows if row.name == self.worst)
            yield f"the product of weights that adds the most error: {row.name}, {row.grown:+.1e}"
        if self.top1 is not None:
            yield (
                f"logits: the likeliest word is the same at {self.top1:.1%} of {self.positions} positions; the "
                f"probabilities are {self.divergence:.1e} nats apart in the mean (Kullback-Leibler)"
            )
        yield "no verdict: how much of this is too much, a task has to say"


def quantised(given: Trace, model: BertForMaskedLM) -> QuantisedReport:
    """Measure a quantised port's trace. Raises ValueError if it is of a model of another size, or has only inputs."""
    report = QuantisedReport(given.title)
    shapes, before = given.shapes(), 0.0
    yardstick = Yardstick(model, given, grad=False)
    mask = yardstick.inputs.attention_mask.bool()
    for measure in yardstick.measures():
        name = measure.name
        if name not in shapes or name.startswith(GRADIENT):
            continue
        if shapes[name] != tuple(measure.truth.shape):
            raise ValueError(
                f"{given.name}: {name} is {shapes[name]}, and this model's is {tuple(measure.truth.shape)}: the shapes "
                "must agree first (`minibert diff` says how)"
            )
        there = given.compared(name, mask)
        x = hide_padding(row_of(name), given.read(name).to(mask.device), there).double()
        size = measure.truth.double().square().mean().sqrt().item() or 1.0
        error = (x - measure.truth).square().mean().sqrt().item() / size
        report.rows.append(QuantisedRow(name, error, measure.times(measure.error(x)), error - before))
        before = error
        if name == "logits":
            report.positions = int(there.sum())
            report.top1, report.divergence = _answers(x[there], measure.truth[there])
    if not report.rows:
        raise ValueError(f"{given.name} has only inputs: there is nothing to measure")
    products = [row for row in report.rows if row.name.split(".")[-1] in PRODUCTS]
    worst = max(products, key=lambda row: row.grown, default=None)
    report.worst = worst.name if worst is not None and worst.grown > 0 else None
    return report


def hint(given: Trace, model: BertForMaskedLM, first: str) -> str | None:
    """What to say of a wrong trace whose error looks like eight bits: in every product of weights, and small.

    first: its first wrong tensor.
    """
    if first.split(".")[-1] not in (*PRODUCTS, "sum"):  # it does not begin with weights
        return None
    try:
        report = quantised(given, model)
    except ValueError:
        return None
    products = [row for row in report.rows if row.name.split(".")[-1] in PRODUCTS]
    small = all(row.error < 0.5 for row in report.rows)
    if len(products) < 6 or not small or not all(row.times > QUANTISED for row in products):
        return None
    return f"{given.name}: a small error in every product of weights. If the port is quantised, use --quantised"


def _answers(logits: Tensor, truth: Tensor) -> tuple[float, float]:
    """(M, V) each: how often the likeliest word is the same, and the mean divergence."""
    same = (logits.argmax(-1) == truth.argmax(-1)).double().mean().item()
    right, found = truth.log_softmax(-1), logits.log_softmax(-1)
    return same, torch.sum(right.exp() * (right - found), -1).mean().item()
