"""What an error looks like, whether its cause is known or not: where it is, and which simple rule gives it.

Each sentence is checked against the numbers before it is said. A rule holds if what it leaves unexplained is within the
tolerance, or a tiny part of the error.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from minibert.checkpoint.names import to_transformers
from minibert.masked_lm import BertForMaskedLM
from minibert.parity.yardstick import Error, rms
from minibert.trace.recorder import GIVEN_BY
from minibert.trace.table import GRADIENT, SHAPES, hide_padding, row_of
from minibert.trace.tracefile import Trace

LEFT_OVER = 0.05  # A rule explains an error if at most this part of it is left.
AXES = {"B": "row", "H": "head", "K": "entry of a head", "D": "entry", "F": "entry", "V": "word"}


class Wrong(NamedTuple):
    """A wrong tensor. given: the trace it is from. x and truth: zeros in the padding. limit: the largest and the rms
    error that are allowed, not relative to anything. mask: (B, S). model: whose trace it should be, if that is known.
    """

    given: Trace
    name: str
    x: Tensor
    truth: Tensor
    limit: Error
    mask: Tensor
    model: BertForMaskedLM | None = None

    @property
    def gap(self) -> Tensor:
        return self.x.double() - self.truth.double()

    @property
    def hub(self) -> str:
        """The hub's module that gives the tensor; "" if there is none of its own."""
        number = self.name.split(".")[1] if self.name.startswith("layers.") else ""
        return GIVEN_BY.get(row_of(self.name), "").replace(".N.", f".{number}.")

    def explained_by(self, guess: Tensor) -> bool:
        """Whether `guess`, a tensor for `x`, leaves next to nothing of the error."""
        left, whole = (rms(hide_padding(self.name, y, self.mask) - self.x) for y in (guess, self.truth))
        return left <= LEFT_OVER * whole or left <= min(self.limit.rms, whole / 3)


def appearance(wrong: Wrong) -> Iterator[str]:
    """Sentences about an error, the most telling ones first."""
    if not bool(wrong.x.isfinite().all()):
        yield f"{int((~wrong.x.isfinite()).sum()):,} of {wrong.x.numel():,} entries are not finite"
        return
    yield from _equal_to_another(wrong)
    truth = wrong.truth.double()
    if wrong.name == "logits" and wrong.explained_by(truth.log_softmax(-1)):
        yield "the same number is added to every word: these are log-probabilities. Give what the log-softmax reads"
    elif wrong.name == "logits" and wrong.explained_by(truth.softmax(-1)):
        yield "these are probabilities. Give what the softmax reads"
    else:
        yield from _bias(wrong)
        factor = _times(truth, wrong.x.double())
        if abs(factor - 1) > 1e-6 and wrong.explained_by(factor * truth):
            yield f"it is {factor:.4g} times the right values, everywhere"
        if wrong.model is not None and (found := fitted_eps(wrong)) is not None:
            yield f"LayerNorm eps fits {found:.1e} here; the configuration says {wrong.model.config.layer_norm_eps:.0e}"
        yield from _places(wrong)


def _equal_to_another(wrong: Wrong) -> Iterator[str]:
    """Is it an earlier tensor of the same section again, so that a step was left out?"""
    if wrong.name.startswith(GRADIENT):
        return
    names = wrong.given.names
    for name in reversed(names[: names.index(wrong.name)]):
        alike = name.rpartition(".")[0] == wrong.name.rpartition(".")[0]
        if (
            alike
            and wrong.given.shapes()[name] == tuple(wrong.x.shape)
            and wrong.explained_by(hide_padding(name, wrong.given.read(name), wrong.mask))
        ):
            said = ": the activation is missing" if wrong.name.endswith(".activation") else ""
            yield f"it equals {name}{said}"
            return


