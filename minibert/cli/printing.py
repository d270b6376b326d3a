"""How several commands print what they found. Without torch."""

import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minibert.parity.report import Report

PATIENCE = 2.0  # seconds until a line of progress is shown


def as_json(value: Any) -> str:
    """JSON, indented. JSON has no NaN and no infinity: they become the words "nan" and "inf"."""

    def finite(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: finite(each) for key, each in value.items()}
        if isinstance(value, list | tuple):
            return [finite(each) for each in value]
        return str(value) if isinstance(value, float) and not abs(value) < float("inf") else value

    return json.dumps(finite(value), indent=2, allow_nan=False)


def print_json_list(values: Iterable[Any]) -> None:
    """A JSON list with a value a line, each of which is written as soon as it is known."""
    separator = "["
    for value in values:
        print(separator, json.dumps(value, ensure_ascii=False, allow_nan=False), sep="\n", end="", flush=True)
        separator = ","
    print("\n]" if separator == "," else "[]")


def shown(report: "Report", form: str) -> int:
    """Print a report as `--format` says. The exit status: 1 if what was compared is not right."""
    if form == "json":
        print(as_json(report.to_dict()))
    else:
        print("\n".join(report.markdown() if form == "markdown" else report.lines()))
    return 0 if report.ok else 1


def progress(values: Iterable[Any], what: str) -> Iterable[Any]:
    """A line on stderr that tells how far it is, on a terminal, for what takes longer than PATIENCE."""
    from tqdm import tqdm

    return tqdm(values, desc=what, disable=None, delay=PATIENCE, leave=False)
