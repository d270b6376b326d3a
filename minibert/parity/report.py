"""The result of comparing two traces: a row for each tensor, notes, and the answer in words."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field


@dataclass(frozen=True)
class Row:
    """One tensor in both traces.

    relative: max_abs, divided by the tensor's scale. first: the first index where the two differ by more than the
    tolerance. errors: the distance of each trace from float64, relative to the scale, if there is a model; allowed:
    what their dtypes may do. verdict: "ok", or what is wrong. Numbers are None where the shapes do not fit.
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
    """What `diff` found. notes: what could not be compared, and what else is worth knowing. summary: the answer."""

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
            yield from self._table()
        yield from self.summary

    def _table(self) -> Iterator[str]:
        measured = self.rows[0].errors is not None
        width = max(len(row.name) for row in self.rows)
        shape_width = max(len(shape_words(row.shape)) for row in self.rows)
        header = f"{'max abs':>8} {'relative':>8} {'cosine':>9}"
        extra = f" {'A to f64':>8} {'B to f64':>8} {'allowed':>8}" if measured else ""
        yield f"{'tensor':<{width}}  {'shape':<{shape_width}} {header}{extra}  verdict"
        for row in self.rows:
            numbers = f"{'-':>8} {'-':>8} {'-':>9}"
            if row.max_abs is not None:
                numbers = f"{row.max_abs:>8.1e} {row.relative:>8.1e} {row.cosine:>9.6f}"
            if row.errors and row.allowed:
                numbers += f" {row.errors[0]:>8.1e} {row.errors[1]:>8.1e} {max(row.allowed):>8.1e}"
            where = f", first at {row.first}" if row.first is not None else ""
            yield f"{row.name:<{width}}  {shape_words(row.shape):<{shape_width}} {numbers}  {row.verdict}{where}"


def count(tensors: int) -> str:
    return f"{tensors} tensor{'s' * (tensors != 1)}"


def shape_words(shape: tuple[int, ...]) -> str:
    return " ".join(str(length) for length in shape) or "-"


def some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
