"""What `diff`, `diff --quantised`, `parity` and `parity --tokenizer` print: a table, notes, and the answer in words."""

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from minibert.config import BertConfig
from minibert.trace.table import GRADIENT, INPUTS, expected_names, explain


@dataclass(frozen=True)
class Line:
    """One row of a report's table. `cells()` gives the text under each header."""

    name: str

    @property
    def ok(self) -> bool:
        raise NotImplementedError

    def to_dict(self) -> dict[str, object]:
        """For JSON."""
        return {**asdict(self), "ok": self.ok}


@dataclass
class Report:
    """What was compared, as text, as markdown and for JSON.

    titles: of what was compared. notes: what could not be, and what else is worth knowing. summary: the answer.
    first_wrong: the first tensor that is not right. more: what else JSON has.
    """

    titles: tuple[str, ...]
    notes: list[str] = field(default_factory=list)
    rows: list[Any] = field(default_factory=list)  # of a kind of Line
    summary: list[str] = field(default_factory=list)
    ok: bool = True
    first_wrong: str | None = None
    more: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, object]:
        """What there is of A and of B has these letters as keys."""
        said = asdict(self) | {"rows": [row.to_dict() for row in self.rows]}
        titles, more = said.pop("titles"), said.pop("more")
        named = {"title": titles[0]} if len(titles) == 1 else {"titles": dict(zip("AB", titles, strict=True))}
        return {**named, **said, **more}

    def lines(self) -> Iterator[str]:
        yield from self._titled("  ")
        yield from self.notes
        if self.rows:
            header, *rows = self._table()
            widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
            for line in (header, *rows):  # names on the left, numbers on the right
                cells = [
                    cell.ljust(width) if name in (header[0], "shape", header[-1]) else cell.rjust(width)
                    for name, cell, width in zip(header, line, widths, strict=True)
                ]
                yield "  ".join(cells).rstrip()
        yield from self.summary

    def markdown(self) -> Iterator[str]:
        yield from self._titled(": ")
        for line in (*self.summary, *self.notes):
            yield f"- {line.strip()}"
        if self.rows:
            header, *rows = self._table()
            yield from ("", f"| {' | '.join(header)} |", f"|{'---|' * len(header)}")
            for row in rows:
                yield f"| {' | '.join(cell.replace('|', '&#124;') for cell in row)} |"

    def _titled(self, between: str) -> list[str]:
        if len(self.titles) == 1:
            return list(self.titles)
        return [f"{side}{between}{title}" for side, title in zip("AB", self.titles, strict=True)]

    def _table(self) -> list[list[str]]:
        """Its header, then its rows."""
        header = list(self.rows[0].cells())
        return [header, *([row.cells().get(name, "-") for name in header] for row in self.rows)]


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
