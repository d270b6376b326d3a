"""Naming the fault: which of the known faults, planted in our model, computes what a trace holds."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import combinations

from minibert.masked_lm import BertForMaskedLM
from minibert.parity.faults import CATALOGUE
from minibert.parity.report import count
from minibert.parity.steps import Steps
from minibert.parity.yardstick import Yardstick
from minibert.trace.files import Trace
from minibert.trace.inputs import hide_padding
from minibert.trace.table import GRADIENT, exchanged_axes, explain, row_of


@dataclass(frozen=True)
class Fit:
    """How far a fault (or a pair) explains a trace: the number of tensors in order of execution that it
    reproduces, the first that it does not (None: all are), and the largest error among the reproduced ones,
    as a share of what is allowed."""

    faults: tuple[type[Steps], ...]
    reproduced: int
    first_wrong: str | None
    share: float

    @property
    def title(self) -> str:
        return " + ".join(fault.title for fault in self.faults) or "no fault"


@dataclass
class Diagnosis:
    """ok: the trace is right. found: the faults (or pairs) that reproduce all of it. lines: the report."""

    ok: bool
    found: list[list[str]] = field(default_factory=list)
    first_wrong: str | None = None
    lines: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, object]:
        return asdict(self)


def diagnose(given: Trace, model: BertForMaskedLM) -> Diagnosis:
    """Run every fault of the catalogue, and every pair if no single one fits, against a trace of a port of `model`.

    Raises ValueError if the trace is of a model of another size, or has nothing to compare."""
    bench = _Bench(model, given)
    plain = bench.fit(())
    if plain.first_wrong is None and not plain.reproduced:
        raise ValueError(f"{given.name} has inputs only: there is nothing to diagnose")
    if plain.first_wrong is None:
        return Diagnosis(True, lines=[f"{given.title}: nothing is wrong in {count(plain.reproduced)}"])
    result = Diagnosis(False, first_wrong=plain.first_wrong)
    say = result.lines.append
    say(f"{given.title}: the first wrong tensor is {plain.first_wrong} ({explain(plain.first_wrong)})")
    singles = [bench.fit((fault,)) for fault in CATALOGUE]
    fits = [fit for fit in singles if fit.first_wrong is None]
    if not fits:
        fits = [fit for fit in bench.pairs(plain, singles) if fit.first_wrong is None]
    for fit in fits:
        result.found.append([fault.title for fault in fit.faults])
        say(
            f"{fit.title}: reproduces all of {count(fit.reproduced)}, the worst at {fit.share:.0%} of the error that "
            f"{given.metadata['dtype']} may make"
        )
        for fault in fit.faults:
            say(f"  {fault.remedy} (source: {fault.source})")
    if len(fits) > 1:
        say("these inputs cannot tell them apart: trace a batch with padding, two segments and labels, with --grad")
    if not fits:
        say(f"none of the known faults, alone or in pairs: {len(CATALOGUE)} were tried")
        say(f"look at what computes {plain.first_wrong}; `minibert diff` with the model's own trace shows where")
        best = max(singles, key=lambda fit: fit.reproduced)
        if best.reproduced > plain.reproduced:
            say(
                f"the nearest is {best.title}: with it the first wrong tensor is {best.first_wrong}, "
                f"{count(best.reproduced - plain.reproduced)} later. {best.faults[0].remedy}"
            )
    return result


class _Bench:
    def __init__(self, model: BertForMaskedLM, given: Trace) -> None:
        self.given = given
        self.shapes = given.shapes()
        self.yardstick = Yardstick(model, given, grad=any(name.startswith(GRADIENT) for name in self.shapes))

    def fit(self, faults: tuple[type[Steps], ...]) -> Fit:
        """Stops at the first tensor that is not reproduced."""
        share, reproduced = 0.0, 0
        kind = type("Faulty", faults, {}) if faults else Steps
        mask = self.yardstick.inputs.attention_mask.bool()
        for measure in self.yardstick.measures(kind):
            name = measure.name
            if name not in self.shapes:
                continue
            if self.shapes[name] != measure.truth.shape:
                axes = exchanged_axes(self.shapes[name], tuple(measure.truth.shape))
                hint = f": axes {axes[0]} and {axes[1]} are exchanged" if axes else ""
                raise ValueError(
                    f"{self.given.name}: {name} is {self.shapes[name]}, and this model's is "
                    f"{tuple(measure.truth.shape)}{hint}. No fault is sought before the shapes agree"
                )
            there = self.given.read(name).to(mask.device)
            error = measure.error(hide_padding(row_of(name), there, mask))
            if not error <= measure.allowed:
                return Fit(faults, reproduced, name, share)
            share = max(share, error / measure.allowed)
            reproduced += 1
        return Fit(faults, reproduced, None, share)

    def pairs(self, plain: Fit, singles: list[Fit]) -> Iterator[Fit]:
        """If some faults explain more than none does, one of the pair is among them. Two that change the same
        step would not be two."""
        ahead = {fit.faults for fit in singles if fit.reproduced > plain.reproduced}
        for one, two in combinations(CATALOGUE, 2):
            if ahead and not {(one,), (two,)} & ahead:
                continue
            if not _steps(one) & _steps(two):
                yield self.fit((one, two))


def _steps(fault: type[Steps]) -> set[str]:
    """Which methods of Steps a fault replaces."""
    return {name for name in vars(fault) if callable(getattr(Steps, name, None))}
