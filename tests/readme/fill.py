"""Write what the blocks of a page print into the page, and the course's notebook:
`python tests/readme/fill.py README.md minibert/course.md`.

For whoever changes a page. Read the difference before you commit it: the test compares with what stands there then.
"""

import contextlib
import io
import json
import os
import re
import sys
import tempfile
from pathlib import Path

BLOCK = re.compile(r"^```python\n(.*?)^```\n(?:```text\n(.*?)^```\n)?", re.MULTILINE | re.DOTALL)


def fill(text):
    from test_readmes import commands, run_command

    names, printed = {"__name__": "__main__"}, ""

    def run(match):
        nonlocal printed
        kind, body = match[1], match[2]
        if kind == "python":
            output = io.StringIO()
            with contextlib.redirect_stdout(output):
                exec(compile(body, "block", "exec"), names)
            printed = output.getvalue()
        elif kind == "text":
            body = printed
        elif kind == "console" and "…" not in body:
            body = "".join(f"$ {command}\n{run_command(command).rstrip()}\n" for command, _ in commands(body))
        return f"```{kind}\n{body}```"

    return re.sub(r"^```(\w+)\n(.*?)^```$", run, text, flags=re.MULTILINE | re.DOTALL)


def notebook(text):
    """A page as a notebook. A block of Python becomes a cell, and the text below it what the cell has printed. All
    else is a cell of Markdown.
    """
    cells = []

    def add(kind, source, **more):
        if source.strip():
            name = f"cell-{len(cells) + 1}"
            lines = source.strip().splitlines(keepends=True)
            cells.append({"cell_type": kind, "id": name, "metadata": {}, "source": lines, **more})

    end = 0
    for block in BLOCK.finditer(text):
        add("markdown", text[end : block.start()])
        lines = (block[2] or "").splitlines(keepends=True)
        outputs = [{"name": "stdout", "output_type": "stream", "text": lines}] if lines else []
        add("code", block[1], execution_count=None, outputs=outputs)
        end = block.end()
    add("markdown", text[end:])
    python = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    whole = {"cells": cells, "metadata": python, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(whole, ensure_ascii=False, indent=1) + "\n"


if __name__ == "__main__":
    pages = [Path(name).resolve() for name in sys.argv[1:]]
    os.chdir(tempfile.mkdtemp())
    for page in pages:
        page.write_text(fill(page.read_text(encoding="utf-8")), encoding="utf-8")
        if page.name == "course.md":
            page.with_suffix(".ipynb").write_text(notebook(page.read_text(encoding="utf-8")), encoding="utf-8")
