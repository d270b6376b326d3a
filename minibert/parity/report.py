"""The result of comparing two traces: a row for each tensor, notes, and the answer in words."""

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field

from minibert.config import BertConfig
from minibert.parity.yardstick import Error
from minibert.trace.table import GRADIENT, INPUTS, expected_names, explain


@dataclass(frozen=True)
class Row:
    """One tensor in both traces.

    relative: max_abs, divided by the tensor's scale. first: the first index where the two differ by more than the
    tolerance. errors: the distance of A and of B from float64, if there is a model; allowed: what their dtypes may do.
    verdict: "ok", or what is wrong. Numbers are None where the shapes do not fit.
    """

    name: str
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


@dataclass
class Report:
    """What `diff` found. notes: what could not be compared, and what else is worth knowing. summary: the answer."""

    titles: tuple[str, str]
    notes: list[str] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    summary: list[str] = field(default_factory=list)
    ok: bool = True

    @property
    def first_wrong(self) -> str | None:
        """The first tensor that is not right."""
        return next((row.name for row in self.rows if not row.ok), None)

    def to_dict(self) -> dict[str, object]:
        """For JSON. What there is of A and of B has these letters as keys."""
        rows = []
        for row in self.rows:
            values = {**asdict(row), "ok": row.ok}
            for key in ("errors", "allowed"):
                pair = getattr(row, key)
                values[key] = pair and {side: each._asdict() for side, each in zip("AB", pair, strict=True)}
            rows.append(values)
        titles = dict(zip("AB", self.titles, strict=True))
        return {**asdict(self), "titles": titles, "first_wrong": self.first_wrong, "rows": rows}

    def lines(self) -> Iterator[str]:
        yield f"A  {self.titles[0]}"
        yield f"B  {self.titles[1]}"
        yield from self.notes
        if self.rows:
            yield from in_columns(*self.cells())
        yield from self.summary

    def markdown(self) -> Iterator[str]:
        yield f"A: {self.titles[0]}  "
        yield f"B: {self.titles[1]}"
        for line in self.summary:
            yield f"- {line}"
        for line in self.notes:
            yield f"- {line}"
        yield ""
        yield from in_markdown(*self.cells())

    def cells(self) -> tuple[list[str], list[list[str]]]:
        """The table: its header, and its rows."""
        measured = bool(self.rows) and self.rows[0].errors is not None
        header = ["tensor", "shape", "max abs", "relative", "cosine"]
        header += ["A to f64", "B to f64", "allowed"] * measured + ["verdict"]
        rows = []
        for row in self.rows:
            numbers = ["-"] * 3
            if row.max_abs is not None:
                numbers = [f"{row.max_abs:.1e}", f"{row.relative:.1e}", f"{row.cosine:.6f}"]
            if measured:
                errors = (*row.errors, max(row.allowed)) if row.errors and row.allowed else ()
                numbers += [f"{error.largest:.1e}" for error in errors] or ["-"] * 3
            where = f", first at {row.first}" if row.first is not None else ""
            rows.append([row.name, shape_words(row.shape), *numbers, f"{row.verdict}{where}"])
        return header, rows


def in_columns(header: list[str], rows: list[list[str]]) -> Iterator[str]:
    """A table for a terminal: names on the left, numbers on the right."""
    widths = [max(len(line[column]) for line in (header, *rows)) for column in range(len(header))]
    for line in (header, *rows):
        cells = [
            cell.ljust(width) if column in (0, len(widths) - 1) or header[column] == "shape" else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        yield "  ".join(cells).rstrip()


def in_markdown(header: list[str], rows: list[list[str]]) -> Iterator[str]:
    """The same as a table in markdown."""
    yield f"| {' | '.join(header)} |"
    yield f"|{'---|' * len(header)}"
    for row in rows:
        yield f"| {' | '.join(cell.replace('|', '&#124;') for cell in row)} |"


def between(
    config: BertConfig, good: str, wrong: str, present: Iterable[str], where: str = "the trace"
) -> Iterator[str]:
    """What the first wrong tensor is, and what stands between it and the last good one but is not `present`: then the
    fault may be in any of these. where: from which trace they are absent, in words.
    """
    yield f"{wrong} is {explain(wrong)}"
    names = [name for name in expected_names(config) if name not in INPUTS]
    start = names.index(good) + 1 if good in names else 0
    absent = [name for name in names[start : names.index(wrong)] if name not in set(present)]
    if wrong.startswith(GRADIENT) or not absent:
        return
    listed = ", ".join(absent) if len(absent) <= 14 else f"from {absent[0]} to {absent[-1]}"
    yield f"between {good} and {wrong}, {count(len(absent))} are not in {where}: {listed}"
    # What all later tensors depend on divides the stretch; one of three parallel projections does not.
    passed = [name for name in absent if not name.endswith((".query", ".key", ".value", ".scores"))] or absent
    middle = names.index(absent[len(absent) // 2])
    following = min(passed, key=lambda name: abs(names.index(name) - middle))
    yield f"write {following} into {where} next: it halves the stretch in which the fault can be"


def count(tensors: int) -> str:
    return f"{tensors} tensor{'s' * (tensors != 1)}"


def shape_words(shape: tuple[int, ...]) -> str:
    return " ".join(str(length) for length in shape) or "-"
