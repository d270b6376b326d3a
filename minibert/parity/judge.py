"""One tensor of two traces: how far apart they are, which is wrong, and what there is to say about it."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from minibert.masked_lm import BertForMaskedLM
from minibert.parity import yardstick
from minibert.parity.report import Row, count, shape_words
from minibert.parity.yardstick import Measure, Yardstick, distance, largest, span
from minibert.trace.files import Trace
from minibert.trace.inputs import hide_padding
from minibert.trace.table import GRADIENT, dtype_name, exchanged_axes, expected_shape, explain, row_of

# Without a model there is no truth to measure from. Then two right traces differ by at most this many eps of the
# coarser dtype. Over 450 small random models, ours against transformers', it was 7.2 at most, and 11.5 in gradients
# (whose scale is the largest gradient so far, since small ones inherit its errors); deeper models hand on more.
ROUNDINGS = 64.0


class Judge:
    """Compares the tensors of two traces. It must be asked for them in order of execution."""

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
            said = self.transposed(name) or _wrong_shapes(shape, other, wanted)
            return Row(name, shape, None, None, None, None, said)
        sums = self.sums(name)
        scale = sums.scale
        if name.startswith(GRADIENT):
            scale = self.loudest = max(self.loudest, scale)
        scale = scale or 1.0
        relative = sums.max_abs / scale
        measured = allowed = None
        tolerance = ROUNDINGS * torch.finfo(self.coarser).eps
        wrong = ["A", "B"] if relative > tolerance else []
        if self.sticks:
            measured = (sums.errors[0] / self.sticks[0].scale, sums.errors[1] / self.sticks[1].scale)
            allowed = (self.sticks[0].allowed, self.sticks[1].allowed)
            wrong = [side for side, e, most in zip("AB", measured, allowed, strict=True) if not e <= most]
            tolerance, scale = max(allowed), self.sticks[0].scale
        verdict = "ok"
        if not all(sums.finite):
            wrong = wrong or ["A", "B"]
            sides = " and ".join(side for side, ok in zip("AB", sums.finite, strict=True) if not ok)
            verdict = f"NaN or infinity in {sides}"
        elif wrong:
            verdict = "differs"
            if measured:
                verdict = "both wrong" if len(wrong) == 2 else f"{wrong[0]} is wrong"
            verdict = self.transposed(name) or verdict
        first = self.first(name, tolerance * scale) if wrong else None
        return Row(name, shape, sums.max_abs, relative, sums.cosine, first, verdict, measured, allowed)

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
            if bool(apart.any()):
                if not apart.dim():
                    return None
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
                    f"{side} is {error / stick.explained:,.0f} times worse than {dtype_name(given.dtype)} explains, "
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
        dtypes = " and ".join(dict.fromkeys((dtype_name(self.a.dtype), dtype_name(self.b.dtype))))
        yield (
            f"{last.name}: A {last.errors[0]:.1e}, B {last.errors[1]:.1e} from float64: both right for {dtypes} "
            f"({count(len(rows))})"
        )


@dataclass
class _Sums:
    """What is added up while two tensors are compared piece by piece. errors and finite: of A and of B."""

    max_abs: float = 0.0
    scale: float = 0.0
    dot: float = 0.0
    squares: tuple[float, float] = (0.0, 0.0)
    errors: list[float] = field(default_factory=lambda: [0.0, 0.0])
    finite: list[bool] = field(default_factory=lambda: [True, True])

    def add(self, one: Tensor, two: Tensor, truths: list[Tensor]) -> None:
        sizes = [span(one), span(two)]
        self.finite = [ok and size < float("inf") for ok, size in zip(self.finite, sizes, strict=True)]
        self.scale = max(self.scale, *(sizes if all(self.finite) else (largest(one), largest(two))))
        self.max_abs = max(self.max_abs, distance(one, two))
        flat_a, flat_b = one.reshape(-1), two.reshape(-1).to(one.dtype)
        self.dot += flat_a.dot(flat_b).item()
        self.squares = (self.squares[0] + flat_a.dot(flat_a).item(), self.squares[1] + flat_b.dot(flat_b).item())
        for side, (x, truth) in enumerate(zip((one, two), truths, strict=False)):
            self.errors[side] = max(self.errors[side], distance(x, truth))

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


def _without_model(dtype: torch.dtype) -> str:
    tolerance = ROUNDINGS * torch.finfo(dtype).eps
    said = f"the tolerance was {ROUNDINGS:.0f} roundings of {dtype_name(dtype)}, {tolerance:.1e}"
    return said if tolerance < 0.01 else f"{said}, which hides small faults: --model, or traces in float32, show more"
