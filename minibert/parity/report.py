"""What `diff`, `diff --quantised`, `parity` and `parity --tokenizer` print: a table, notes, and the answer in words."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any


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
