"""Write what the blocks of a page print into the page: `python tests/readme/fill.py README.md minibert/README.md`.

For whoever changes a page. Read the difference before you commit it: the test compares with what stands there then.
"""

import contextlib
import io
import os
import re
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from test_readmes import run_command


def fill(text):
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
            commands = [
                part.replace("\\\n", "\\\n").partition("\n")[0] for part in re.split(r"^\$ ", body, flags=re.M)[1:]
            ]
            body = "".join(f"$ {command}\n{run_command(command).rstrip()}\n" for command in commands)
        return f"```{kind}\n{body}```"

    return re.sub(r"^```(\w+)\n(.*?)^```$", run, text, flags=re.MULTILINE | re.DOTALL)


if __name__ == "__main__":
    pages = [Path(name).resolve() for name in sys.argv[1:]]
    os.chdir(tempfile.mkdtemp())
    for page in pages:
        page.write_text(fill(page.read_text(encoding="utf-8")), encoding="utf-8")
