"""Naming the fault: what is wrong in a trace, what the error looks like, and which known fault explains it."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field

import torch

from minibert.masked_lm import BertForMaskedLM
from minibert.parity.appearance import Wrong, appearance, fitted_eps
from minibert.parity.confined import ENCODER, HEAD, LAYERS, confined, eps_at, first_section
from minibert.parity.faults import CATALOGUE
from minibert.parity.hidden import hidden_faults
from minibert.parity.precision import lower_precision
from minibert.parity.quantised import hint
from minibert.parity.report import between, count
from minibert.parity.search import Fit, Progress, Search, clearest
from minibert.parity.steps import Steps
from minibert.parity.yardstick import Error
from minibert.trace.files import Trace
from minibert.trace.inputs import covered
from minibert.trace.table import GRADIENT, explain


@dataclass
class Diagnosis:
    """ok: the trace is right. found: the faults (or pairs) that explain all of it. lines: the report."""

    ok: bool
    found: list[list[str]] = field(default_factory=list)
    first_wrong: str | None = None
    lines: list[str] = field(default_factory=list)

    def markdown(self) -> Iterator[str]:
        for line in self.lines:
            yield f"{'  ' * line.startswith('  ')}- {line.strip()}"

    def to_dict(self) -> dict[str, object]:
        return asdict(self)


def diagnose(given: Trace, model: BertForMaskedLM, progress: Progress = lambda faults, what: faults) -> Diagnosis:
    """Try the faults of the catalogue on the trace of a port of `model`: alone, then in one place only, then in pairs.

    progress: wraps what is tried, as tqdm does. Raises ValueError if the trace is of a model of another size, or has
    nothing to compare.
    """
    search = Search(model, given, progress)
    if not search.plain.errors:
        raise ValueError(f"{given.name} has only inputs: there is nothing to diagnose")
    if search.wrong is None:
        lines = [f"{given.title}: nothing is wrong in {count(search.plain.reproduced)}"]
        lines += [f"  {said}" for said in (given.layouts(), covered(search.yardstick.inputs, model.config)) if said]
        lines += hidden_faults(search.yardstick, search.measured)
        return Diagnosis(True, lines=lines)
    name = search.wrong.name
    given.settle(name, search.wrong.truth)
    wrong = _wrong_tensor(search)
    result = Diagnosis(False, first_wrong=name)
    result.lines.append(f"{given.title}: the first wrong tensor is {name} ({explain(name)})")
    result.lines += [f"  {said}" for said in (*appearance(wrong), *_afterwards(search))]
    if (lowered := lower_precision(given, search.yardstick.exact, name)) is not None:
        result.found, result.lines = [[lowered.title]], result.lines + lowered.lines
        return result
    fits, others = search.singles(CATALOGUE)
    if not fits:
        fits, _ = search.singles(list(_places(search, wrong)), "places")
    if not fits and (value := fitted_eps(wrong)) is not None:
        fits, _ = search.singles([eps_at(wrong.name, value, model.config.layer_norm_eps)], "places")
    if not fits:
        fits = search.pairs(others)
    fits = clearest(fits)
    result.found = [[fault.title for fault in fit.faults] for fit in fits]
    result.lines += _named(given, fits) if fits else _unnamed(search, others)
    return result


def _wrong_tensor(search: Search) -> Wrong:
    assert search.wrong is not None
    measure = search.wrong
    x, mask = search.there(measure.name).cpu(), search.given.compared(measure.name, search.mask).cpu()
    limit = Error(*(each * measure.scale for each in measure.allowed))
    return Wrong(search.given, measure.name, x, measure.truth.cpu(), limit, mask, search.yardstick.exact)


def _places(search: Search, wrong: Wrong) -> Iterator[type[Steps]]:
    """Known faults in one place only: where the first wrong tensor is, or in the encoder, or in the head."""
    section = wrong.name.rpartition(".")[0] + "."
    layers = search.rough.config.num_hidden_layers
    for fault in CATALOGUE:
        if section.startswith("layers.") and layers > 1:
            yield confined(fault, (section,), f"in layer {section.split('.')[1]} alone")
        if not section.startswith("head."):
            yield confined(fault, ENCODER, "in the encoder alone")
        if section.startswith("layers.") and first_section(fault, layers) == 0:  # it could be in the embeddings too
            yield confined(fault, LAYERS, "in the layers alone")
        if not section.startswith("layers.") or layers == 0:
            yield confined(fault, HEAD, "in the head alone")


def _afterwards(search: Search) -> Iterator[str]:
    """How the error goes on after the first wrong tensor."""
    names = [name for name in search.plain.errors if not name.startswith(GRADIENT)]
    first = search.plain.first_wrong
    if first not in names or not all(search.plain.errors[name].largest < float("inf") for name in names):
        return
    times = [search.measured[name].times(search.plain.errors[name]) for name in names]
    start = names.index(first)
    if start and start < len(names) - 3:
        said = (
            f"the error is {times[start]:.2g} times rounding here, {times[start - 1]:.2g} times at {names[start - 1]}"
        )
        if max(times[start:]) <= 2 * times[start]:
            said += ", and from here on it grows no faster than rounding does"
        yield said


def _named(given: Trace, fits: list[Fit]) -> Iterator[str]:
    for fit in fits:
        yield (
            f"{fit.title}: reproduces all of {count(fit.reproduced)}, the worst at {fit.share:.0%} of the error that "
            f"{given.metadata['dtype']} may make"
        )
        for fault in fit.faults:
            yield f"  {fault.remedy} (source: {fault.source})"
    if len(fits) > 1:
        yield "these inputs cannot tell them apart: trace a batch with padding, two segments and labels, with --grad"


def _unnamed(search: Search, fits: list[Fit]) -> Iterator[str]:
    yield f"none of the known faults, alone, in one place or in pairs: {len(CATALOGUE)} were tried"
    assert search.plain.first_wrong is not None
    good = ["the inputs", *search.plain.errors][search.plain.reproduced]
    first, *further = between(search.given.config, good, search.plain.first_wrong, search.shapes)
    yield f"look at what computes it: {first}"
    yield from further
    best = max(fits, key=lambda fit: (fit.reproduced, -fit.gain), default=None)
    if best is not None and best.first_wrong is None:
        yield (
            f"the nearest is {best.title}, which is not near enough for a name: its worst error is {best.share:.0%} of "
            f"what {search.given.metadata['dtype']} may make. {best.faults[0].remedy}"
        )
    elif best is not None and best.reproduced > search.plain.reproduced:
        yield (
            f"the nearest is {best.title}: with it the first wrong tensor is {best.first_wrong}, "
            f"{count(best.reproduced - search.plain.reproduced)} later. {best.faults[0].remedy}"
        )
    if (looks := hint(search.given, search.yardstick.exact, search.plain.first_wrong or "")) is not None:
        yield looks
    if torch.finfo(search.given.dtype).eps > 1e-4:
        yield "repeat it in float32: there the faults differ more from each other and from rounding"
