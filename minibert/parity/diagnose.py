"""Naming the fault: which of the known faults, planted in our model, computes what a trace holds."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import combinations

import torch
from torch import Tensor

from minibert.model import BertForMaskedLM
from minibert.parity.faults import CATALOGUE, Steps
from minibert.parity.trace import GRADIENT, MEANINGS, Inputs, Trace, hide_padding, row_of
from minibert.parity.yardstick import FLOOR, K, converted, distance, largest, require_same_size, scales


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
    require_same_size(model, given)
    bench = _Bench(model, given)
    plain = bench.fit(())
    if plain.first_wrong is None and not plain.reproduced:
        raise ValueError(f"{given.name} has inputs only: there is nothing to diagnose")
    if plain.first_wrong is None:
        return Diagnosis(True, lines=[f"{given.title}: nothing is wrong in {plain.reproduced} tensors"])
    result = Diagnosis(False, first_wrong=plain.first_wrong)
    say = result.lines.append
    say(f"{given.title}: the first wrong tensor is {plain.first_wrong} ({MEANINGS[row_of(plain.first_wrong)]})")
    singles = [bench.fit((fault,)) for fault in CATALOGUE]
    fits = [fit for fit in singles if fit.first_wrong is None]
    if not fits:
        fits = [fit for fit in bench.pairs(plain, singles) if fit.first_wrong is None]
    for fit in fits:
        result.found.append([fault.title for fault in fit.faults])
        say(
            f"{fit.title}: reproduces all {fit.reproduced} tensors, the worst at {fit.share:.0%} of the error that "
            f"{given.metadata['dtype']} may make"
        )
        for fault in fit.faults:
            say(f"  {fault.remedy} (source: {fault.source})")
    if len(fits) > 1:
        say("these inputs cannot tell them apart: trace a batch with padding, two segments and labels, with --grad")
    if not fits:
        say(f"none of the known faults, alone or in pairs: {len(CATALOGUE)} were tried")
        best = max(singles, key=lambda fit: fit.reproduced)
        if best.reproduced > plain.reproduced:
            say(
                f"the nearest is {best.title}: with it the first wrong tensor is {best.first_wrong}, "
                f"{best.reproduced - plain.reproduced} tensors later. {best.faults[0].remedy}"
            )
    return result


class _Bench:
    def __init__(self, model: BertForMaskedLM, given: Trace) -> None:
        self.given = given
        self.rounded = converted(model, given.dtype)
        self.exact = converted(self.rounded, torch.float64)
        self.inputs: Inputs = given.inputs()[0].to(next(model.parameters()).device)
        self.mask = self.inputs.attention_mask.bool()
        self.shapes = given.shapes()
        self.grad = self.inputs.labels is not None and any(name.startswith(GRADIENT) for name in self.shapes)

    def fit(self, faults: tuple[type[Steps], ...]) -> Fit:
        """Both in float64 and in the trace's dtype, for what rounding does to a faulty model is not what it does
        to a right one. Stops at the first tensor that is not reproduced."""
        before, share, reproduced = FLOOR * torch.finfo(self.given.dtype).eps, 0.0, 0
        for name, truth, own, scale in self.both(faults):
            scale = scale or largest(truth) or 1.0
            error = distance(own, truth) / scale
            if error < float("inf"):
                before = max(before, error)
            if name not in self.shapes:
                continue
            there = self.given.read(name).to(truth.device)
            if there.shape != truth.shape:
                raise ValueError(
                    f"{self.given.name}: {name} is {tuple(there.shape)}, and this model's is {tuple(truth.shape)}: "
                    "no fault is sought before the shapes agree (`minibert diff` says which axes are exchanged)"
                )
            off = distance(hide_padding(row_of(name), there, self.mask), truth) / scale
            if not off <= K * before:
                return Fit(faults, reproduced, name, share)
            share = max(share, off / (K * before))
            reproduced += 1
        return Fit(faults, reproduced, None, share)

    def both(self, faults: tuple[type[Steps], ...]) -> Iterator[tuple[str, Tensor, Tensor, float]]:
        """(name, in float64, in the trace's dtype, the scale if it is not the tensor's own)"""
        kind = type("Faulty", faults, {}) if faults else Steps
        truth, own = (kind(model, self.inputs, self.given) for model in (self.exact, self.rounded))
        with torch.set_grad_enabled(self.grad):
            for (name, one), (_, two) in zip(truth.run(), own.run(), strict=True):
                row = row_of(name)
                yield (
                    name,
                    hide_padding(row, one.detach(), self.mask),
                    hide_padding(row, two.detach(), self.mask),
                    0.0,
                )
            if self.grad:
                exact, rounded = truth.gradients(), own.gradients()
                size = scales({name: largest(x) for name, x in exact.items()})
                for name in reversed(exact):
                    yield name, exact[name], rounded[name], size[name]

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
    return {
        name for name in vars(fault) if name in vars(Steps) and not (name.startswith("__") and name != "__init__")
    } - {
        "title",
        "remedy",
        "source",
    }
