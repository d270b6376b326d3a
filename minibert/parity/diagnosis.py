"""Naming the fault: what is wrong in a trace, what the error looks like, and which known fault, planted in our model,
computes what the trace holds.

A fault is first tried roughly: without its own rounding, in float32, from the first section that it can change, and
only as far as the tensor that is wrong. Most faults end there. The few that bring that tensor close are then measured
properly, to the end of the trace.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from minibert.masked_lm import BertForMaskedLM
from minibert.parity.appearance import Wrong, appearance, fitted_eps
from minibert.parity.faults import CATALOGUE
from minibert.parity.fewer_bits import hint, lower_precision
from minibert.parity.steps import Steps
from minibert.parity.yardstick import Error, Measure, Yardstick, converted, is_half
from minibert.trace.table import GRADIENT, between, count, covered, dtype_name, explain
from minibert.trace.tracefile import Trace

# A name needs both: a false one costs the porter more than none. test_counts.py counts wrong names.
NAME_SHARE = 0.33  # of what is allowed, at the worst tensor
NAME_GAIN = 0.3  # of the error that there is without the fault, at the tensor that is wrong without it
ROUGH_GAIN = 0.6  # the same, for the rough try
PAIRS = 5  # so many single faults are paired with all others, if none alone gets any further
VISIBLE = 1e-6  # A fault that changes less than this, relative to the scale, is no fault for this model and batch.
ENCODER, LAYERS, HEAD = ("embeddings.", "layers."), ("layers.",), ("head.",)

Progress = Callable[[Iterable[type[Steps]], str], Iterable[type[Steps]]]


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
    wrong = search.wrong_tensor(search.wrong)
    result = Diagnosis(False, first_wrong=name)
    result.lines.append(f"{given.title}: the first wrong tensor is {name} ({explain(name)})")
    result.lines += [f"  {said}" for said in appearance(wrong)]
    if (lowered := lower_precision(search.yardstick, name)) is not None:
        result.found, result.lines = [[lowered.title]], result.lines + lowered.lines
        return result
    fits, others = search.singles(CATALOGUE)
    if not fits:
        fits, _ = search.singles(_in_one_place(name, model.config.num_hidden_layers), "places")
    if not fits and (value := fitted_eps(wrong)) is not None:
        fits, _ = search.singles([eps_at(name, value, model.config.layer_norm_eps)], "places")
    if not fits:
        fits = search.pairs(others)
    best = min((fit.gain for fit in fits), default=0.0)
    fits = [fit for fit in fits if fit.gain <= 1.5 * best]  # the others are explained by the best one
    result.found = [[fault.title for fault in fit.faults] for fit in fits]
    result.lines += _named(given, fits) if fits else _unnamed(search, others)
    return result


@dataclass
class Fit:
    """How far faults explain a trace. errors: of the tensors, in order of execution, up to the first that they do not
    reproduce (first_wrong; None: they reproduce all). share: the largest error among the reproduced ones, as a share of
    what is allowed. gain: the error at the tensor that was wrong without them, as a part of what it was.
    """

    faults: tuple[type[Steps], ...]
    errors: dict[str, Error] = field(default_factory=dict)
    reproduced: int = 0
    first_wrong: str | None = None
    share: float = 0.0
    gain: float = 1.0

    @property
    def title(self) -> str:
        return " + ".join(fault.title for fault in self.faults) or "no fault"

    @property
    def explains(self) -> bool:
        """Whether this is good enough for a name."""
        return self.first_wrong is None and self.share <= NAME_SHARE and self.gain <= NAME_GAIN


class Search:
    """The faults tried on one trace. Raises ValueError if it is of a model of another size."""

    def __init__(self, model: BertForMaskedLM, given: Trace, progress: Progress) -> None:
        self.given, self.progress = given, progress
        self.yardstick = Yardstick(model, given, grad=any(name.startswith(GRADIENT) for name in given.shapes()))
        self.wrong: Measure | None = None  # the first wrong tensor, without a fault
        self.plain = Fit(())
        self.measured: dict[str, Measure] = {}  # of every tensor without a fault, without its truth
        for measure, error in self.yardstick.errors():
            if not measure.accepts(error):
                measure = self.yardstick.shaken(measure)
            self.plain.errors[measure.name] = error
            self.measured[measure.name] = measure._replace(truth=torch.empty(0))
            if self.wrong is None and not measure.accepts(error):
                self.wrong, self.plain.first_wrong = measure, measure.name
            self.plain.reproduced += self.wrong is None
        self.rough = converted(self.yardstick.exact, torch.float32 if given.dtype != torch.float64 else torch.float64)
        self.read = read_by_sections(self.rough, self.yardstick)

    def wrong_tensor(self, measure: Measure) -> Wrong:
        x, mask = self.yardstick.there(measure.name).cpu(), self.given.compared(measure.name, self.yardstick.mask).cpu()
        return Wrong(self.given, measure.name, x, measure.truth.cpu(), measure.limits, mask, self.yardstick.exact)

    def fit(self, faults: tuple[type[Steps], ...], base: Fit) -> Fit:
        """Measured properly, up to the first tensor that is not reproduced. base: what it has to be better than."""
        result = Fit(faults)
        for measure, error in self.yardstick.errors(together(faults)):
            name = measure.name
            result.errors[name] = error
            if name == base.first_wrong:
                result.gain = _gain(error, base.errors[name])
            if not measure.accepts(error):
                result.first_wrong = name
                return result
            result.share = max(result.share, measure.share(error))
            result.reproduced += 1
        return result

    def rough_gain(self, faults: tuple[type[Steps], ...], base: Fit) -> float:
        """The error at base's first wrong tensor, roughly, as a part of what it is with `base`. Infinite if a tensor
        before it, which is right with `base`, is wrong with the faults.
        """
        kind = together(faults)
        start = first_section(kind, self.rough.config.num_hidden_layers)
        steps = kind(self.rough, self.yardstick.inputs, self.given)
        for name, x in steps.run(self.read[: start + 1]):
            if name not in self.measured:
                continue
            self.given.settle(name, x)
            measure = self.measured[name]._replace(truth=self.yardstick.hidden(name, x))
            error = measure.error(self.yardstick.there(name))
            if name == base.first_wrong:
                return _gain(error, base.errors[name])
            if measure.share(error) > 2:
                return float("inf")
        return 0.0

    def singles(self, faults: Iterable[type[Steps]], what: str = "faults") -> tuple[list[Fit], list[Fit]]:
        """The faults that explain the trace, and those that were measured properly but do not."""
        gains = [(self.rough_gain((fault,), self.plain), fault) for fault in self.progress(list(faults), what)]
        tried = sorted(gains, key=lambda each: each[0])
        fits = [self.fit((fault,), self.plain) for gain, fault in tried if gain <= ROUGH_GAIN]
        self.promising = [fault for gain, fault in tried[:PAIRS] if gain < float("inf")]
        return [fit for fit in fits if fit.explains], [fit for fit in fits if not fit.explains]

    def pairs(self, fits: list[Fit]) -> list[Fit]:
        """Two faults that explain the trace together, and neither alone. fits: of the single ones."""
        ahead = [fit for fit in fits if fit.reproduced > self.plain.reproduced]
        bases = [(fit, fit.faults[0]) for fit in ahead] or [(self.plain, fault) for fault in self.promising]
        result: dict[frozenset[str], Fit] = {}
        for base, one in bases:
            for other in self.progress(CATALOGUE, f"pairs with {one.title}"):
                pair = frozenset((one.title, other.title))
                if pair in result or other is one or methods(one) & methods(other):
                    continue  # two that change the same step would not be two
                if self.rough_gain((one, other), base) > ROUGH_GAIN:
                    continue
                fit = self.fit((one, other), base)
                alone = (self.fit((fault,), self.plain) for fault in (one, other) if (fault,) != base.faults)
                if fit.explains and all(_better(fit, each) for each in alone):
                    result[pair] = fit
        return list(result.values())


def _gain(error: Error, without: Error) -> float:
    return error.rms / without.rms if without.rms and error.rms == error.rms else float("inf")


def _better(pair: Fit, alone: Fit) -> bool:
    """Whether a pair is much better than one of its faults, at the first tensor that this one does not reproduce."""
    name = alone.first_wrong
    return name is None or _gain(pair.errors[name], alone.errors[name]) <= NAME_GAIN


# ------------------------------------------------------------------------------------- faults, alone and in one place


def together(faults: tuple[type[Steps], ...]) -> type[Steps]:
    return faults[0] if len(faults) == 1 else type("Faulty", faults, {})


def methods(kind: type[Steps]) -> set[str]:
    """Which methods of Steps a fault replaces."""
    return {name for name in vars(kind) if callable(getattr(Steps, name, None))}


def confined(fault: type[Steps], sections: tuple[str, ...], where: str) -> type[Steps]:
    """The fault in the sections whose names start with one of `sections`. where: these, in words."""

    def only_there(name: str) -> Callable[..., Any]:
        def method(self: Steps, *given: Any) -> Any:
            kind = fault if self.section.startswith(sections) else Steps
            return getattr(kind, name)(self, *given)

        return method

    attributes = {"title": f"{fault.title}, {where}", "sections_of_fault": sections}
    return type("Confined", (fault,), attributes | {name: only_there(name) for name in methods(fault)})


def _in_one_place(wrong: str, layers: int) -> Iterator[type[Steps]]:
    """Known faults in one place only: where the first wrong tensor is, or in the encoder, or in the head."""
    section = wrong.rpartition(".")[0] + "."
    in_a_layer = section.startswith("layers.")
    for fault in CATALOGUE:
        if in_a_layer and layers > 1:
            yield confined(fault, (section,), f"in layer {section.split('.')[1]} alone")
        if section != "head.":
            yield confined(fault, ENCODER, "in the encoder alone")
        if in_a_layer and first_section(fault, layers) == 0:  # it could be in the embeddings too
            yield confined(fault, LAYERS, "in the layers alone")
        if not in_a_layer:
            yield confined(fault, HEAD, "in the head alone")


def eps_at(place: str, value: float, configured: float) -> type[Steps]:
    """An eps of `value` in the LayerNorm that gives the tensor `place`, and the configured one elsewhere."""
    attributes = {
        "title": f"LayerNorm eps {value:.1e}, at {place} alone",
        "remedy": f"set this LayerNorm's eps to config's layer_norm_eps ({configured:.0e})",
        "source": "the numbers of this trace: this eps fits them",
        "eps": lambda self, name: value if name == place else configured,
    }
    return type("EpsAt", (Steps,), attributes)


def first_section(kind: type[Steps], layers: int) -> int:
    """The number of the first section that a fault can change: 0 the embeddings, then the layers, then the head."""
    changed = {name for each in kind.__mro__ if each not in Steps.__mro__ for name in methods(each)}
    only = getattr(kind, "sections_of_fault", ENCODER)
    if changed <= {"head", "head_activation", "decode", "decoder", "decoder_bias"} or only == HEAD:
        return layers + 1
    if only == LAYERS:
        return 1
    if only != ENCODER:  # one layer
        return 1 + int(only[0].split(".")[1])
    return 0 if changed & {"embed", "types", "positions", "embeddings", "layer_norm", "eps", "made"} else 1


def read_by_sections(model: BertForMaskedLM, yardstick: Yardstick) -> list[Tensor | None]:
    """What each section reads in the right model: with these, a fault is tried from its first section on."""
    steps = Steps(model, yardstick.inputs, yardstick.given)
    for _ in steps.run():
        pass
    return steps.read


# --------------------------------------------------------------------- what a right trace in half precision would hide


def hidden_faults(yardstick: Yardstick, measured: dict[str, Measure]) -> Iterator[str]:
    """A sentence that names the known faults that these tensors would not show, if the dtype is float16 or bfloat16.

    measured: the measures, without a fault, of the tensors that are there.
    """
    dtype = yardstick.given.dtype
    if not is_half(dtype):
        return
    model = converted(yardstick.exact, torch.float32)
    read = read_by_sections(model, yardstick)
    found = [fault.title for fault in CATALOGUE if _is_hidden(fault, model, yardstick, measured, read)]
    if found:
        name = dtype_name(dtype)
        yield f"{name} would hide these faults, in this model and on these inputs: {', '.join(found)}"
    yield "small faults that are not in this list may be hidden too: repeat it in float32 to be sure"


def _is_hidden(
    fault: type[Steps],
    model: BertForMaskedLM,
    yardstick: Yardstick,
    measured: dict[str, Measure],
    read: list[Tensor | None],
) -> bool:
    """Whether a fault changes something, and nothing by more than rounding may."""
    read = read[: first_section(fault, model.config.num_hidden_layers) + 1]
    right, faulty = (kind(model, yardstick.inputs, yardstick.given).run(read) for kind in (Steps, fault))
    waiting: dict[str, Tensor] = {}  # a fault may leave steps out, or take them in another order
    changed = False
    for name, y in faulty:
        while name not in waiting:
            other, x = next(right)
            waiting[other] = x
        x = waiting.pop(name)
        if name not in measured:
            continue
        measure = measured[name]._replace(truth=yardstick.hidden(name, x))
        error = measure.error(yardstick.hidden(name, y))
        if not measure.accepts(error):
            return False
        changed = changed or error.largest > VISIBLE
    return changed


# --------------------------------------------------------------------------------------------------- what is said of it


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
    plain, first_wrong = search.plain, search.plain.first_wrong or ""
    yield f"none of the known faults, alone, in one place or in pairs: {len(CATALOGUE)} were tried"
    good = ["the inputs", *plain.errors][plain.reproduced]
    first, *further = between(search.given.config, good, first_wrong, search.given.shapes())
    yield f"look at what computes it: {first}"
    yield from further
    best = max(fits, key=lambda fit: (fit.reproduced, -fit.gain), default=None)
    if best is not None and best.first_wrong is None:
        yield (
            f"the nearest is {best.title}, which is not near enough for a name: its worst error is {best.share:.0%} of "
            f"what {search.given.metadata['dtype']} may make. {best.faults[0].remedy}"
        )
    elif best is not None and best.reproduced > plain.reproduced:
        yield (
            f"the nearest is {best.title}: with it the first wrong tensor is {best.first_wrong}, "
            f"{count(best.reproduced - plain.reproduced)} later. {best.faults[0].remedy}"
        )
    if (looks := hint(search.yardstick, first_wrong)) is not None:
        yield looks
    if is_half(search.given.dtype):
        yield "repeat it in float32: there the faults differ more from each other and from rounding"
