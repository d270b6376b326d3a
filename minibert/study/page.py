"""The page: one HTML file that opens from the disk and loads nothing."""

from os import PathLike
from typing import Any


def to_html(data: dict[str, Any]) -> str:
    return ""


def save(html: str, path: str | PathLike[str], *, force: bool = False) -> None: ...


def in_a_notebook(html: str) -> str:
    return ""
