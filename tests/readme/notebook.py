"""Makes minibert/course.ipynb from minibert/course.md, after fill.py: `python tests/readme/notebook.py`.

A block of Python becomes a cell, and the text below it what the cell has printed. All else is a cell of Markdown.
"""

import json
import re
from pathlib import Path

COURSE = Path(__file__).parents[2] / "minibert" / "course.md"
BLOCK = re.compile(r"^```python\n(.*?)^```\n(?:```text\n(.*?)^```\n)?", re.MULTILINE | re.DOTALL)


def notebook(text: str) -> str:
    cells: list[dict[str, object]] = []

    def add(kind: str, source: str, **more: object) -> None:
        if source.strip():
            name = f"cell-{len(cells) + 1}"
            cells.append({"cell_type": kind, "id": name, "metadata": {}, "source": lines(source.strip()), **more})

    end = 0
    for block in BLOCK.finditer(text):
        add("markdown", text[end : block.start()])
        printed = [{"name": "stdout", "output_type": "stream", "text": lines(block[2])}] if block[2] else []
        add("code", block[1], execution_count=None, outputs=printed)
        end = block.end()
    add("markdown", text[end:])
    python = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    whole = {"cells": cells, "metadata": python, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(whole, ensure_ascii=False, indent=1) + "\n"


def lines(text: str) -> list[str]:
    return text.splitlines(keepends=True)


if __name__ == "__main__":
    COURSE.with_suffix(".ipynb").write_text(notebook(COURSE.read_text(encoding="utf-8")), encoding="utf-8")
