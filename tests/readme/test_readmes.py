"""What the READMEs show is what happens: every Python block and every quick command is run, in the order of the page,
and what is printed is compared with what is shown.

    ```python     runs; the blocks of a page (in the cookbook, of a section) share their names and a folder
    ```text       after such a block: what it prints
    ```console    after `$ `, a command that runs; below it, what it prints
    ```sh         commands that are not run here; each stands in NOT_RUN, with the reason
    ```           a drawing (test_layout.py compares the tree of files)

Numbers may differ by a hundredth, and by what their last digit leaves open: another CPU adds in another order.
"""

import contextlib
import io
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from minibert.cli import main

REPOSITORY = Path(__file__).parents[2]
PAGES = sorted(
    path.relative_to(REPOSITORY).as_posix()
    for path in [REPOSITORY / "README.md", *(REPOSITORY / "minibert").rglob("*.md"), *REPOSITORY.glob("weights/*.md")]
)
# How a command that is not run here begins, and why it is not.
NOT_RUN = {
    "pip install": "the gate runs it in an environment of its own",
    "pytest": "it is what runs this",
    ".ci/": "it is what runs this",
    "torchrun": "several processes, or machines",
    "git clone": "the network",
    "minibert train corpus.txt": "an hour",
    "minibert bench": "minutes, and a quiet machine",
    "python tests/measure/scoring.py": "minutes, and a quiet machine",
    "python tests/measure/quality.py": "minutes, and texts that are not here",
    "bash weights/train.sh": "an hour and a half, and the texts",
    "python weights/build_corpus.py": "the texts are fetched from a package registry",
}
NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e[+-]?\d+)?")


class Block(NamedTuple):
    where: str  # the page and the line
    kind: str
    text: str
    section: int  # how many headings stand above


def blocks(page):
    text = (REPOSITORY / page).read_text(encoding="utf-8")
    for match in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        above = text[: match.start()]
        yield Block(f"{page}:{above.count(chr(10)) + 1}", match[1], match[2], above.count("\n## "))


def require_like(printed, shown, where):
    """Word for word, and numbers nearly."""
    got, wanted = printed.split(), shown.split()
    if "…" in wanted:  # what follows is left out on the page
        wanted = wanted[: wanted.index("…")]
        got = got[: len(wanted)]
    assert len(got) == len(wanted), f"{where} prints\n{printed}\nand the page shows\n{shown}"
    for one, other in zip(got, wanted, strict=True):
        assert NUMBER.sub("0", one) == NUMBER.sub("0", other), f"{where}: {one!r} is printed, and {other!r} shown"
        for a, b in zip(NUMBER.findall(one), NUMBER.findall(other), strict=True):
            digits = len(b.partition("e")[0].partition(".")[2])
            tolerance = 0.01 * abs(float(b)) + (1.5 * 10**-digits if digits else 0)
            if abs(float(b)) < 1e-4:  # a difference that is all rounding: its size is meant, not its digits
                tolerance = 1e-4
            assert abs(float(a) - float(b)) <= tolerance, f"{where}: {a} is printed, and {b} shown"


def commands(text):
    """(command, what is shown below it) of a console block. A command may go on after a backslash."""
    for part in re.split(r"^\$ ", text.replace("\\\n", ""), flags=re.MULTILINE)[1:]:
        command, _, shown = part.partition("\n")
        yield command, shown


def run_command(command):
    """What a line of shell prints. `minibert` runs in this process, which saves the start; all else in a shell."""
    words = shlex.split(command, comments=True)
    if words[0] == "minibert" and not set(words) & {"|", "<", ">", "&&", ";"}:
        return printed_by(lambda: main(words[1:]), errors=True)
    return subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True).stdout


def printed_by(call, errors=False):
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output if errors else sys.stderr):
        call()
    return output.getvalue()


QUICK = ("README.md", "minibert/study/README.md")


@pytest.mark.parametrize(
    "page", [page if page in QUICK else pytest.param(page, marks=pytest.mark.slow) for page in PAGES]
)
def test_a_page_does_what_it_shows(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names, printed, last, section = {"__name__": "__main__"}, None, None, 0
    for block in blocks(page):
        if page.endswith("cookbook.md") and block.section != section:  # each entry runs alone
            names, section = {"__name__": "__main__"}, block.section
        if block.kind == "python":
            code, last = compile(block.text, block.where, "exec"), block.where
            with torch.enable_grad():
                printed = printed_by(lambda code=code, names=names: exec(code, names))
        elif block.kind == "text":
            assert printed is not None, f"{block.where}: there is no Python above that prints this"
            require_like(printed, block.text, last)
            printed = None
        elif block.kind == "console":
            for command, shown in commands(block.text):
                require_like(run_command(command), shown, f"{block.where}, {command}")


@pytest.mark.parametrize("page", PAGES)
def test_what_is_not_run_has_a_reason_and_links_lead_somewhere(page):
    text = (REPOSITORY / page).read_text(encoding="utf-8")
    assert len(re.findall("^```", text, re.MULTILINE)) % 2 == 0, "a block that does not end"
    for block in blocks(page):
        assert block.kind in ("python", "text", "console", "sh", "json", ""), f"{block.where}: {block.kind!r}"
        typed = re.split("&&|\n", block.text.replace("\\\n", " ")) if block.kind == "sh" else []
        for command in filter(None, map(str.strip, typed)):
            known = command.startswith((*NOT_RUN, "minibert fill-mask"))
            assert known, f"{block.where}: run {command!r}, or say why"
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)|src(?:set)?=\"([^\"]+)\"", text):
        name = "".join(target)
        there = name.startswith(("http://", "https://")) or (REPOSITORY / page).parent.joinpath(name).exists()
        assert there, f"{page} links to {name}, which is not there"


def test_the_readme_is_short():
    assert len((REPOSITORY / "README.md").read_text(encoding="utf-8")) <= 11_000