def _bias(wrong: Wrong) -> Iterator[str]:
    """Is the same vector added at every token?"""
    letters = SHAPES.get(row_of(wrong.name), [])
    if letters[:1] != ["B"] or letters.count("S") != 1 or wrong.mask.sum() < 3:
        return
    heads = letters[1] == "H"
    gap = wrong.gap.transpose(1, 2) if heads else wrong.gap  # (B, S, …)
    vector = gap[wrong.mask].mean(0)
    everywhere = vector.expand_as(gap)
    if not wrong.explained_by(wrong.truth + (everywhere.transpose(1, 2) if heads else everywhere)):
        return
    said = "the same vector is added at every token: a bias"
    if wrong.model is not None and wrong.hub:
        name = f"{wrong.hub}.bias"
        bias = to_transformers(wrong.model.state_dict())[name].to(vector).reshape(vector.shape)
        times = _times(bias, vector)
        if times and rms(vector - times * bias) < 0.1 * rms(vector):
            said = f"{name} is missing" if abs(times + 1) < 0.05 else f"{name} is added {times + 1:.3g} times"
    yield said


def fitted_eps(wrong: Wrong) -> float | None:
    """The eps that gives a wrong LayerNorm from what the trace says it has read. None if no eps does."""
    read = _read_by(wrong)
    if read is None or wrong.model is None:
        return None
    some, x = read[wrong.mask][:512], wrong.x[wrong.mask][:512].double()
    weights = to_transformers(wrong.model.state_dict())
    weight, bias = (weights[f"{wrong.hub}.{kind}"].to(x) for kind in ("weight", "bias"))

    def left(power: float) -> float:
        return rms(F.layer_norm(some, weight.shape, weight, bias, 10.0**power) - x)

    best = min((step / 4 for step in range(-60, 1)), key=left)
    for width in (0.1, 0.02, 0.004, 8e-4, 1.6e-4, 3.2e-5, 6.4e-6):
        best = min((best + step * width for step in range(-3, 4)), key=left)
    guess = F.layer_norm(read, weight.shape, weight, bias, 10.0**best)
    far = abs(best - math.log10(wrong.model.config.layer_norm_eps)) > 0.02
    return 10.0**best if far and wrong.explained_by(guess) else None


def _read_by(wrong: Wrong) -> Tensor | None:
    """What a LayerNorm has read, if the trace has it."""
    section = wrong.name.rpartition(".")[0]
    number = int(section.split(".")[1]) if section.startswith("layers.") else 0
    before = f"layers.{number - 1}.feed_forward_norm" if number else "embeddings.norm"
    parts = {
        "embeddings.norm": ["embeddings.sum"],
        "layers.N.attention_norm": [f"{section}.attention_output", before],
        "layers.N.feed_forward_norm": [f"{section}.feed_forward", f"{section}.attention_norm"],
        "head.norm": ["head.activation"],
    }.get(row_of(wrong.name))
    shapes = wrong.given.shapes()
    if parts is None or any(shapes.get(part) != tuple(wrong.x.shape) for part in parts):
        return None
    return torch.stack([wrong.given.read(part).double() for part in parts]).sum(0)


def _places(wrong: Wrong) -> Iterator[str]:
    """Rows, heads, positions or keys outside which everything is right."""
    letters = SHAPES.get(row_of(wrong.name), [])
    apart = wrong.gap.abs() > wrong.limit.largest
    if not letters or not bool(apart.any()) or apart.dim() != len(letters):
        return
    for axis, letter in enumerate(letters):
        others = tuple(each for each in range(apart.dim()) if each != axis)
        found = apart.any(others).nonzero().flatten().tolist()
        possible = int(wrong.mask.any(0).sum()) if letter == "S" else apart.shape[axis]
        if len(found) * 2 > possible or possible < 2:
            continue
        one = ("key" if axis == 3 else "position") if letter == "S" else AXES[letter]
        many = one.replace("entry", "entries") if "entry" in one else f"{one}s"
        listed = f"{one} {found[0]}" if len(found) == 1 else f"{many} {', '.join(map(str, found[:4]))}"
        if len(found) > 2 and found == list(range(found[0], found[-1] + 1)):
            listed = f"{many} {found[0]} to {found[-1]}"
        elif len(found) > 4:
            listed += f" and {len(found) - 4} more"
        yield f"only in {listed} of {apart.shape[axis]}"


def _times(one: Tensor, other: Tensor) -> float:
    """How many times `one` is in `other`, by least squares."""
    size = one.square().sum().item()
    return (one * other).sum().item() / size if size else 0.0
